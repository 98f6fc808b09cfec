"""A real vLLM's classes and loader, fed from headers: what is right passes, what is wrong is named.

    QVALIDATE_VLLM_PYTHON=vllm-env/bin/python pytest -m engine_vllm

30 starts of the interpreter, 8 s each on two idle cores. `FAULTS` and the tests of Qwen3-MoE have a
case for all damage that is known to load in silence; what only values show is named in
`test_wrong_values_are_not_seen`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import pytest
from checkpoints import MIXED, Draft, draft, f32, quantized

from qschema.formats import Format, find
from qvalidate.dry import DryOutcome, DryRequest, dry_run

PYTHON = os.environ.get("QVALIDATE_VLLM_PYTHON")
LAYER = "model.layers.0"
ATTENTION = f"{LAYER}.self_attn"
Q, K, V, O_PROJ = (f"{ATTENTION}.{name}_proj" for name in "qkvo")
MOE = "model.layers.1.block_sparse_moe"
EXPERT = f"{MOE}.experts.2"
ROUTER = f"{LAYER}.mlp.gate"
UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("up", "down"))
SCALES = ("weight_scale", "weight_scale_2", "input_scale")
FP8, PB_WO, PC_PT, NVFP4 = "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"

pytestmark = [
    pytest.mark.engine_vllm,
    pytest.mark.skipif(PYTHON is None, reason="needs $QVALIDATE_VLLM_PYTHON"),
]


def dry(checkpoint: Path, *, tp: int = 1) -> DryOutcome:
    outcome = dry_run(DryRequest(checkpoint=checkpoint, python=PYTHON, tp=tp))
    print(outcome.model_dump_json())
    return outcome


def errors(outcome: DryOutcome) -> set[tuple[str, str]]:
    return {(f.rule, f.where) for f in outcome.findings if f.severity == "error"}


@dataclass(frozen=True)
class Case:
    """One planted fault and what must be said of it."""

    name: str
    algo: str
    plant: Callable[[Draft], object]
    expected: set[tuple[str, str]]
    model: str = "llama"


def bf16(shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], bytes]:
    return "BF16", shape, bytes(2 * prod(shape))


def popped(name: str) -> Callable[[Draft], object]:
    return lambda made: made.pop(name)


def redtype(name: str, dtype: str) -> Callable[[Draft], None]:
    """Return what gives the tensor `name` another dtype of the same size."""

    def plant(made: Draft) -> None:
        _, shape, data = made.tensor(name)
        made.put(name, (dtype, shape, data))

    return plant


def resized(module: str, algo: str, shape: tuple[int, int]) -> Callable[[Draft], None]:
    def plant(made: Draft) -> None:
        for suffix, tensor in quantized(find(algo), shape, seed=module).items():
            made.put(f"{module}.{suffix}", tensor)

    return plant


def expert_too_many(made: Draft) -> None:
    for suffix in ("weight", *SCALES):
        tensor = made.tensor(f"{EXPERT}.w2.{suffix}")
        made.put(f"{MOE}.experts.4.w2.{suffix}", tensor, beside=f"{EXPERT}.w2.{suffix}")


def missing(*names: str) -> set[tuple[str, str]]:
    return {("dry-missing", name) for name in names}


# those of one model and format are planted into one checkpoint, each in a place of its own
FAULTS = [
    Case("q scale missing", FP8, popped(f"{Q}.weight_scale"), missing(f"{Q}.weight_scale")),
    Case("o scale missing", FP8, popped(f"{O_PROJ}.weight_scale"),
         missing(f"{O_PROJ}.weight_scale")),
    Case("k input scale missing", FP8, popped(f"{K}.input_scale"), missing(f"{K}.input_scale")),
    Case("q weight missing", PB_WO, popped(f"{Q}.weight"), missing(f"{Q}.weight")),
    Case("q scale missing", PB_WO, popped(f"{Q}.weight_scale"), missing(f"{Q}.weight_scale")),
    Case("o scale missing", PB_WO, popped(f"{O_PROJ}.weight_scale"),
         missing(f"{O_PROJ}.weight_scale")),
    Case("bf16 in no list", PB_WO, lambda made: made.dequantize(DOWN),
         {("dry-cast", f"{DOWN}.weight"), *missing(f"{DOWN}.weight_scale")}),
    Case("codes as bytes", PB_WO, redtype(f"{UP}.weight", "U8"), {("dry-cast", f"{UP}.weight")}),
    Case("bias of q", PB_WO,
         lambda made: made.put(f"{Q}.bias", bf16((256,)), beside=f"{K}.weight"),
         {("dry-unexpected", f"{Q}.bias")}),
    Case("k and v missing", PC_PT, lambda made: [made.pop_module(K), made.pop_module(V)],
         missing(f"{K}.weight", f"{K}.weight_scale")),
    Case("o scale missing", PC_PT, popped(f"{O_PROJ}.weight_scale"),
         missing(f"{O_PROJ}.weight_scale")),
    Case("too many rows", PC_PT, resized(UP, PC_PT, (512, 256)),
         {("dry-truncated", f"{UP}.weight"), ("dry-truncated", f"{UP}.weight_scale")}),
    Case("too many columns", PC_PT, resized(DOWN, PC_PT, (256, 512)),
         {("dry-truncated", f"{DOWN}.weight")}),
    Case("q scale missing", "MXFP8", popped(f"{Q}.weight_scale"), missing(f"{Q}.weight_scale")),
    Case("o scale missing", "MXFP8", popped(f"{O_PROJ}.weight_scale"),
         missing(f"{O_PROJ}.weight_scale")),
    Case("scale as e8m0", "MXFP8", redtype(f"{DOWN}.weight_scale", "F8_E8M0"),
         {("dry-cast", f"{DOWN}.weight_scale")}),
    Case("input scale missing", NVFP4, popped(f"{K}.input_scale"), missing(f"{K}.input_scale")),
    Case("second scale missing", NVFP4, popped(f"{V}.weight_scale_2"),
         missing(f"{V}.weight_scale_2")),
    Case("bf16 under the name of codes", NVFP4,
         lambda made: made.put(f"{O_PROJ}.weight", bf16((256, 256))),
         {("dry-cast", f"{O_PROJ}.weight"), ("dry-truncated", f"{O_PROJ}.weight")}),
    Case("bytes as codes", NVFP4, redtype(f"{DOWN}.weight", "F8_E4M3"),
         {("dry-cast", f"{DOWN}.weight")}),
    Case("w1 of an expert missing", NVFP4, popped(f"{EXPERT}.w1.weight"),
         missing(f"{EXPERT}.w1.weight"), "mixtral"),
    *(
        Case(f"{suffix} of an expert missing", NVFP4, popped(f"{EXPERT}.w3.{suffix}"),
             missing(f"{EXPERT}.w3.{suffix}"), "mixtral")
        for suffix in SCALES
    ),
    Case("expert too small", NVFP4, resized(f"{EXPERT}.w2", NVFP4, (128, 128)),
         missing(f"{EXPERT}.w2.weight", f"{EXPERT}.w2.weight_scale"), "mixtral"),
    Case("expert too many", NVFP4, expert_too_many,
         {("dry-unexpected", f"{MOE}.experts.4.w2.{s}") for s in ("weight", *SCALES)},
         "mixtral"),
    Case("whole expert missing", FP8, lambda made: made.pop_module(EXPERT),
         missing(*(f"{EXPERT}.{leaf}.{suffix}" for leaf in ("w1", "w2")
                   for suffix in ("weight", "weight_scale", "input_scale"))), "mixtral"),
    Case("scale of an expert missing", "MXFP8", popped(f"{EXPERT}.w3.weight_scale"),
         missing(f"{EXPERT}.w3.weight_scale"), "mixtral"),
    Case("tied head in no list", FP8, lambda made: made.set_exclude(["model.embed_tokens"]),
         missing("lm_head.weight_scale", "lm_head.input_scale"), "qwen3"),
]  # fmt: skip
Outcomes = Callable[[str, str], DryOutcome]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came of the faulty checkpoint of a model and a format; each is run once."""
    folder = tmp_path_factory.mktemp("faulty")

    @cache
    def outcome(model: str, algo: str) -> DryOutcome:
        made = draft(model, algo)
        for case in FAULTS:
            if (case.model, case.algo) == (model, algo):
                case.plant(made)
        return dry(made.write(folder / f"{model}-{algo}"))

    return outcome


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: f"{case.model} {case.algo} {case.name}")
def test_fault_is_found_and_named(outcomes: Outcomes, case: Case) -> None:
    assert case.expected <= errors(outcomes(case.model, case.algo))


