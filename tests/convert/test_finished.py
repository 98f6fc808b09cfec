"""The same command again when the output is there: done, or no longer what it was."""

import os
import shutil
from pathlib import Path

import pytest

from qconvert.errors import ConvertError

from .conversion import CHECKPOINTS, digests, recipe
from .interrupted import go


def test_running_again_after_the_end_does_nothing(tmp_path: Path, converted: list[str]) -> None:
    go(CHECKPOINTS / "llama", tmp_path / "out")
    before = digests(tmp_path / "out")
    converted.clear()

    outcome = go(CHECKPOINTS / "llama", tmp_path / "out")

    assert outcome.done_before
    assert not converted
    assert digests(tmp_path / "out") == before


def test_another_plan_does_not_pass_for_the_finished_one(tmp_path: Path) -> None:
    go(CHECKPOINTS / "llama", tmp_path / "out")

    with pytest.raises(ConvertError, match="exists and is not empty; nothing is overwritten"):
        go(CHECKPOINTS / "llama", tmp_path / "out", recipe(algo="MXFP8"))


def test_a_finished_output_that_lost_a_file_is_no_success(tmp_path: Path) -> None:
    go(CHECKPOINTS / "llama", tmp_path / "out")
    shard = next((tmp_path / "out").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)

    with pytest.raises(ConvertError, match=r"is not as it was; remove the directory"):
        go(CHECKPOINTS / "llama", tmp_path / "out")


def test_killed_between_rename_and_clean_up(tmp_path: Path, converted: list[str]) -> None:
    source = CHECKPOINTS / "llama"
    go(source, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "out" / ".qconvert").mkdir()
    (tmp_path / "out" / ".qconvert" / "journal").write_text("x")
    converted.clear()

    assert go(source, tmp_path / "out").done_before

    assert not converted
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "tokenizer.json"])
def test_a_source_that_was_modified_after_the_end_is_not_complete_already(
    tmp_path: Path, name: str
) -> None:
    source = tmp_path / "in"
    shutil.copytree(CHECKPOINTS / "llama", source)
    go(source, tmp_path / "out")
    data = (source / name).read_bytes()
    (source / name).write_bytes(data)

    with pytest.raises(ConvertError, match=rf"{name} was modified after it was made"):
        go(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_finished_output_whose_documents_changed_is_no_success(tmp_path: Path, name: str) -> None:
    go(CHECKPOINTS / "llama", tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")

    with pytest.raises(ConvertError, match=rf"{name}: .* is not as it was"):
        go(CHECKPOINTS / "llama", tmp_path / "out")


def test_a_finished_output_whose_report_is_cut_is_no_success(tmp_path: Path) -> None:
    go(CHECKPOINTS / "llama", tmp_path / "out")
    report = tmp_path / "out" / "qconvert_report.json"
    report.write_bytes(report.read_bytes()[:-10])

    with pytest.raises(ConvertError, match="exists and is not empty"):
        go(CHECKPOINTS / "llama", tmp_path / "out")
