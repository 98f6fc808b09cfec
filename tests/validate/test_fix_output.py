"""The directory that `qvalidate fix` makes: links, copies, and nothing half made."""

import errno
import os
from pathlib import Path

import pytest
from catalogue import PB_WO, Q
from checkpoints import draft
from fixing import repaired, weights
from safetensors import safe_open

from qvalidate.fix import FixError, fix
from qvalidate.fix.output import check_output


def test_unchanged_shard_is_a_hard_link_and_a_changed_one_is_not(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    name = f"{Q}.weight_scale"
    dtype, _, data = made.tensor(name)
    made.put(name, (dtype, (2, 2), data))
    changed = made.shard_of(name)
    path = made.write(tmp_path / "made")
    fix(path, tmp_path / "out")

    shards = [file.name for file in path.glob("*.safetensors")]
    same = [shard for shard in shards if (tmp_path / "out" / shard).samefile(path / shard)]
    assert len(shards) == 3
    assert sorted(same) == sorted(shard for shard in shards if shard != changed)


def test_rewritten_shard_is_one_that_the_library_reads(tmp_path: Path) -> None:
    made = draft("qwen3", PB_WO)
    name = f"{Q}.weight_scale"
    _, shape, data = made.tensor(name)
    made.put(name, ("F32", (shape[0], shape[2]), data))
    repaired(made, tmp_path)

    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert tuple(file.get_tensor(name).shape) == shape
        assert file.get_tensor(name).tobytes() == data


def test_other_files_are_copies_that_may_be_edited(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    fix(path, tmp_path / "out")

    assert not (tmp_path / "out" / "tokenizer.json").samefile(path / "tokenizer.json")


def test_shard_is_copied_where_a_link_is_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draft("qwen3", PB_WO).write(tmp_path / "made")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    report = fix(path, tmp_path / "out")

    assert report.notes == ["model.safetensors: was copied, a hard link is not possible there"]
    assert weights(tmp_path / "out") == weights(path)


def test_shard_behind_a_symbolic_link_is_linked(tmp_path: Path) -> None:
    """A snapshot of the hub's cache is a folder of such links."""
    path = draft("qwen3", PB_WO).write(tmp_path / "made")
    (path / "model.safetensors").rename(tmp_path / "blob")
    (path / "model.safetensors").symlink_to(tmp_path / "blob")
    fix(path, tmp_path / "out")

    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").samefile(tmp_path / "blob")


def test_file_in_a_subfolder_comes_along(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.files["original/params.json"] = b"{}"
    repaired(made, tmp_path)

    assert (tmp_path / "out" / "original" / "params.json").read_bytes() == b"{}"


def test_hidden_files_are_left_out_and_named(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.files[".gitattributes"] = b"x"
    report = repaired(made, tmp_path)

    assert report.notes == [".gitattributes: is hidden or a link to a folder, and was left out"]


def test_link_to_a_folder_is_named_beside_an_index_that_is_made_again(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    (path / "model.safetensors.index.json").unlink()
    (tmp_path / "code").mkdir()
    (path / "code").symlink_to(tmp_path / "code")
    report = fix(path, tmp_path / "out")

    assert report.notes == ["code/: is hidden or a link to a folder, and was left out"]


def test_nothing_half_made_is_left_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        fix(path, tmp_path / "out")

    assert [file.name for file in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("name", ["out", "out.partial"])
def test_what_is_there_is_not_overwritten(name: str, tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    (tmp_path / name).mkdir()
    with pytest.raises(FixError, match=name):
        fix(path, tmp_path / "out")


def test_output_inside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    with pytest.raises(FixError, match="lies inside the checkpoint"):
        check_output(path, path / "out")
