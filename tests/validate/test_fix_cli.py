"""`qvalidate fix` as a command: what it prints and how it exits."""

import errno
import json
import signal
from pathlib import Path

import pytest
from catalogue import PB_WO, PC_PT
from checkpoints import draft
from click.testing import CliRunner
from fixing import planted, rules_of, written

from qvalidate.fix import FixReport, output
from qvalidate.fix.cli import fix as command


def test_command_says_repairs_and_counts(tmp_path: Path) -> None:
    path = written(planted("no_quant_method"), tmp_path / "made")
    result = CliRunner().invoke(command, [str(path), str(tmp_path / "out")])

    assert result.exit_code == 0
    first, *counts = result.stdout.splitlines()
    assert first == (
        "config.json::$.quantization_config.quant_method: method-corrected: nothing -> "
        '"modelopt" (engines take the model for unquantized without it)'
    )
    assert "quant-method-missing (error): 1 before, 0 after" in counts
    assert result.stderr == f"{tmp_path / 'out'}: 1 repair\n"


def test_command_shows_ten_of_a_kind(tmp_path: Path) -> None:
    made = draft("llama", PC_PT)
    for tensors in made.shards.values():
        for name, (dtype, shape, data) in tensors.items():
            if name.endswith("weight_scale"):
                tensors[name] = (dtype, (*shape, 1), data)
    path = made.write(tmp_path / "made")
    result = CliRunner().invoke(command, [str(path), str(tmp_path / "out"), "--dry-run"])

    assert "... and 4 more of tensor-reshaped (-v shows them)" in result.stdout.splitlines()
    assert not (tmp_path / "out").exists()


def test_command_writes_json(tmp_path: Path) -> None:
    path = written(planted("missing_scale"), tmp_path / "made")
    result = CliRunner().invoke(command, [str(path), str(tmp_path / "out"), "--format", "json"])
    report = FixReport.parse(json.loads(result.stdout), file="stdout")

    assert result.exit_code == 1
    assert rules_of(report) == {"missing-tensor"}


def test_command_refuses_an_output_that_is_there(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    result = CliRunner().invoke(command, [str(path), str(tmp_path)])

    assert result.exit_code == 2
    assert "exists; nothing is overwritten" in result.stderr


def test_command_names_the_output_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(output, "_copy", fail)
    result = CliRunner().invoke(command, [str(path), str(tmp_path / "out")])

    assert result.exit_code == 2
    assert f"can't make {tmp_path / 'out'}: No space left on device" in result.stderr


def test_command_that_is_terminated_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(output, "_copy", lambda *_: signal.raise_signal(signal.SIGTERM))
    result = CliRunner().invoke(command, [str(path), str(tmp_path / "out")])

    assert result.exit_code == 1
    assert [file.name for file in tmp_path.iterdir()] == ["made"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_command_can_not_repair_what_is_not_there(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    max(path.glob("*.safetensors")).unlink()
    result = CliRunner().invoke(command, [str(path), str(tmp_path / "out")])

    assert result.exit_code == 2
    assert "index-missing-shard" in result.stderr