@pytest.mark.parametrize(
    ("model", "algo"), dict.fromkeys((case.model, case.algo) for case in FAULTS)
)
def test_nothing_but_the_faults_is_found(outcomes: Outcomes, model: str, algo: str) -> None:
    cases = [case for case in FAULTS if (case.model, case.algo) == (model, algo)]

    assert errors(outcomes(model, algo)) == set().union(*(case.expected for case in cases))
    assert outcomes(model, algo).verdict == "failed"


RIGHT = [
    *(("llama", algo) for algo in (FP8, PC_PT, "MXFP8", NVFP4, "W4A16_NVFP4", MIXED)),
    *(("mixtral", algo) for algo in (FP8, "MXFP8", NVFP4, "W4A16_NVFP4", MIXED)),
    ("qwen3", NVFP4),
]


@pytest.mark.parametrize(("model", "algo"), RIGHT)
def test_right_checkpoint_passes_on_every_rank(tmp_path: Path, model: str, algo: str) -> None:
    made = draft(model, algo)

    outcome = dry(made.write(tmp_path / "right"), tp=2)

    assert (outcome.verdict, outcome.findings) == ("passed", [])
    assert outcome.ranks_checked == 2
    assert outcome.num_tensors == sum(len(tensors) for tensors in made.shards.values())


