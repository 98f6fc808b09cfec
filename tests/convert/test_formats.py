"""Every format on every fixture: the reference's bytes, whatever the workers, budget, backend."""

import json
import math
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from qconvert.backends import Device, resolve
from qconvert.backends.torch_cpu import TorchBackend
from qkernels import kernels_for
from qschema.formats import find
from qschema.report import Report, TensorReport

from .conversion import (
    CHECKPOINTS,
    MODELS,
    WRITABLE,
    Make,
    Tensors,
    amax_of,
    digests,
    randn,
    raw,
    run,
    tensors,
    wide,
)

# llama_odd has 192 and 208 columns: no multiples of 32 or of 128
TOO_ODD = {"MXFP4", "MXFP8", "W4A16_AWQ", "W4A8_AWQ", "W4A8_MXFP4_FP8", "W4A8_NVFP4_FP8"}
CASES = [
    (model, algo)
    for model in MODELS
    for algo in WRITABLE
    if model != "llama_odd" or algo not in TOO_ODD
]
# what weights share a scale of the whole weight, and over which number their largest is divided
ALL_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
OF_AN_EXPERT = (("w1", "w3"),)
GLOBAL = {
    "FP8": ("weight_scale", 448.0, OF_AN_EXPERT),
    "NVFP4": ("weight_scale_2", 2688.0, ALL_FUSED),
    "NVFP4_AWQ": ("weight_scale_2", 2688.0, ALL_FUSED),
    "W4A16_NVFP4": ("weight_scale_2", 2688.0, ALL_FUSED),
    "W4A8_AWQ": ("weight_scale_2", 448.0, ALL_FUSED),
    "W4A8_NVFP4_FP8": ("weight_scale_2", 448.0, ALL_FUSED),
}
# the number under the largest input, which weights share it beside the experts of a layer
INPUT = {
    "FP8": (448.0, OF_AN_EXPERT),
    "NVFP4": (2688.0, ALL_FUSED),
    "NVFP4_AWQ": (2688.0, ALL_FUSED),
    "W4A8_AWQ": (448.0, ALL_FUSED),
    "W4A8_NVFP4_FP8": (448.0, ALL_FUSED),
    "W8A8_SQ_PER_CHANNEL": (127.0, ALL_FUSED),
}
# lowest and highest relative error of normal numbers: of 3 mantissa bits about 2.6 %, of 8 bits
# below the row's largest about 1 %, of 1 mantissa bit or 4 bits about 10 %
PLAUSIBLE = {
    "E4M3": (0.02, 0.03),
    "INT8": (0.005, 0.015),
    "E2M1": (0.07, 0.13),
    "INT4": (0.08, 0.15),
}


def group(name: str, groups: tuple[tuple[str, ...], ...], source: Tensors) -> list[str]:
    """Return the weights of `source` that agree with the weight `name`, itself too."""
    for leaves in groups:
        for leaf in leaves:
            if name.endswith(f".{leaf}.weight"):
                stem = name.removesuffix(f"{leaf}.weight")
                return [f"{stem}{other}.weight" for other in leaves]
    return [name]


def all_experts(name: str, source: Tensors) -> list[str]:
    """Return the weights of the same projection of all experts of a layer, or `name` alone."""
    head, _, tail = name.partition(".experts.")
    leaf = tail.partition(".")[2]
    return [
        other
        for other in source
        if other == name or (tail and other.startswith(f"{head}.experts.") and other.endswith(leaf))
    ]


def f32(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float32)


def expected(name: str, algo: str, source: Tensors) -> Tensors:
    """Return what the weight `name` becomes, by the reference and plain torch."""
    declared, weight = find(algo), source[name]
    kernels = kernels_for(declared.codec)
    suffix, divisor, groups = GLOBAL.get(algo, ("", 1.0, ()))
    scale = None
    if suffix:
        amax = max(source[other].abs().max().float() for other in group(name, groups, source))
        tiny = f32(torch.finfo(weight.dtype).tiny)
        scale = torch.maximum(amax, tiny) / f32(divisor) if amax else f32(1.0)
    found = kernels.quantize_torch(
        weight, global_scale=scale if kernels.global_scale is not None else None
    )
    if scale is not None:
        found[suffix] = scale
    if algo in INPUT:
        divisor, groups = INPUT[algo]
        names = [a for b in group(name, groups, source) for a in all_experts(b, source)]
        amax = f32(max(amax_of(other.removesuffix(".weight")) for other in names))
        found["input_scale"] = amax / f32(divisor)
    module = name.removesuffix("weight")
    return {module + suffix: tensor for suffix, tensor in found.items()}


@pytest.mark.parametrize(("model", "algo"), CASES)
def test_weights_equal_the_reference_and_the_rest_is_untouched(
    tmp_path: Path, model: str, algo: str
) -> None:
    run(CHECKPOINTS / model, tmp_path / "out", algo=algo)

    before, after = tensors(CHECKPOINTS / model), tensors(tmp_path / "out")
    report = Report.parse(
        json.loads((tmp_path / "out" / "qconvert_report.json").read_text()), file="report"
    )
    assert sorted(entry.source for entry in report.tensors) == sorted(before)
    for entry in report.tensors:
        kept = {entry.source: before[entry.source]}
        wanted = expected(entry.source, algo, before) if entry.algo else kept
        assert [written.name for written in entry.outputs] == list(wanted)
        for written in entry.outputs:
            assert after[written.name].dtype == wanted[written.name].dtype
            assert list(after[written.name].shape) == list(wanted[written.name].shape)
            data = raw(after[written.name])
            assert data == raw(wanted[written.name]), written.name
            assert written.digest == f"blake3:{blake3(data).hexdigest()}"
    assert sorted(after) == sorted(out.name for entry in report.tensors for out in entry.outputs)


