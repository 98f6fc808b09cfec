"""AWQ and SmoothQuant: every smoothed byte again in numpy and ml_dtypes, and what takes it in."""

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from qconvert.decide import Decision, decide
from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qconvert.smoothing import plan_smoothing
from qconvert.statistics import Statistics
from qkernels import kernels_for
from qschema.checkpoint import open_checkpoint
from qschema.formats import find
from qschema.plan import Plan

from .conversion import Make, Tensors, amax_of, digests, measured, randn, raw, recipe, run, tensors

F32 = npt.NDArray[np.float32]
LAYER = "model.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{leaf}_proj" for leaf in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
LINEARS = (Q, K, V, OUT, GATE, UP, DOWN)
NORMS = {f"{LAYER}.input_layernorm": (Q, K, V), f"{LAYER}.post_attention_layernorm": (GATE, UP)}
# format -> whether a norm, whether a linear takes the smoothing in
FOLDS = {
    "NVFP4_AWQ": (True, True),
    "W4A16_AWQ": (True, False),
    "W4A8_AWQ": (True, False),
    "W8A8_SQ_PER_CHANNEL": (False, False),
}
H, WIDE = 128, 256


def bf16(x: F32) -> F32:
    """Return x rounded to bf16, nearest even, by ml_dtypes."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def array(tensor: torch.Tensor) -> F32:
    return np.asarray(tensor.float().numpy())


def scales(*modules: str, source: Tensors) -> Tensors:
    """Return pre_quant_scales, f32 numbers that are no bf16 numbers."""
    return {
        f"{module}.pre_quant_scale": randn(
            source[f"{module}.weight"].shape[1], seed=100 + place, dtype=torch.float32
        ).abs()
        + 0.1
        for place, module in enumerate(modules)
    }


def model(*, kv_rows: int = H, leave: tuple[str, ...] = (), biases: bool = False) -> Tensors:
    """Return one layer of a Llama; under grouped-query attention k and v have fewer rows."""
    shapes = {Q: (H, H), K: (kv_rows, H), V: (kv_rows, H), OUT: (H, H)}
    shapes |= {GATE: (WIDE, H), UP: (WIDE, H), DOWN: (H, WIDE)}
    found = {
        f"{name}.weight": randn(*shape, seed=place)
        for place, (name, shape) in enumerate(shapes.items())
        if name not in leave
    }
    found |= {f"{name}.weight": 1 + randn(H, seed=50) / 8 for name in NORMS}
    if biases:
        found |= {
            f"{name}.bias": randn(shape[0], seed=70 + place)
            for place, (name, shape) in enumerate(shapes.items())
        }
    return found


def smooth(
    source: Tensors, vectors: Tensors, *, algo: str, grouped: bool
) -> tuple[Tensors, Tensors]:
    """Return what smoothing makes of the source, and the pre_quant_scales that are written."""
    into_norm, into_linear = FOLDS[algo]
    p = {name.removesuffix(".pre_quant_scale"): array(t) for name, t in vectors.items()}
    weight = {m: bf16(array(source[f"{m}.weight"]) * (np.float32(1) / p[m])) for m in p}
    other = {n: array(t) for n, t in source.items() if n.removesuffix(".weight") not in p}
    written = {module: bf16(scale) for module, scale in p.items()}
    for later, earlier in ((OUT, V), (DOWN, UP)):
        if into_linear and not (grouped and later == OUT):
            weight[earlier] = bf16(weight[earlier] * written[later][:, None])
            if f"{earlier}.bias" in other:
                other[f"{earlier}.bias"] = bf16(other[f"{earlier}.bias"] * written[later])
            del written[later]
    for norm, readers in NORMS.items():
        total = bf16(p[readers[0]])
        for reader in readers[1:]:
            total = total + bf16(p[reader])
        mean = bf16(total / np.float32(len(readers)))
        for reader in readers:
            weight[reader] = bf16(weight[reader] * bf16(p[reader]) / mean)
            written[reader] = mean
            if into_norm:
                del written[reader]
        if into_norm:
            other[f"{norm}.weight"] = bf16(other[f"{norm}.weight"] * mean)
    smoothed = {f"{module}.weight": found for module, found in weight.items()} | other
    as_bf16 = {name: torch.tensor(found).bfloat16() for name, found in smoothed.items()}
    return as_bf16, {
        f"{module}.pre_quant_scale": torch.tensor(found).bfloat16()
        for module, found in written.items()
    }


def stats(folder: Path, vectors: Tensors) -> Statistics:
    return measured(folder, inputs={name: amax_of(name) for name in LINEARS}, vectors=vectors)


@pytest.mark.parametrize("grouped", [False, True], ids=["mha", "gqa"])
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("algo", list(FOLDS))
def test_every_byte_is_that_of_the_smoothed_model(
    tmp_path: Path, make: Make, algo: str, grouped: bool, biases: bool
) -> None:
    """Smooth in numpy, then convert without smoothing: the same, and what is written beside it."""
    source = model(kv_rows=H // 2 if grouped else H, biases=biases)
    vectors = scales(*LINEARS, source=source)
    smoothed, written = smooth(source, vectors, algo=algo, grouped=grouped)

    run(make(source), tmp_path / "out", algo=algo, statistics=stats(tmp_path, vectors))
    run(
        make(smoothed, name="smoothed-in"),
        tmp_path / "smoothed",
        algo=algo,
        statistics=measured(tmp_path, inputs={name: amax_of(name) for name in LINEARS}),
    )

    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "smoothed") | written
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert raw(tensor) == raw(expected[name]), name


@pytest.mark.parametrize("algo", list(FOLDS))
def test_bytes_do_not_depend_on_budget_workers_or_backend(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, algo: str
) -> None:
    """Vectors along the rows are cut with the slices."""
    source = make(model(biases=True))
    statistics = stats(tmp_path, scales(*LINEARS, source=model()))
    run(source, tmp_path / "a", algo=algo, statistics=statistics, workers=1)
    run(source, tmp_path / "b", algo=algo, statistics=statistics, workers=3, budget=192 << 10)
    monkeypatch.setenv("QKERNELS_NATIVE", "0")
    run(source, tmp_path / "c", algo=algo, statistics=statistics, workers=2, budget=150 << 10)

    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")


def written(tmp_path: Path, path: Path, algo: str, vectors: Tensors, **fields: object) -> set[str]:
    """Return the modules that get a pre_quant_scale, and the tensors that take one in."""
    report = run(path, tmp_path / "out", algo=algo, statistics=stats(tmp_path, vectors), **fields)
    folded = {entry.source for entry in report.tensors if entry.action == "fold"}
    for entry in report.tensors:
        assert ("takes in the smoothing of" in entry.reason) == (entry.source in folded)
    suffix = ".pre_quant_scale"
    names = {n.removesuffix(suffix) for n in tensors(tmp_path / "out") if n.endswith(suffix)}
    return names | folded


NORM_TENSORS = {f"{name}.weight" for name in NORMS}


@pytest.mark.parametrize(
    ("algo", "wanted"),
    [
        ("NVFP4_AWQ", NORM_TENSORS),
        ("W4A16_AWQ", {OUT, DOWN, *NORM_TENSORS}),
        ("W4A8_AWQ", {OUT, DOWN, *NORM_TENSORS}),
        ("W8A8_SQ_PER_CHANNEL", set(LINEARS)),
    ],
)
def test_what_takes_in_the_smoothing_of_what(
    tmp_path: Path, make: Make, algo: str, wanted: set[str]
) -> None:
    vectors = scales(*LINEARS, source=model())

    assert written(tmp_path, make(model()), algo, vectors) == wanted


def test_grouped_query_attention_keeps_that_of_the_output(tmp_path: Path, make: Make) -> None:
    """Each row of v feeds two columns of o."""
    source = model(kv_rows=H // 2)
    vectors = scales(*LINEARS, source=source)

    assert written(tmp_path, make(source), "NVFP4_AWQ", vectors) == {OUT, *NORM_TENSORS}


@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3", "brandnew"])
def test_other_models_keep_all_of_it(tmp_path: Path, make: Make, model_type: str) -> None:
    """Gemma's norm is 1 + w, for example."""
    path = make(model(), config={"model_type": model_type})
    vectors = scales(*LINEARS, source=model())

    assert written(tmp_path, path, "NVFP4_AWQ", vectors) == set(LINEARS)


