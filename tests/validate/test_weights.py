"""Weights against the source's: what no rule can see is found by the tensor's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Tensor, write_safetensors
from click.testing import CliRunner

from qconvert.backends import resolve
from qconvert.convert import convert
from qconvert.planner import make_plan
from qschema.checkpoint import open_checkpoint
from qschema.formats import formats
from qschema.recipe import Recipe, Rule
from qvalidate import cli, group_errors, weights
from qvalidate.group_errors import deviation
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
    strict = context.declared.model_copy(update={"error_bound": 0.01})
    whole = deviation(reference, outputs, strict)
    monkeypatch.setattr(group_errors, "_SLICE_NBYTES", 1)
    monkeypatch.setattr(group_errors, "_CHUNK_ELEMENTS", 1)

    assert whole.num_beyond == whole.num_groups == 4
    assert deviation(reference, outputs, strict) == whole


def test_another_model_is_told_apart(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")

    rules = {rule for rule, _ in found(path, SOURCES / "qwen3")}

    assert rules == {
        "kept-tensor-differs",
        "tensor-missing",
        "weight-error",
        "weight-not-in-reference",
        "weight-reference-shape",
    }


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
    assert f"::{Q_PROJ}.weight: weight-error: relative error 7.0" in result.stdout
    assert "in rows 0 to 127, columns 128 to 255, the worst of 4 scale groups" in result.stdout


Rewrite = Callable[[dict[str, Tensor]], None]


def rewrite(path: Path, edit: Rewrite) -> Path:
    """Write all tensors of `path` anew as one file, after `edit`; returns `path`."""
    opened = open_checkpoint(path)
    tensors: dict[str, Tensor] = {}
    for name, stored in opened.tensors.items():
        data = stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]
        tensors[name] = (stored.dtype, stored.shape, data)
    for shard in opened.shards:
        shard.file.unlink()
    if opened.index:
        (path / opened.index).unlink()
    edit(tensors)
    write_safetensors(path / "model.safetensors", tensors)
    return path


def dropping(*starts: str) -> Rewrite:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(starts)]:
            del tensors[name]

    return edit


@pytest.mark.parametrize(
    "module",
    [
        "model.embed_tokens",
        "model.layers.0.input_layernorm",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    ],
)
def test_a_module_that_is_missing_as_a_whole_is_named(tmp_path: Path, module: str) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    rewrite(path, dropping(f"{module}."))

    assert found(path, SOURCES / "llama") == [("tensor-missing", f"{module}.weight")]


@pytest.mark.parametrize(("is_tied", "missing"), [(True, []), (False, ["lm_head.weight"])])
def test_a_tied_head_needs_no_tensor(tmp_path: Path, is_tied: bool, missing: list[str]) -> None:
    path = converted("qwen3", "FP8_PB_WO", tmp_path / "out")
    shutil.copytree(SOURCES / "qwen3", tmp_path / "source")
    rewrite(
        tmp_path / "source",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": is_tied}))

    assert [where for _, where in found(path, tmp_path / "source")] == missing


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("slice_nbytes", [7, 1 << 20])
def test_kept_tensors_are_compared_byte_for_byte(
    tmp_path: Path, slice_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of the first and of the last element of a norm of 256."""
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    flips = np.zeros(256, "<u2")
    flips[[0, -1]] = 0x8000
    change(path, NORM, lambda values: values ^ flips, "<u2")
    monkeypatch.setattr(weights, "_SLICE_NBYTES", slice_nbytes)

    (finding,) = weight_findings(load(path), SOURCES / "llama")

    assert (finding.rule, finding.where) == ("kept-tensor-differs", NORM)
    assert finding.severity == "error"
    assert finding.message.startswith(f"2 of 512 bytes are not those in {SOURCES / 'llama'}")


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [("F32", (256,), "is F32 [256], in "), ("BF16", (1, 256), "is BF16 [1, 256], in ")],
)
def test_kept_tensors_keep_dtype_and_shape(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], message: str
) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    data = bytes(1024 if dtype == "F32" else 512)
    rewrite(path, lambda tensors: tensors.update({NORM: (dtype, shape, data)}))

    (finding,) = weight_findings(load(path), SOURCES / "llama")

    assert (finding.rule, finding.where) == ("kept-tensor-differs", NORM)
    assert finding.message.startswith(message)
    assert "it is BF16 [256]" in finding.message


def test_a_reference_with_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    shutil.copytree(SOURCES / "llama", tmp_path / "other")

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"other.{name}"] = tensors.pop(name)

    rewrite(tmp_path / "other", rename)
    findings = list(weight_findings(load(path), tmp_path / "other"))
    result = CliRunner().invoke(cli.main, [str(path), "--reference", str(tmp_path / "other")])

    assert {item.rule for item in findings} == {"tensor-missing", "weight-not-in-reference"}
    assert {item.severity for item in findings} == {"error"}
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("algo", "where"),
    [
        ("FP8_PER_CHANNEL_PER_TOKEN", "rows 3 to 3, columns 0 to 255, the worst of 1 scale groups"),
        ("FP8_PB_WO", "rows 128 to 255, columns 128 to 255, the worst of 1 scale groups"),
    ],
)
def test_one_scale_that_is_half_too_large_is_found(tmp_path: Path, algo: str, where: str) -> None:
    path = converted("llama", algo, tmp_path / "out")
    factors = np.ones(256 if algo == "FP8_PER_CHANNEL_PER_TOKEN" else 4)
    factors[3] = 1.5
    change(path, f"{Q_PROJ}.weight_scale", lambda scale: scale * factors, "<f4")

    (finding,) = weight_findings(load(path), SOURCES / "llama")

    assert finding.rule == "weight-error"
    assert where in finding.message


def test_what_is_not_finite_is_a_warning(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    shutil.copytree(SOURCES / "llama", tmp_path / "source")
    change(tmp_path / "source", f"{Q_PROJ}.weight", lambda w: np.where(w % 9, w, 0x7F80), "<u2")

    (finding,) = weight_findings(load(path), tmp_path / "source")

    assert (finding.rule, finding.severity) == ("weight-nonfinite", "warning")
    assert finding.where == f"{Q_PROJ}.weight"


@pytest.mark.parametrize(("module", "extra"), [("torch", "convert"), ("numpy", "validate")])
def test_a_missing_module_names_its_extra(
    tmp_path: Path, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli, "validate", fail)
    result = CliRunner().invoke(cli.main, [str(tmp_path), "--reference", str(tmp_path)])

    assert result.exit_code == 2
    assert f"needs {module}: pip install 'qconvert[{extra}]'" in result.stderr
