"""`--amax`: what statistics may hold, what a recipe needs of them, and what is wrong in them."""

import json
import math
import tracemalloc
from pathlib import Path

import pytest
import torch

from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qconvert.statistics import Statistics, input_amaxes, open_statistics
from qschema.checkpoint import open_checkpoint
from qschema.plan import Plan
from qschema.strict import DocumentError

from .conversion import Make, Tensors, measured, randn, recipe, run

UP = "model.layers.0.mlp.up_proj"
GATE = "model.layers.0.mlp.gate_proj"
NEED_INPUTS = ["FP8", "NVFP4", "NVFP4_AWQ", "W4A8_AWQ", "W4A8_NVFP4_FP8", "W8A8_SQ_PER_CHANNEL"]
NEED_NONE = [
    "FP8_PB_WO",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "MXFP4",
    "MXFP8",
    "W4A16_AWQ",
    "W4A16_NVFP4",
    "W4A8_MXFP4_FP8",
    "W8A16",
]


def pair(*, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return {f"{name}.weight": randn(128, 128, seed=1, dtype=dtype) for name in (GATE, UP)}


def plan_of(path: Path, statistics: Statistics | None, algo: str) -> Plan:
    return make_plan(open_checkpoint(path), recipe(algo=algo), statistics)


def document(**changes: object) -> dict[str, object]:
    return {"document": "qconvert-amax", "version": 1, "inputs": {UP: 1.0}, **changes}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "amax-missing: no such file"),
        ("{", "json-syntax"),
        (document(input={UP: 1.0}), r"\$\.input: extra-forbidden"),
        (document(version=2), r"\$\.version"),
        (document(document="qconvert-plan"), r"\$\.document"),
        (document(inputs={UP: -1.0}), "amax-value: expected an f32 number of at least 0"),
        (document(inputs={UP: "1.0"}), "inputs"),
        (document(inputs={UP: None}), "inputs"),
        # Python's json writes these; no JSON parser need read them
        (document(inputs={UP: math.nan}), "NaN"),
        (document(inputs={UP: math.inf}), "Infinity"),
        (json.dumps(document(inputs={UP: 7.0})).replace("7.0", "1e999"), "json-|amax-value"),
        (document(kv_cache={"model.layers.0.self_attn": {"k": 1.0}}), r"\.v"),
        (document(kv_cache={"a": {"k": 1.0, "v": -2.0}}), "amax-value"),
        (document(vectors="sub/vectors.safetensors"), "vectors"),
        (document(vectors="vectors.bin"), "vectors"),
        (document(vectors="vectors.safetensors"), "amax-vectors: no vectors.safetensors beside it"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, text: object, problem: str) -> None:
    path = tmp_path / "stats.json"
    if text is not None:
        path.write_text(text if isinstance(text, str) else json.dumps(text))

    with pytest.raises(DocumentError, match=problem):
        open_statistics(path)


def test_whole_numbers_and_zeros_are_numbers(tmp_path: Path) -> None:
    statistics = measured(tmp_path, inputs={UP: 3, GATE: 0.0})

    assert dict(statistics.amax.inputs) == {UP: 3.0, GATE: 0.0}


@pytest.mark.parametrize("algo", NEED_INPUTS)
def test_a_static_input_scale_needs_statistics(make: Make, algo: str) -> None:
    with pytest.raises(ConvertError) as caught:
        plan_of(make(pair()), None, algo)

    assert str(caught.value) == (
        f"{algo} has a static scale for each layer's input, which comes from calibration: pass "
        "the largest activations with --amax stats.json, or choose a format that quantizes weights "
        "only or scales its input as it comes"
    )


@pytest.mark.parametrize("algo", NEED_NONE)
def test_other_formats_do_without(make: Make, algo: str) -> None:
    plan = plan_of(make(pair()), None, algo)

    assert {step.input_amax for step in plan.steps} == {None}
    assert not [out.name for out in plan.outputs() if out.name.endswith("input_scale")]


