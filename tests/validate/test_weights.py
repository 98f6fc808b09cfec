"""Weights against the source's: what no rule can see is found by the tensor's name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import MIXED, Tensor, write_safetensors
from click.testing import CliRunner
from encoded import converted

from qschema.checkpoint import open_checkpoint
from qschema.formats import Format, formats
from qvalidate import cli, cli_check, pairs, weights
from qvalidate.group_errors import deviation
from qvalidate.loader import load
from qvalidate.pairs import Pair
from qvalidate.weights import weight_findings

SOURCES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
MODELS = ("llama", "qwen3", "mixtral", "llama_odd", "llama_adv", "llama_block")
Q_PROJ = "model.layers.0.self_attn.q_proj"


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


@pytest.mark.parametrize("algo", [*formats(), MIXED])
@pytest.mark.parametrize("model", MODELS)
def test_right_weights_give_no_finding(tmp_path: Path, model: str, algo: str) -> None:
    assert found(converted(model, algo, tmp_path / "out"), SOURCES / model) == []


def enlarge(path: Path, declared: Format) -> None:
    """Make every scale of q_proj eight times as large."""
    names = [spec for spec in declared.tensors if spec.role in ("scale", "global")]
    # the first f32 one multiplies the codes; exponents of two are bytes
    spec = next((spec for spec in names if spec.dtype == "F32"), names[0])
    if spec.dtype == "F32":
        change(path, f"{Q_PROJ}.{spec.suffix}", lambda scale: scale * 8, "<f4")
    else:
        change(path, f"{Q_PROJ}.{spec.suffix}", lambda exponent: exponent + 3, "u1")


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("has_native", [True, False], ids=["native", "torch"])
def test_scales_times_eight_name_the_projection(
    tmp_path: Path, algo: str, has_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted("llama", algo, tmp_path / "out")
    enlarge(path, formats()[algo])
    monkeypatch.setenv("QKERNELS_NATIVE", "1" if has_native else "0")

    assert found(path, SOURCES / "llama") == [("weight-error", f"{Q_PROJ}.weight")]


@pytest.mark.parametrize("algo", list(formats()))
def test_codes_of_the_transpose_are_found(tmp_path: Path, algo: str) -> None:
    path = converted("llama", algo, tmp_path / "out")
    change(path, f"{Q_PROJ}.weight", lambda codes: codes.reshape(-1, 128).T.reshape(-1), "u1")

    assert found(path, SOURCES / "llama") == [("weight-error", f"{Q_PROJ}.weight")]


@pytest.mark.parametrize(
    "algo", ["NVFP4", "W4A16_NVFP4", "MXFP4", "W4A8_NVFP4_FP8", "W4A16_AWQ", "W4A8_AWQ"]
)
def test_swapped_nibbles_are_found(tmp_path: Path, algo: str) -> None:
    path = converted("llama", algo, tmp_path / "out")
    change(path, f"{Q_PROJ}.weight", lambda codes: codes >> 4 | codes << 4, "u1")

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


@pytest.mark.parametrize("algo", ["FP8", "FP8_PB_WO", "NVFP4", "W4A16_AWQ", "W8A16"])
def test_small_slices_see_the_same(
    tmp_path: Path, algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted("llama", algo, tmp_path / "out")
    enlarge(path, formats()[algo])
    reference = open_checkpoint(SOURCES / "llama").tensors[f"{Q_PROJ}.weight"]
    pair = Pair(reference, load(path).modules[Q_PROJ].tensors, formats()[algo])
    whole = deviation(pair)
    monkeypatch.setattr(pairs, "_SLICE_NBYTES", 1)
    monkeypatch.setattr(pairs, "_CHUNK_ELEMENTS", 1)

    assert whole.num_beyond == whole.num_groups > 0
    small = deviation(pair)
    # sums of squares in another order
    assert small.error == pytest.approx(whole.error, rel=1e-12)
    assert replace(small, error=whole.error) == whole


def test_another_model_is_told_apart(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")

    rules = {rule for rule, _ in found(path, SOURCES / "qwen3")}

    assert rules == {
        "config-differs",
        "kept-tensor-differs",
        "side-file-differs",
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


def reported(path: Path, text: str) -> Path:
    """Leave a converter's report in `path`; returns `path`."""
    (path / "qconvert_report.json").write_text(text)
    return path


