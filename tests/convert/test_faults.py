"""Faults of the system at every step: one clear error, nothing half-finished visible, resumable."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qconvert.errors import ConvertError

from .conversion import Make, digests, randn, run

# more slices than one per tensor, and two passes over the weights
ALGO, BUDGET = "W4A16_NVFP4", 1 << 17
FAULTS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
CALLS = ("preadv", "pwrite", "copy_file_range", "ftruncate", "fsync", "rename", "write", "mkdir")


class Fault:
    """Counts the calls of one function; from one of them on, or at it alone, they fail."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fail_at: tuple[int, int] | None = None
        self.stays = False
        real: Callable[..., Any] = getattr(os, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.fail_at is not None:
                number, code = self.fail_at
                if self.count == number or (self.stays and self.count > number):
                    raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        patch.setattr(os, name, counted)


@pytest.fixture
def source(make: Make) -> Path:
    """Return a small checkpoint of two shards with a side file."""
    first = {"model.layers.0.mlp.up_proj.weight": randn(300, 512, seed=1)}
    second = {"model.norm.weight": randn(512, seed=2), "model.empty": torch.zeros(0, 4)}
    path = make(shards={"a.safetensors": first, "b.safetensors": second})
    (path / "notes.txt").write_text("x")
    return path


def go(source: Path, output: Path) -> None:
    """Convert with one worker, so that calls have one order."""
    run(source, output, algo=ALGO, budget=BUDGET, workers=1)


def error_of(source: Path, output: Path) -> str | None:
    """Return the message of the conversion's error, None if it succeeds."""
    try:
        go(source, output)
    except ConvertError as error:
        return str(error)
    return None


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CALLS)
def test_a_fault_at_every_call(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    fault: str,
    stays: bool,
) -> None:
    go(source, tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    counting = tmp_path / "counting"
    with monkeypatch.context() as patch:
        calls = Fault(name, patch)
        go(source, counting)
        num_calls = calls.count
    assert num_calls
    for number in range(1, num_calls + 1):
        output = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            broken = Fault(name, patch)
            broken.fail_at, broken.stays = (number, FAULTS[fault]), stays
            message = error_of(source, output)
        if message is None:
            # making a directory that is there already
            assert name == "mkdir"
            assert digests(output) == expected
            continue
        # which file, and what happened to it
        words = "disk is full" if fault == "ENOSPC" else "Input/output error"
        assert re.fullmatch(rf"{tmp_path}\S*: .*{words}.*", message)
        if output.exists():
            # after the rename: all of it is there
            assert {path.name for path in output.iterdir()} - {".qconvert"} == set(expected)

        go(source, output)

        assert digests(output) == expected
        assert not output.with_name(f"{output.name}.partial").exists()


@pytest.mark.parametrize("name", ["preadv", "pwrite", "copy_file_range", "write"])
def test_short_reads_and_writes_change_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    go(source, tmp_path / "whole")
    real = getattr(os, name)

    def short(*args: Any) -> Any:
        if name == "preadv":
            descriptor, (buffer,), offset = args
            return real(descriptor, [buffer[: len(buffer) // 2 + 1]], offset)
        if name == "copy_file_range":
            source, target, count, *offsets = args
            return real(source, target, count // 2 + 1, *offsets)
        descriptor, data, *offset = args
        return real(descriptor, data[: len(data) // 2 + 1], *offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, short)
        go(source, tmp_path / "pieces")

    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")


def test_a_file_system_without_range_copies_gets_writes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(source, tmp_path / "whole")

    def refused(*args: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", refused)
        go(source, tmp_path / "out")

    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
