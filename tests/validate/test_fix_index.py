"""Indexes that `qvalidate fix` makes again, and checkpoints whose weights are not all there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogue import PB_WO, Q
from checkpoints import bytes_of, draft, f32, write_safetensors
from fixing import in_json, rules_of

from qschema.safetensors import read_header
from qschema.strict import DocumentError
from qvalidate.fix import fix


def no_index(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


def index_is_no_json(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("{")


def index_without_a_map(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text('{"metadata": {}}')


def tensor_in_the_other_shard(path: Path) -> None:
    edit_map(path, lambda found: found.update({f"{Q}.weight": max(found.values())}))


def index_names_a_path(path: Path) -> None:
    edit_map(path, lambda found: found.update({f"{Q}.weight": "../x.safetensors"}))


def index_omits_a_shard(path: Path) -> None:
    def omit(found: dict[str, str]) -> None:
        last = max(found.values())
        for name in [name for name, shard in found.items() if shard == last]:
            del found[name]

    edit_map(path, omit)


def shard_was_renamed(path: Path) -> None:
    edit_map(
        path,
        lambda found: found.update({name: f"old-{shard}" for name, shard in found.items()}),
    )


def edit_map(path: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    edit(document["weight_map"])
    index.write_text(json.dumps(document))


INDEX_FAULTS = [
    no_index,
    index_is_no_json,
    index_without_a_map,
    tensor_in_the_other_shard,
    index_names_a_path,
    index_omits_a_shard,
    shard_was_renamed,
]


@pytest.mark.parametrize("break_index", INDEX_FAULTS, ids=lambda found: found.__name__)
def test_index_is_made_again_from_the_headers(
    break_index: Callable[[Path], None], tmp_path: Path
) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    wanted = in_json(path, "model.safetensors.index.json")
    break_index(path)
    report = fix(path, tmp_path / "out")
    found = in_json(tmp_path / "out", "model.safetensors.index.json")

    assert [repair.id for repair in report.repairs] == ["index-rebuilt"]
    assert report.before != []
    assert report.exit_code == 0
    assert found["weight_map"] == wanted["weight_map"]
    assert found["metadata"]["total_size"] == wanted["metadata"]["total_size"]  # type: ignore[index]
    assert fix(tmp_path / "out", tmp_path / "again").repairs == []


def test_stale_index_beside_a_single_file_goes(tmp_path: Path) -> None:
    path = draft("qwen3", PB_WO).write(tmp_path / "made")
    names = read_header(path / "model.safetensors").tensors
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    report = fix(path, tmp_path / "out")

    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert rules_of(report) == set()


def test_second_index_goes_and_is_named(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    shutil.copy(path / "model.safetensors.index.json", path / "a.safetensors.index.json")
    report = fix(path, tmp_path / "out")

    assert [(repair.id, repair.file) for repair in report.repairs] == [
        ("index-rebuilt", "model.safetensors.index.json"),
        ("stray-left-out", "a.safetensors.index.json"),
    ]


def old_shard(path: Path) -> Path:
    """Put all tensors of the last shard into the one before, and return the last."""
    *_, before, last = sorted(path.glob("*.safetensors"))
    tensors = {
        name: (stored.dtype, stored.shape, bytes_of(stored))
        for file in (before, last)
        for name, stored in read_header(file).tensors.items()
    }
    write_safetensors(before, tensors)
    edit_map(path, lambda found: found.update(dict.fromkeys(tensors, before.name)))
    return last


def test_numbered_shard_whose_tensors_are_all_in_others_is_a_stray_one(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    last = old_shard(path)
    report = fix(path, tmp_path / "out")

    assert [(repair.id, repair.file) for repair in report.repairs] == [
        ("stray-left-out", last.name)
    ]


def test_numbered_shard_with_old_and_new_tensors_is_refused(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    last = old_shard(path)
    old = next(iter(read_header(last).tensors.values()))
    number = ("F32", (), f32(1.0))
    write_safetensors(last, {old.name: (old.dtype, old.shape, bytes_of(old)), "new": number})
    with pytest.raises(DocumentError, match="tensor-duplicate"):
        fix(path, tmp_path / "out")


def test_damaged_shard_is_named_where_the_index_is_missing(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    no_index(path)
    damaged_shard(path)
    with pytest.raises(DocumentError, match="model-00003-of-00003"):
        fix(path, tmp_path / "out")


def lost_shard(path: Path) -> None:
    max(path.glob("*.safetensors")).unlink()


def damaged_shard(path: Path) -> None:
    max(path.glob("*.safetensors")).write_bytes(b"")


def two_sets_of_weights(path: Path) -> None:
    shutil.copy(max(path.glob("*.safetensors")), path / "model.safetensors")


def single_file_with_other_tensors(path: Path) -> None:
    write_safetensors(path / "model.safetensors", {"other.weight": ("F32", (), f32(1.0))})


def lost_tensor(path: Path) -> None:
    edit_map(path, lambda found: found.update({"lost.bias": max(found.values())}))


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        lost_shard,
        damaged_shard,
        two_sets_of_weights,
        single_file_with_other_tensors,
        lost_tensor,
        no_config,
    ],
    ids=lambda found: found.__name__,
)
def test_what_is_lost_is_not_repaired(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    spoil(path)
    with pytest.raises(DocumentError):
        fix(path, tmp_path / "out")

    assert [file.name for file in tmp_path.iterdir()] == ["made"]