def without(tensors: dict[str, Tensor]) -> None:
    for leaf in ("input_layernorm", "post_attention_layernorm"):
        del tensors[f"model.layers.1.{leaf}.weight"]


def test_what_was_dropped_is_a_note(tmp_path: Path) -> None:
    path = rewrite(converted("llama", "FP8_PB_WO", tmp_path / "out"), without)
    names = [f"model.layers.1.{leaf}_layernorm.weight" for leaf in ("input", "post_attention")]
    entries = [{"source": name, "action": "drop"} for name in names]
    entries.append({"source": "model.norm.weight", "action": "keep"})

    reported(path, json.dumps({"tensors": entries}))

    (finding,) = weight_findings(load(path), SOURCES / "llama")
    assert (finding.rule, finding.severity) == ("tensor-dropped", "note")
    assert finding.file == str(path / "qconvert_report.json")
    assert all(name in finding.message for name in names)

    reported(path, json.dumps({"tensors": entries[1:]}))
    assert sorted(found(path, SOURCES / "llama")) == [
        ("tensor-dropped", "$.tensors"),
        ("tensor-missing", names[0]),
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"tensors": {}}', '{"tensors": [1, {"action": "drop", "source": 2}]}'],
)
def test_a_report_that_is_none_excuses_nothing(tmp_path: Path, text: str) -> None:
    path = reported(rewrite(converted("llama", "FP8_PB_WO", tmp_path / "out"), without), text)

    assert {rule for rule, _ in found(path, SOURCES / "llama")} == {"tensor-missing"}


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

    findings = found(path, tmp_path / "source")
    assert [where for rule, where in findings if rule == "tensor-missing"] == missing


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
        ("FP8_PB_WO", "rows 0 to 127, columns 128 to 255, the worst of 1 scale groups (of 4)"),
        ("W8A16", "rows 3 to 3, columns 0 to 255, the worst of 1 scale groups (of 256)"),
        ("W4A16_AWQ", "rows 1 to 1, columns 128 to 255, the worst of 1 scale groups (of 512)"),
    ],
)
def test_one_scale_that_is_half_too_large_is_found(tmp_path: Path, algo: str, where: str) -> None:
    path = converted("llama", algo, tmp_path / "out")
    at = 1 if algo == "FP8_PB_WO" else 3
    change(
        path,
        f"{Q_PROJ}.weight_scale",
        lambda scale: np.where(np.arange(scale.size) == at, scale * 1.5, scale),
        "<f4",
    )

    (finding,) = weight_findings(load(path), SOURCES / "llama")

    assert finding.rule == "weight-error"
    assert where in finding.message


@pytest.mark.parametrize(
    ("algo", "step", "columns"),
    [
        # E4M3: four codes are half a power of two; E8M0: one is a whole one
        ("NVFP4", 4, "columns 48 to 63, the worst of 1 scale groups (of 4096)"),
        ("NVFP4_AWQ", 4, "columns 48 to 63, the worst of 1 scale groups (of 4096)"),
        ("W4A8_NVFP4_FP8", 4, "columns 96 to 127, the worst of 1 scale groups (of 2048)"),
        ("MXFP8", 1, "columns 96 to 127, the worst of 1 scale groups (of 2048)"),
        ("MXFP4", 1, "columns 96 to 127, the worst of 1 scale groups (of 2048)"),
    ],
)
def test_one_scale_of_a_byte_that_is_too_large_is_found(
    tmp_path: Path, algo: str, step: int, columns: str
) -> None:
    path = converted("llama", algo, tmp_path / "out")
    change(
        path,
        f"{Q_PROJ}.weight_scale",
        lambda codes: np.where(np.arange(codes.size) == 3, codes + step, codes),
        "u1",
    )

    (finding,) = weight_findings(load(path), SOURCES / "llama")

    assert (finding.rule, finding.where) == ("weight-error", f"{Q_PROJ}.weight")
    assert f"in rows 0 to 0, {columns}" in finding.message


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

    monkeypatch.setattr(cli_check, "validate", fail)
    result = CliRunner().invoke(cli.main, [str(tmp_path), "--reference", str(tmp_path)])

    assert result.exit_code == 2
    assert f"needs {module}: pip install 'qconvert[{extra}]'" in result.stderr
