"""Weights against the source's: what no rule can see is found by the tensor's name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qconvert.backends import resolve
from qconvert.convert import convert
from qconvert.planner import make_plan
from qschema.checkpoint import open_checkpoint
from qschema.formats import formats
from qschema.recipe import Recipe, Rule
from qvalidate import cli, weights
from qvalidate.loader import load
from qvalidate.weights import weight_findings

SOURCES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
MODELS = ("llama", "qwen3", "mixtral", "llama_odd", "llama_adv", "llama_block")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def converted(model: str, algo: str, out: Path) -> Path:
    checkpoint = open_checkpoint(SOURCES / model)
    convert(
        checkpoint,
        make_plan(checkpoint, Recipe(rules=[Rule(match="*", algo=algo)])),
        out,
        device=resolve("cpu", formats=[algo]),
        workers=2,
        budget=64 << 20,
        watch=lambda progress: None,
    )
    return out


def change(path: Path, tensor: str, edit: Callable[[np.ndarray], np.ndarray], dtype: str) -> None:
    """Rewrite one tensor's bytes in place."""
    stored = open_checkpoint(path).tensors[tensor]
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset)
        values = np.frombuffer(file.read(stored.nbytes), dtype)
        file.seek(stored.offset)
        file.write(edit(values).astype(dtype).tobytes())


def found(path: Path, reference: Path) -> list[tuple[str, str]]:
    return [(item.rule, item.where) for item in weight_findings(load(path), reference)]


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("model", MODELS)
def test_right_weights_give_no_finding(tmp_path: Path, model: str, algo: str) -> None:
    assert found(converted(model, algo, tmp_path / "out"), SOURCES / model) == []


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("has_native", [True, False], ids=["native", "torch"])
def test_scales_times_eight_name_the_projection(
    tmp_path: Path, algo: str, has_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted("llama", algo, tmp_path / "out")
    change(path, f"{Q_PROJ}.weight_scale", lambda scale: scale * 8, "<f4")
    monkeypatch.setenv("QKERNELS_NATIVE", "1" if has_native else "0")

    assert found(path, SOURCES / "llama") == [("weight-error", f"{Q_PROJ}.weight")]


@pytest.mark.parametrize(
    ("tensor", "edit", "dtype"),
    [
        ("weight_scale", lambda scale: 1 / scale, "<f4"),
        ("weight_scale", lambda scale: scale[::-1], "<f4"),
        ("weight_scale", lambda scale: scale * np.nan, "<f4"),
        ("weight", lambda codes: codes.reshape(256, 256).T.reshape(-1), "u1"),
        ("weight", lambda codes: codes ^ 0x80, "u1"),
        ("weight", np.zeros_like, "u1"),
    ],
    ids=["reciprocal", "reversed", "nan", "transposed", "negated", "zero"],
)
def test_wrong_numbers_name_the_tensor(
    tmp_path: Path, tensor: str, edit: Callable[[np.ndarray], np.ndarray], dtype: str
) -> None:
    path = converted("llama", "FP8_PER_CHANNEL_PER_TOKEN", tmp_path / "out")
    change(path, f"{Q_PROJ}.{tensor}", edit, dtype)

    assert found(path, SOURCES / "llama") == [("weight-error", f"{Q_PROJ}.weight")]


def test_small_slices_see_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    context = load(path)
    reference = open_checkpoint(SOURCES / "llama").tensors[f"{Q_PROJ}.weight"]
    outputs = context.modules[Q_PROJ].tensors
    assert context.declared is not None
    whole = weights.relative_error(reference, outputs, context.declared)
    monkeypatch.setattr(weights, "_SLICE_NBYTES", 1)

    assert weights.relative_error(reference, outputs, context.declared) == pytest.approx(whole)


def test_another_model_is_told_apart(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")

    rules = {rule for rule, _ in found(path, SOURCES / "qwen3")}

    assert rules == {"weight-error", "weight-reference-shape", "weight-not-in-reference"}


def test_a_reference_that_is_none_is_reported(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    (tmp_path / "empty").mkdir()

    assert found(path, tmp_path / "empty") == [("checkpoint-empty", "")]


def test_the_command_compares_weights_without_an_engine(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    command = [str(path), "--reference", str(SOURCES / "llama")]
    assert CliRunner().invoke(cli.main, command).exit_code == 0
    change(path, f"{Q_PROJ}.weight_scale", lambda scale: scale * 8, "<f4")

    result = CliRunner().invoke(cli.main, command)

    assert result.exit_code == 1
    assert f"::{Q_PROJ}.weight: weight-error: relative error 6.99" in result.stdout
