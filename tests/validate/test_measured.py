"""The numbers behind the pictures: errors of weights and how scales spread."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import PRODUCER, draft
from encoded import converted

from qschema.checkpoint import open_checkpoint
from qschema.formats import formats
from qschema.safetensors import Stored
from qvalidate import measured, pairs, weights
from qvalidate.context import Module
from qvalidate.group_errors import Deviation
from qvalidate.loader import load
from qvalidate.measured import LayerError, Measured, ScaleHistogram, kind_of, measure
from qvalidate.weights import compared, weight_findings

SOURCES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
Q_PROJ = "model.layers.0.self_attn.q_proj"
SCALE = f"{Q_PROJ}.weight_scale"
DTYPES = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(ml_dtypes.float8_e8m0fnu),
}


def values(stored: Stored) -> np.ndarray:
    """Return what a tensor holds, by another library's dtypes."""
    data = stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]
    return np.frombuffer(data, DTYPES[stored.dtype]).reshape(stored.shape)


def change(path: Path, tensor: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite one tensor in place."""
    stored = open_checkpoint(path).tensors[tensor]
    made = edit(values(stored)).astype(DTYPES[stored.dtype]).tobytes()
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset)
        file.write(made)


def errors(path: Path, reference: Path) -> dict[str, LayerError]:
    found = compared(load(path), reference)
    return {item.module: item for item in found if isinstance(item, LayerError)}


def histograms(path: Path) -> dict[str, ScaleHistogram]:
    return {histogram.kind: histogram for histogram in measure(load(path)).scales}


def test_error_of_a_weight_is_that_of_the_whole_matrix(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    tensors = open_checkpoint(path).tensors
    codes = values(tensors[f"{Q_PROJ}.weight"]).astype(np.float64)
    scale = values(tensors[SCALE]).astype(np.float64).reshape(2, 2)
    source = open_checkpoint(SOURCES / "llama").tensors[f"{Q_PROJ}.weight"]
    weight = values(source).astype(np.float64)
    off = weight - codes * np.kron(scale, np.ones((128, 128)))

    found = errors(path, SOURCES / "llama")[Q_PROJ]

    assert found.relative_error == pytest.approx(np.linalg.norm(off) / np.linalg.norm(weight))


@pytest.mark.parametrize("algo", ["FP8", "FP8_PB_WO", "NVFP4"])
def test_error_does_not_depend_on_how_much_is_decoded_at_a_time(
    tmp_path: Path, algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted("llama", algo, tmp_path / "out")
    whole = errors(path, SOURCES / "llama")[Q_PROJ]
    monkeypatch.setattr(pairs, "_SLICE_NBYTES", 1)

    small = errors(path, SOURCES / "llama")[Q_PROJ]

    assert small.relative_error == pytest.approx(whole.relative_error, rel=1e-12)
    assert small.expected == pytest.approx(whole.expected, rel=1e-12)


@pytest.mark.parametrize("algo", list(formats()))
def test_every_weight_has_an_error_within_what_its_format_explains(
    tmp_path: Path, algo: str
) -> None:
    path = converted("mixtral", algo, tmp_path / "out")
    found = errors(path, SOURCES / "mixtral")

    assert found.keys() == load(path).quantized.keys()
    for error in found.values():
        assert error.relative_error is not None
        assert error.expected is not None
        assert 0 < error.relative_error <= error.expected < 0.5


def test_error_of_wrong_scales_is_beyond_what_is_explained(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    change(path, SCALE, lambda scale: scale * 8)

    found = errors(path, SOURCES / "llama")[Q_PROJ]

    assert found.relative_error == pytest.approx(7, rel=0.01)
    assert found.expected is not None
    assert found.expected < 0.1


def test_error_that_is_no_number_is_null(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    change(path, SCALE, lambda scale: scale * np.nan)

    assert errors(path, SOURCES / "llama")[Q_PROJ].relative_error is None


@pytest.mark.parametrize("squares", [[1.0, 9.0, 4.0], [9.0, math.nan, 16.0], [math.inf, 1.0]])
def test_error_of_a_stack_is_that_of_its_worst_expert(squares: list[float]) -> None:
    module = Module("experts.up_proj", {}, is_stack=True)
    found = weights._layer_error(
        module, [Deviation(error_squares=s, norm_squares=1) for s in squares]
    )

    is_finite = all(map(math.isfinite, squares))
    assert found.relative_error == (3 if is_finite else None)


def test_findings_are_the_same_with_and_without_errors(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    change(path, SCALE, lambda scale: scale * 8)
    context = load(path)
    all_of_it = list(compared(context, SOURCES / "llama"))

    findings = [item for item in all_of_it if not isinstance(item, LayerError)]
    assert findings == list(weight_findings(context, SOURCES / "llama")) != []


@pytest.mark.parametrize("algo", ["FP8", "FP8_PB_WO", "NVFP4", "MXFP4", "W4A16_AWQ", "W8A16"])
def test_scales_are_counted_by_powers_of_two(tmp_path: Path, algo: str) -> None:
    """Against numpy's log2 over all tensors of a kind."""
    path = converted("llama", algo, tmp_path / "out")
    tensors = open_checkpoint(path).tensors

    found = histograms(path)["model.layers.*.self_attn.q_proj.weight_scale"]

    own = [values(tensors[f"model.layers.{n}.self_attn.q_proj.weight_scale"]) for n in (0, 1)]
    all_values = np.concatenate([part.reshape(-1) for part in own]).astype(np.float64)
    powers = np.floor(np.log2(all_values)).astype(int)
    assert (found.num_tensors, found.num_scales) == (2, len(powers))
    assert found.first_log2 == powers.min()
    assert found.counts == np.bincount(powers - powers.min()).tolist()


def test_kinds_and_roles_have_a_histogram_each(tmp_path: Path) -> None:
    found = histograms(converted("mixtral", "NVFP4", tmp_path / "out"))
    experts = "model.layers.*.block_sparse_moe.experts.*.w1"

    assert found[f"{experts}.weight_scale"].role == "scale"
    assert found[f"{experts}.weight_scale_2"].role == "global"
    assert found[f"{experts}.input_scale"].role == "input"
    assert found[f"{experts}.input_scale"].num_tensors == len(
        [name for name in load(tmp_path / "out").quantized if name.endswith(".w1")]
    )


def test_scales_of_the_cache_are_counted(tmp_path: Path) -> None:
    made = draft("llama", "FP8_PB_WO")
    made.quantize_cache("FP8")

    found = histograms(made.write(tmp_path / "made"))["model.layers.*.self_attn.k_proj.k_scale"]

    assert (found.role, found.first_log2, found.counts) == ("kv", -2, [2])


def test_what_has_no_logarithm_is_counted_apart(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    change(path, SCALE, lambda scale: np.array([[0, -0.5], [np.nan, np.inf]]).reshape(scale.shape))
    change(path, SCALE.replace("layers.0", "layers.1"), lambda scale: np.full_like(scale, 0.5))

    found = histograms(path)["model.layers.*.self_attn.q_proj.weight_scale"]

    assert (found.num_zero, found.num_negative, found.num_nonfinite) == (1, 1, 2)
    assert (found.first_log2, found.counts) == (-1, [5])


def test_large_checkpoints_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 KiB of scales in each of two tensors; 256 bytes of one of them are read."""
    path = converted("llama", "NVFP4", tmp_path / "out")
    whole = histograms(path)["model.layers.*.mlp.down_proj.weight_scale"]
    monkeypatch.setattr(measured, "_MOST_TENSORS", 1)
    monkeypatch.setattr(measured, "_BUDGET_NBYTES", 1)

    found = histograms(path)["model.layers.*.mlp.down_proj.weight_scale"]

    assert sum(found.counts) == 256 < sum(whole.counts)
    assert (found.num_scales, found.num_tensors) == (whole.num_scales, 2)
    assert found.first_log2 >= whole.first_log2


def test_a_sample_reaches_from_the_first_to_the_last_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen pieces of sixteen bytes; the outer two are zeros."""
    path = converted("llama", "NVFP4", tmp_path / "out")
    for layer in (0, 1):
        tensor = f"model.layers.{layer}.mlp.down_proj.weight_scale"
        outer = np.ones(6144)
        outer[[*range(16), *range(-16, 0)]] = 0
        change(path, tensor, lambda scale, outer=outer: scale * outer.reshape(scale.shape))
    monkeypatch.setattr(measured, "_BUDGET_NBYTES", 1)

    found = histograms(path)["model.layers.*.mlp.down_proj.weight_scale"]

    assert (found.num_zero, sum(found.counts)) == (2 * 32, 2 * 224)


def report_with(*entries: object) -> str:
    return json.dumps({"tool": PRODUCER, "tensors": entries})


def test_errors_of_a_conversion_stand_in_where_nothing_was_compared(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    outputs = [{"name": f"{Q_PROJ}.weight"}, {"name": SCALE}]
    entry = {"source": "stack", "relative_error": 0.025, "outputs": outputs}
    kept = {"source": "model.norm.weight", "relative_error": None, "outputs": []}
    whole = {"source": "lm_head.weight", "relative_error": 0.02, "outputs": []}
    (path / "qconvert_report.json").write_text(report_with(entry, kept, whole))

    found = measure(load(path))

    assert found.errors_from == "conversion-report"
    assert found.errors == [
        LayerError(module=Q_PROJ, relative_error=0.025),
        LayerError(module="lm_head", relative_error=0.02),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"tensors": 1}',
        report_with(1, {"source": 2, "relative_error": 0.1}),
        report_with({"source": "a", "relative_error": True, "outputs": {}}),
        report_with({"source": "a", "relative_error": -1, "outputs": [3]}),
    ],
)
def test_a_report_that_is_none_has_no_errors(tmp_path: Path, text: str) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    (path / "qconvert_report.json").write_text(text)

    found = measure(load(path))

    assert (found.errors_from, found.errors) == (None, [])


def test_a_report_too_large_for_a_picture_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    text = report_with({"source": "a.weight", "relative_error": 0.1, "outputs": []})
    (path / "qconvert_report.json").write_text(text)
    assert measure(load(path)).errors != []
    monkeypatch.setattr(measured, "_MOST_REPORT_NBYTES", len(text) - 1)

    assert measure(load(path)).errors == []


def test_what_was_compared_goes_before_a_report(tmp_path: Path) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "out")
    (path / "qconvert_report.json").write_text(
        report_with({"source": "a.weight", "relative_error": 0.1, "outputs": []})
    )
    own = [LayerError(module="b", relative_error=0.2)]

    found = measure(load(path), own)

    assert (found.errors_from, found.errors) == ("reference", own)


def test_a_document_comes_back_as_it_was(tmp_path: Path) -> None:
    path = converted("llama", "NVFP4", tmp_path / "out")
    context = load(path)
    own = [item for item in compared(context, SOURCES / "llama") if isinstance(item, LayerError)]
    document = measure(context, own)

    assert Measured.parse(json.loads(document.model_dump_json()), file="-") == document


def test_numbers_in_names_are_wildcards() -> None:
    assert kind_of("model.layers.10.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert kind_of("lm_head") == "lm_head"


def test_histograms_need_no_numpy(tmp_path: Path) -> None:
    path = converted("llama", "NVFP4", tmp_path / "out")
    script = (
        "import sys; from pathlib import Path\n"
        "from qvalidate.loader import load; from qvalidate.measured import measure\n"
        f"assert measure(load(Path({str(path)!r}))).scales\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.stdout == "[]\n", done.stderr