def test_blocks_pass_on_one_rank_and_do_not_fit_two(tmp_path: Path) -> None:
    """Half of the 384 columns of down_proj is one block and a half."""
    checkpoint = draft("llama", PB_WO).write(tmp_path / "right")

    alone, halved = dry(checkpoint), dry(checkpoint, tp=2)

    assert (alone.verdict, alone.findings) == ("passed", [])
    assert errors(halved) == {("dry-refused", "")}
    assert "divisible by 128, got 192" in halved.message


def test_scales_of_a_quantized_cache_pass_with_a_note(tmp_path: Path) -> None:
    made = draft("llama", FP8)
    made.quantize_cache("FP8")

    outcome = dry(made.write(tmp_path / "right"))

    assert outcome.verdict == "passed"
    assert {f.severity for f in outcome.findings} <= {"note"}


def test_bf16_checkpoint_passes(tmp_path: Path) -> None:
    made = draft("llama", PC_PT)
    made.dequantize_all()
    del made.config["quantization_config"]
    made.hf_quant_config = {}

    outcome = dry(made.write(tmp_path / "right"))

    assert (outcome.verdict, outcome.findings) == ("passed", [])


def test_refusal_names_tensor_and_shapes(tmp_path: Path) -> None:
    made = draft("llama", PC_PT)
    dtype, _, data = made.tensor(f"{O_PROJ}.weight_scale")
    made.put(f"{O_PROJ}.weight_scale", (dtype, (256, 1), data))

    outcome = dry(made.write(tmp_path / "faulty"))

    assert errors(outcome) == {("dry-refused", f"{O_PROJ}.weight_scale")}
    assert "[256, 1] into [256]" in outcome.message


