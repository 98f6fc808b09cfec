"""A source that changes before, during or between runs is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qconvert import units
from qconvert.backends import resolve
from qconvert.convert import convert
from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qconvert.statistics import Statistics
from qschema.checkpoint import open_checkpoint
from qschema.plan import Unit

from .conversion import CHECKPOINTS, Make, recipe, wide
from .interrupted import BUDGET, Stop, go


def edited_in_place(path: Path) -> None:
    """Change a byte and set the time back."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: os.utime(path, ns=(0, 0)), "was modified"),
        (edited_in_place, "was modified"),
        (lambda path: path.write_bytes(path.read_bytes()), "was modified"),
        (
            lambda path: (shutil.copy2(path, f"{path}.new"), os.rename(f"{path}.new", path)),
            "was replaced",
        ),
    ],
)
def test_a_source_that_changed_since_is_refused(
    tmp_path: Path,
    make: Make,
    stop_after: Stop,
    change: Callable[[Path], object],
    problem: str,
) -> None:
    source = make(wide())
    with stop_after(1):
        go(source, tmp_path / "out")
    change(source / "model.safetensors")

    with pytest.raises(ConvertError, match=rf"model.safetensors {problem}; --fresh starts over"):
        go(source, tmp_path / "out")

    assert (tmp_path / "out.partial").exists()
    go(source, tmp_path / "out", fresh=True)


def test_another_source_under_the_same_output_is_refused(tmp_path: Path, stop_after: Stop) -> None:
    with stop_after(4):
        go(CHECKPOINTS / "llama", tmp_path / "out")

    with pytest.raises(ConvertError, match="was begun from other files than these"):
        go(CHECKPOINTS / "qwen3", tmp_path / "out")


def test_a_source_that_changes_while_it_is_converted_is_refused(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(wide())
    real = units.UnitWorker.convert

    def touched(self: units.UnitWorker, unit: Unit) -> object:
        done = real(self, unit)
        with open(source / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(units.UnitWorker, "convert", touched)
        with pytest.raises(ConvertError, match="was modified while it was converted"):
            go(source, tmp_path / "out")

    assert not (tmp_path / "out").exists()
    with pytest.raises(ConvertError, match="--fresh starts over"):
        go(source, tmp_path / "out")


def test_a_source_that_changed_after_its_header_was_read_is_refused(
    tmp_path: Path, make: Make
) -> None:
    source = make(wide())
    checkpoint = open_checkpoint(source)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"model.norm", b"model.morn"))

    with pytest.raises(ConvertError, match="changed after its header was read"):
        convert(
            checkpoint,
            make_plan(checkpoint, recipe()),
            tmp_path / "out",
            statistics=Statistics(),
            device=resolve("cpu", codecs=["fp8_pb_wo"]),
            workers=1,
            budget=BUDGET,
            watch=lambda progress: None,
        )

    assert not list(tmp_path.glob("out*"))