@pytest.mark.parametrize("algo", NEED_INPUTS)
def test_a_missing_module_is_named(tmp_path: Path, make: Make, algo: str) -> None:
    path = make({"model.layers.0.mlp.down_proj.weight": randn(128, 128, seed=1), **pair()})
    statistics = measured(tmp_path, inputs={UP: 1.0, GATE: 1.0})

    with pytest.raises(ConvertError) as caught:
        plan_of(path, statistics, algo)

    assert str(caught.value) == (
        f"{tmp_path / 'stats.json'}: $.inputs has no amax for model.layers.0.mlp.down_proj, which "
        f"{algo} needs for the scale of their input; calibrate again, or --exclude them"
    )


def test_siblings_fill_in_for_each_other_only_where_they_share(tmp_path: Path, make: Make) -> None:
    path, statistics = make(pair()), measured(tmp_path, inputs={UP: 2.0})

    assert {step.input_amax for step in plan_of(path, statistics, "NVFP4").steps} == {2.0}
    with pytest.raises(ConvertError, match=f"no amax for {GATE}, which FP8 needs"):
        plan_of(path, statistics, "FP8")


def test_what_is_excluded_needs_no_statistics(tmp_path: Path, make: Make) -> None:
    path = make({"model.layers.0.mlp.down_proj.weight": randn(128, 128, seed=1), **pair()})
    statistics = measured(tmp_path, inputs={UP: 1.0, GATE: 1.0})

    found = make_plan(
        open_checkpoint(path), recipe(algo="FP8", exclude=["*.down_proj"]), statistics
    )

    assert [step.input_amax for step in found.steps if step.algo] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("algo", "amax", "wanted"),
    [
        # no input but zeros: as ModelOpt, 448 / 448, 6 / 2688 and 127 / 127
        ("FP8", 0.0, 1.0),
        ("NVFP4", 0.0, 6.0 / 2688.0),
        ("W4A8_NVFP4_FP8", 0.0, 1.0),
        ("W8A8_SQ_PER_CHANNEL", 0.0, 1.0),
        ("FP8", 448.0, 1.0),
        ("NVFP4", 2688.0, 1.0),
        ("W8A8_SQ_PER_CHANNEL", 1.0, 1.0 / 127.0),
        # below the smallest normal bf16 number counts as that
        ("FP8", 1e-40, 2.0**-126 / 448.0),
    ],
)
def test_the_input_scale_of_some_numbers(
    tmp_path: Path, make: Make, algo: str, amax: float, wanted: float
) -> None:
    statistics = measured(tmp_path, inputs={UP: amax, GATE: amax})

    run(make(pair()), tmp_path / "out", algo=algo, statistics=statistics)

    checkpoint = open_checkpoint(tmp_path / "out")
    stored = checkpoint.tensors[f"{UP}.input_scale"]
    assert (stored.dtype, stored.shape) == ("F32", ())
    data = stored.file.read_bytes()[stored.offset : stored.offset + 4]
    assert data == torch.tensor(wanted, dtype=torch.float64).float().numpy().tobytes()


def vectors(tensor: torch.Tensor, *, of: tuple[str, ...] = (GATE, UP)) -> Tensors:
    return {f"{name}.pre_quant_scale": tensor.clone() for name in of}


@pytest.mark.parametrize(
    ("tensor", "of", "algo", "problem"),
    [
        (torch.ones(64), (GATE, UP), "W4A16_AWQ", r"expected F32 \[128\], .* found F32 \[64\]"),
        (torch.ones(128, 1), (GATE, UP), "W4A16_AWQ", r"found F32 \[128, 1\]"),
        (torch.ones(128).double(), (GATE, UP), "W4A16_AWQ", r"found F64 \[128\]"),
        (torch.ones(128).bfloat16(), (GATE, UP), "W4A16_AWQ", r"found BF16 \[128\]"),
        (torch.ones(128), (UP,), "W4A16_AWQ", f"{GATE} read the same input and have none"),
        (torch.ones(128), (GATE, UP), "W8A16", "W8A16 has no tensor to undo it"),
        (torch.ones(128), (GATE, UP), "FP8_PB_WO", "FP8_PB_WO has no tensor to undo it"),
        (torch.ones(128), (GATE, UP), "NVFP4", "NVFP4 has no tensor to undo it"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, make: Make, tensor: torch.Tensor, of: tuple[str, ...], algo: str, problem: str
) -> None:
    inputs = {UP: 1.0, GATE: 1.0}
    statistics = measured(tmp_path, inputs=inputs, vectors=vectors(tensor, of=of))

    with pytest.raises(
        ConvertError, match=rf"vectors\.safetensors::{of[0]}\.pre_quant_scale: .*{problem}"
    ):
        plan_of(make(pair()), statistics, algo)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_only_bf16_weights_are_smoothed(tmp_path: Path, make: Make, dtype: torch.dtype) -> None:
    statistics = measured(tmp_path, vectors=vectors(torch.ones(128)))

    with pytest.raises(ConvertError, match="defined for BF16 weights, this one is F"):
        plan_of(make(pair(dtype=dtype)), statistics, "W4A16_AWQ")


# 1e-40 has no inverse in f32; bf16 has no number near 3.4e38
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-40, 3.4e38])
@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_a_vector_with_a_bad_number_is_refused_and_leaves_nothing(
    tmp_path: Path, make: Make, algo: str, bad: float
) -> None:
    tensor = torch.ones(128)
    tensor[17] = bad
    statistics = measured(tmp_path, inputs={UP: 1.0, GATE: 1.0}, vectors=vectors(tensor))

    with pytest.raises(
        ConvertError, match=r"_proj\.pre_quant_scale: expected finite numbers above 0"
    ):
        run(make(pair()), tmp_path / "out", algo=algo, statistics=statistics)

    assert not list(tmp_path.glob("out*"))