def test_a_norm_with_a_reader_that_is_not_smoothed_stays(tmp_path: Path, make: Make) -> None:
    """v reads the same norm and stays as it is; o can't go into v's rows either."""
    vectors = scales(*(name for name in LINEARS if name != V), source=model())

    found = written(tmp_path, make(model()), "NVFP4_AWQ", vectors, exclude=[V])

    assert found == {Q, K, OUT, f"{LAYER}.post_attention_layernorm.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_of_another_dtype_stays(tmp_path: Path, make: Make, dtype: torch.dtype) -> None:
    source = model()
    for name in NORM_TENSORS:
        source[name] = source[name].to(dtype)
    vectors = scales(*LINEARS, source=source)

    assert written(tmp_path, make(source), "NVFP4_AWQ", vectors) == {Q, K, V, GATE, UP}


@pytest.mark.parametrize("shape", [(), (8,), (4096,), (1, H)], ids=str)
def test_a_norm_of_another_shape_stays(tmp_path: Path, make: Make, shape: tuple[int, ...]) -> None:
    """A longer one would take in what lies in memory behind the vector."""
    source = model()
    for name in NORM_TENSORS:
        source[name] = randn(*shape, seed=8)
    vectors = scales(*LINEARS, source=source)

    assert written(tmp_path, make(source), "NVFP4_AWQ", vectors) == {Q, K, V, GATE, UP}


@pytest.mark.parametrize(
    "bias",
    [torch.ones(4096), torch.ones(H, 1), torch.ones(H, dtype=torch.int64)],
    ids=["longer", "matrix", "integers"],
)
def test_a_linear_whose_bias_is_no_vector_of_its_rows_takes_nothing_in(
    tmp_path: Path, make: Make, bias: torch.Tensor
) -> None:
    source = model() | {f"{V}.bias": bias}
    vectors = scales(*LINEARS, source=source)

    assert written(tmp_path, make(source), "NVFP4_AWQ", vectors) == {OUT, *NORM_TENSORS}
    assert raw(tensors(tmp_path / "out")[f"{V}.bias"]) == raw(bias)


def test_planning_takes_time_in_proportion_to_the_modules(tmp_path: Path, make: Make) -> None:
    """All decisions are gone through a few times in all, not once for each smoothed module."""

    class Counted(list[Decision]):
        passes = 0

        def __iter__(self) -> Iterator[Decision]:
            self.passes += 1
            return super().__iter__()

    config = open_checkpoint(make(model())).config
    found = Counted(
        decision
        for tensor in open_checkpoint(tmp_path / "in").tensors.values()
        for decision in decide(tensor, recipe=recipe(algo="NVFP4_AWQ"), config=config, used=set())
    )
    statistics = stats(tmp_path, scales(*LINEARS, source=model()))

    plan_smoothing(found, statistics, model_type="llama")

    assert found.passes < len(LINEARS)


def test_a_layer_without_the_linear_before_keeps_its_own(tmp_path: Path, make: Make) -> None:
    """up has no smoothing because gate and it have none: down's is written."""
    vectors = scales(DOWN, source=model())

    assert written(tmp_path, make(model()), "NVFP4_AWQ", vectors) == {DOWN}


def test_smoothing_of_what_is_not_quantized_is_noted(tmp_path: Path, make: Make) -> None:
    """A misspelt module, say: the weight it was meant for would be quantized without it."""
    vectors = scales(*LINEARS, source=model()) | {"layers.0.q.pre_quant_scale": torch.ones(H)}
    asked = recipe(algo="W4A16_AWQ")

    notes = make_plan(open_checkpoint(make(model())), asked, stats(tmp_path, vectors)).notes

    assert [note for note in notes if "pre_quant_scale" in note] == [
        "the statistics' vectors of what is not quantized do nothing: layers.0.q.pre_quant_scale"
    ]


def test_experts_keep_theirs(tmp_path: Path, make: Make) -> None:
    """Their norm feeds the router too. gate and up of one expert have the mean, others another."""
    modules = [
        f"{LAYER}.mlp.experts.{expert}.{leaf}_proj" for expert in (0, 1) for leaf in ("gate", "up")
    ]
    source = {f"{m}.weight": randn(H, H, seed=place) for place, m in enumerate(modules)}
    source |= {f"{LAYER}.post_attention_layernorm.weight": randn(H, seed=9)}
    source |= {f"{LAYER}.mlp.gate.weight": randn(2, H, seed=10)}
    vectors = scales(*modules, source=source)
    path = make(source, config={"model_type": "qwen3_moe"})
    statistics = measured(tmp_path, inputs=dict.fromkeys(modules, 1.0), vectors=vectors)

    run(path, tmp_path / "out", algo="NVFP4_AWQ", statistics=statistics)

    found = tensors(tmp_path / "out")
    p = [bf16(array(vectors[f"{module}.pre_quant_scale"])) for module in modules]
    for place, module in enumerate(modules):
        first = place // 2 * 2
        mean = bf16((p[first] + p[first + 1]) / np.float32(2))
        assert np.array_equal(array(found[f"{module}.pre_quant_scale"]), mean)
    for name in ("post_attention_layernorm", "mlp.gate"):
        assert raw(found[f"{LAYER}.{name}.weight"]) == raw(source[f"{LAYER}.{name}.weight"])


def test_shared_scales_are_those_of_the_smoothed_weights(tmp_path: Path, make: Make) -> None:
    """The first pass smooths too: weight_scale_2 belongs to what is encoded."""
    source = model()
    vectors = scales(*LINEARS, source=source)
    smoothed, _ = smooth(source, vectors, algo="NVFP4_AWQ", grouped=False)

    run(make(source), tmp_path / "out", algo="NVFP4_AWQ", statistics=stats(tmp_path, vectors))

    found = tensors(tmp_path / "out")
    for readers in (*NORMS.values(), (OUT,), (DOWN,)):
        amax = max(smoothed[f"{reader}.weight"].abs().max().float() for reader in readers)
        for reader in readers:
            scale = found[f"{reader}.weight_scale_2"]
            assert scale.item() == (amax / torch.tensor(2688.0)).item()
            kernels = kernels_for(find("NVFP4_AWQ").codec)
            wanted = kernels.quantize_torch(smoothed[f"{reader}.weight"], global_scale=scale)
            assert raw(found[f"{reader}.weight"]) == raw(wanted["weight"])


def test_a_plan_with_smoothing_survives_json(tmp_path: Path, make: Make) -> None:
    statistics = stats(tmp_path, scales(*LINEARS, source=model()))
    checkpoint = open_checkpoint(make(model(biases=True)))

    plan = make_plan(checkpoint, recipe(algo="NVFP4_AWQ"), statistics)

    assert {step.action for step in plan.steps} == {"quantize", "fold", "keep"}
    assert Plan.parse(json.loads(plan.model_dump_json()), file="plan.json") == plan


def test_a_bias_that_does_not_fit_into_memory_is_refused(tmp_path: Path, make: Make) -> None:
    """f32, and so larger than the rows that need it: 78 KiB into a buffer of 64."""
    source = {
        f"{UP}.weight": randn(20000, 16, seed=1),
        f"{GATE}.weight": randn(20000, 16, seed=1),
        f"{DOWN}.weight": randn(16, 20000, seed=2),
        f"{UP}.bias": randn(20000, seed=3, dtype=torch.float32),
    }
    vectors = scales(UP, GATE, DOWN, source=source)

    with pytest.raises(ConvertError, match=r"up_proj\.bias: .* raise --memory-budget or lower"):
        run(
            make(source),
            tmp_path / "out",
            algo="NVFP4_AWQ",
            statistics=stats(tmp_path, vectors),
            workers=1,
            budget=64 << 10,
        )
