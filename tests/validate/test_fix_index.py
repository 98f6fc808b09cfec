"""Indexes that `qvalidate fix` makes again, and checkpoints whose weights are not all there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from catalogue import PB_WO, Q
from checkpoints import draft
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


def test_entry_of_a_tensor_that_is_nowhere_goes_and_is_named(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    edit_map(path, lambda found: found.update({"lost.weight": max(found.values())}))
    report = fix(path, tmp_path / "out")

    assert [(left.rule, left.where) for left in report.left] == [
        ("index-missing-tensor", "lost.weight")
    ]
    assert report.exit_code == 1


def lost_shard(path: Path) -> None:
    max(path.glob("*.safetensors")).unlink()


def damaged_shard(path: Path) -> None:
    max(path.glob("*.safetensors")).write_bytes(b"")


def two_sets_of_weights(path: Path) -> None:
    shutil.copy(max(path.glob("*.safetensors")), path / "model.safetensors")


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    "spoil",
    [lost_shard, damaged_shard, two_sets_of_weights, no_config],
    ids=lambda found: found.__name__,
)
def test_what_is_lost_is_not_repaired(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    spoil(path)
    with pytest.raises(DocumentError):
        fix(path, tmp_path / "out")

    assert [file.name for file in tmp_path.iterdir()] == ["made"]