def test_vectors_are_part_of_the_plan(tmp_path: Path, make: Make) -> None:
    """The same numbers elsewhere, another plan: its digest names a conversion exactly."""
    path = make(pair())
    found = [
        plan_of(path, measured(tmp_path, vectors=vectors(torch.full((128,), p))), "W4A16_AWQ")
        for p in (1.0, 1.0, 2.0)
    ]

    assert found[0].sha256() == found[1].sha256() != found[2].sha256()


def test_no_decisions_need_no_statistics() -> None:
    assert input_amaxes([], Statistics()) == {}


def test_vectors_are_not_held_in_memory(tmp_path: Path) -> None:
    """64 MiB of them, of which only the header and the digest are wanted yet."""
    size = 64 << 20
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({f"{UP}.pre_quant_scale": entry}).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / "v.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "stats.json").write_text(json.dumps(document(vectors="v.safetensors")))
    tracemalloc.start()

    open_statistics(tmp_path / "stats.json")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 4 << 20


def test_inputs_of_modules_that_are_not_there_are_noted(tmp_path: Path, make: Make) -> None:
    """Those of kept modules and of experts in a kept stack are not: calibration sees them too."""
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    path = make(
        {**pair(), "lm_head.weight": randn(8, 128, seed=2), stack: randn(2, 128, 128, seed=3)},
        config={"model_type": "qwen3_moe", "hidden_size": 128},
    )
    expert = "model.layers.0.mlp.experts.1.up_proj"
    inputs = {UP: 1.0, GATE: 1.0, "lm_head": 2.0, expert: 1.0, "model.layers.0.mlp.up": 3.0}
    asked = recipe(algo="NVFP4", exclude=["*.experts*"])

    notes = make_plan(open_checkpoint(path), asked, measured(tmp_path, inputs=inputs)).notes

    assert [note for note in notes if "statistics" in note] == [
        "the statistics have inputs of what the source lacks: model.layers.0.mlp.up"
    ]


def test_the_input_of_a_tied_head_is_known(tmp_path: Path, make: Make) -> None:
    path = make(pair(), config={"tie_word_embeddings": True})
    inputs = {UP: 1.0, GATE: 1.0, "lm_head": 2.0}

    assert plan_of(path, measured(tmp_path, inputs=inputs), "NVFP4").notes == []


def test_a_quantized_head_of_a_tied_model_is_noted(tmp_path: Path, make: Make) -> None:
    path = make({"lm_head.weight": randn(64, 128, seed=1)}, config={"tie_word_embeddings": True})
    asked = recipe(algo="MXFP8", include=["lm_head"])

    (note,) = make_plan(open_checkpoint(path), asked).notes

    assert "lm_head is quantized, but config.json has tie_word_embeddings" in note


def test_statistics_that_no_format_uses_are_noted(tmp_path: Path, make: Make) -> None:
    plan = plan_of(make(pair()), measured(tmp_path, inputs={UP: 1.0}), "MXFP8")

    assert plan.notes == ["--amax does nothing: no format here has an input scale, and no KV cache"]