def test_refusal_of_the_config_is_one(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.quantization["quant_algo"] = "W8A16"

    outcome = dry(made.write(tmp_path / "faulty"))

    assert errors(outcome) == {("dry-refused", "")}
    assert "ModelOpt currently only supports" in outcome.message


def test_what_only_the_second_rank_meets_is_found(tmp_path: Path) -> None:
    """The first rank takes all 128 columns that there are."""
    made = draft("llama", PC_PT)
    resized(O_PROJ, PC_PT, (256, 128))(made)

    outcome = dry(made.write(tmp_path / "faulty"), tp=2)

    assert errors(outcome) == {("dry-refused", f"{O_PROJ}.weight")}
    assert outcome.message.endswith("[256, 128] into [256, 128] on rank 1")


def test_more_ranks_than_heads_are_refused(tmp_path: Path) -> None:
    outcome = dry(draft("llama", PC_PT).write(tmp_path / "right"), tp=3)

    assert {rule for rule, _ in errors(outcome)} == {"dry-refused"}
    assert "divisible" in outcome.message


def tiny_qwen3_moe(
    tmp_path: Path, declared: Format, *, ignored: tuple[str, ...] = ("lm_head", ROUTER)
) -> Path:
    """Write a right Qwen3-MoE of one layer, but for what is said to be unquantized."""
    moe = f"{LAYER}.mlp"
    linears = {
        Q: (128, 128), K: (128, 128), V: (128, 128), O_PROJ: (128, 128),
        **{f"{moe}.experts.{e}.{leaf}_proj": (128, 128)
           for e in range(2) for leaf in ("gate", "up", "down")},
    }  # fmt: skip
    tensors = {
        "model.embed_tokens.weight": bf16((256, 128)),
        "lm_head.weight": bf16((256, 128)),
        f"{moe}.gate.weight": bf16((2, 128)),
        **{
            f"{name}.weight": bf16((size,))
            for name, size in {
                f"{ATTENTION}.q_norm": 64, f"{ATTENTION}.k_norm": 64, "model.norm": 128,
                f"{LAYER}.input_layernorm": 128, f"{LAYER}.post_attention_layernorm": 128,
            }.items()
        },
    }  # fmt: skip
    for module, shape in linears.items():
        made = quantized(declared, shape, seed=module)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in made.items()}
    config: dict[str, object] = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 64,
        "num_key_value_heads": 2, "intermediate_size": 128, "moe_intermediate_size": 128,
        "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "vocab_size": 256, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": False, "attention_bias": False,
        "quantization_config": {
            "ignore": list(ignored), "quant_algo": declared.spelling, "quant_method": "modelopt",
        },
    }  # fmt: skip
    shards = {"model.safetensors": tensors}
    return Draft(config, {}, shards, index=None).write(tmp_path / "moe")


def test_qwen3_moe_passes(tmp_path: Path) -> None:
    outcome = dry(tiny_qwen3_moe(tmp_path, find(FP8)))

    assert (outcome.verdict, outcome.findings) == ("passed", [])


def test_quantized_layer_in_the_list_of_unquantized_ones_is_cast(tmp_path: Path) -> None:
    """Qwen3-MoE passes over the scale that is left, and takes the codes for numbers."""
    outcome = dry(tiny_qwen3_moe(tmp_path, find(FP8), ignored=("lm_head", ROUTER, O_PROJ)))

    assert errors(outcome) == {
        ("dry-cast", f"{O_PROJ}.weight"),
        ("dry-unexpected", f"{O_PROJ}.weight_scale"),
        ("dry-unexpected", f"{O_PROJ}.input_scale"),
    }


def test_router_in_no_list_is_taken_for_quantized(tmp_path: Path) -> None:
    outcome = dry(tiny_qwen3_moe(tmp_path, find(FP8), ignored=("lm_head",)))

    assert errors(outcome) == {
        ("dry-cast", f"{ROUTER}.weight"),
        *missing(f"{ROUTER}.weight_scale", f"{ROUTER}.input_scale"),
    }


def test_wrong_values_are_not_seen(tmp_path: Path) -> None:
    """Unequal scales of fused parts, a reciprocal, an input scale of 0: no header shows them."""
    made = draft("llama", NVFP4)
    for module, value in ((Q, 1.0), (K, 0.5), (O_PROJ, 1 / 1.5e-4)):
        made.put(f"{module}.weight_scale_2", ("F32", (), f32(value)))
    made.put(f"{O_PROJ}.input_scale", ("F32", (), f32(0.0)))

    outcome = dry(made.write(tmp_path / "faulty"))

    assert (outcome.verdict, outcome.findings) == ("passed", [])