@pytest.mark.parametrize(("model", "algo"), CASES)
def test_bytes_do_not_depend_on_budget_workers_or_backend(
    tmp_path: Path, model: str, algo: str
) -> None:
    source = CHECKPOINTS / model
    run(source, tmp_path / "a", algo=algo, workers=1, budget=4 << 30)
    # small enough to cut the larger weights into slices
    run(source, tmp_path / "b", algo=algo, workers=4, budget=4 * 280_000)
    run(source, tmp_path / "d", algo=algo, workers=2, budget=1 << 20)
    run(source, tmp_path / "e", algo=algo, workers=4, budget=64 << 20)
    found = digests(tmp_path / "a")

    for other in ("b", "d", "e"):
        assert digests(tmp_path / other) == found
    if model in ("llama_adv", "mixtral"):
        torch_only = Device("cpu (torch)", 1, lambda slot: TorchBackend())
        run(source, tmp_path / "c", algo=algo, workers=2, budget=1 << 20, device=torch_only)
        assert digests(tmp_path / "c") == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("algo", WRITABLE)
def test_bytes_do_not_depend_on_the_backend(
    tmp_path: Path,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    algo: str,
    dtype: torch.dtype,
) -> None:
    """Several slices each, ragged where the format takes it; damage too is encoded alike."""
    declared = find(algo)
    weights = wide(columns=700 if declared.multiple_of_k == 1 else 768, dtype=dtype)
    weights["model.layers.0.mlp.down_proj.weight"] = damaged = randn(256, 256, seed=1, dtype=dtype)
    damaged[7, 30:33] = torch.tensor([math.nan, math.inf, -math.inf])
    damaged[200, :128] = math.nan
    source = make(weights)
    assert resolve("cpu", codecs=[declared.codec]).name == "cpu (native)"
    run(source, tmp_path / "native", algo=algo, budget=2 << 20, allow_nonfinite=True)
    monkeypatch.setenv("QKERNELS_NATIVE", "0")
    assert resolve("cpu", codecs=[declared.codec]).name == "cpu (torch)"
    run(source, tmp_path / "torch", algo=algo, budget=4 << 20, allow_nonfinite=True)

    assert digests(tmp_path / "native") == digests(tmp_path / "torch")


def restored(after: Tensors, module: str, algo: str) -> torch.Tensor:
    """Return a weight as an engine would decode it, f32."""
    kernels = kernels_for(find(algo).codec)
    suffixes = [spec.suffix for spec in find(algo).specs("codes", "scale")]
    if kernels.global_scale is not None:
        suffixes.append(kernels.global_scale.suffix)
    stored = {suffix: after[f"{module}.{suffix}"] for suffix in suffixes}
    return kernels.dequantize_torch(stored, dtype=torch.float32)


def check_error(entry: TensorReport, weight: torch.Tensor, decoded: torch.Tensor) -> None:
    """Check the reported error of one weight against f64 norms, and its size."""
    error = ((decoded.double() - weight.double()).norm() / weight.double().norm()).item()
    assert entry.algo is not None
    assert entry.relative_error is not None
    assert math.isclose(entry.relative_error, error, rel_tol=1e-5)
    assert entry.sqnr is not None
    # two decimals
    assert math.isclose(entry.sqnr, -20 * math.log10(error), abs_tol=0.00501)
    low, high = PLAUSIBLE[find(entry.algo).element]
    assert low < entry.relative_error < high
    assert (entry.num_saturated, entry.num_nonfinite) == (0, 0)


@pytest.mark.parametrize("algo", WRITABLE)
def test_the_reported_error_is_that_of_the_dequantized_weight(
    tmp_path: Path, make: Make, algo: str
) -> None:
    columns = 700 if find(algo).multiple_of_k == 1 else 768

    report = run(make(wide(columns=columns)), tmp_path / "out", algo=algo)

    module = "model.layers.0.mlp.up_proj"
    (entry,) = (entry for entry in report.tensors if entry.algo)
    decoded = restored(tensors(tmp_path / "out"), module, algo)
    check_error(entry, wide(columns=columns)[f"{module}.weight"], decoded)


@pytest.mark.parametrize("algo", list(GLOBAL))
def test_the_error_is_that_under_the_shared_scale(tmp_path: Path, make: Make, algo: str) -> None:
    """Of a unit of two weights, cut into slices: each has statistics of its own."""
    stem = "model.layers.0.mlp.experts.0."
    source = {
        f"{stem}{leaf}.weight": randn(512, 512, seed=seed) * factor
        for seed, (leaf, factor) in enumerate({"gate_proj": 1, "up_proj": 2}.items())
    }

    report = run(make(source), tmp_path / "out", algo=algo, workers=1, budget=100 << 10)

    after = tensors(tmp_path / "out")
    for entry in report.tensors:
        decoded = restored(after, entry.source.removesuffix(".weight"), algo)
        check_error(entry, source[entry.source], decoded)


@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_NVFP4"])
def test_what_the_smallest_block_scale_clips_is_counted(
    tmp_path: Path, make: Make, algo: str
) -> None:
    """weight_scale_2 is 1; a block of 8.4 * 2^-9 wants the scale 1.4 * 2^-9 and gets 2^-9."""
    weight = torch.zeros(4, 32)
    weight[0, 0] = 2688.0
    weight[2, 16:] = 8.4 * 2.0**-9
    weight[3, 3] = 6.9 * 2.0**-9

    (entry,) = run(
        make({"model.layers.0.mlp.up_proj.weight": weight}), tmp_path / "out", algo=algo
    ).tensors

    # 6.9 is clipped to 6, but nearer to it than to a code above, if there were one
    assert entry.num_saturated == 16
