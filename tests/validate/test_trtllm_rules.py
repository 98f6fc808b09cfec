"""TensorRT-LLM's rules: every planted fault is found, and right checkpoints are predicted to load.

Nothing of it was run in the engine: what is tested is that the rules say what its sources say.
"""

from pathlib import Path

import pytest
from catalogue import O_PROJ, PB_WO, PC_PT, Fault, K, Q
from checkpoints import MIXED, draft, f32
from mixed_faults import entries
from trtllm_faults import TRTLLM_FAULTS, W1, W3, smooth

from qschema.formats import formats
from qschema.strict import Finding
from qvalidate.loader import load
from qvalidate.result import Prediction
from qvalidate.rules import RULES, raw
from qvalidate.rules.trtllm_support import SUPPORT
from qvalidate.targets import ONE_GPU, Deployment, parse_targets
from qvalidate.validation import predict

BOTH = parse_targets("tensorrt-llm")
(OLD,) = parse_targets("tensorrt-llm==1.2.1")
(NEW,) = parse_targets("tensorrt-llm==1.3.0rc27")

LOADS: tuple[Prediction, Prediction] = ("loads", "loads")
REFUSES: tuple[Prediction, Prediction] = ("refuses", "refuses")
WRONG: tuple[Prediction, Prediction] = ("loads-but-wrong", "loads-but-wrong")


def check(path: Path, on: Deployment = ONE_GPU) -> list[Finding]:
    return list(raw(load(path, on), BOTH))


def verdicts(path: Path, on: Deployment = ONE_GPU) -> tuple[Prediction, Prediction]:
    """Return what 1.2.1 and 1.3.0rc27 are predicted to do."""
    findings = check(path, on)
    return predict(findings, OLD)[0], predict(findings, NEW)[0]


def planted(fault: Fault, path: Path) -> Path:
    made = draft(fault.model, fault.algo)
    fault.plant(made)
    return made.write(path)


@pytest.mark.parametrize("fault", TRTLLM_FAULTS, ids=lambda fault: f"{fault.name}-{fault.rule}")
def test_fault_is_found_at_its_place(fault: Fault, tmp_path: Path) -> None:
    path = planted(fault, tmp_path / "made")
    findings = check(path, fault.deployment)

    found = [(found.rule, found.where, found.severity) for found in findings]
    assert (fault.rule, fault.where, fault.severity) in found
    assert all(Path(finding.file).is_relative_to(path) for finding in findings)


def test_every_rule_has_a_fault() -> None:
    declared = {rule_id for rule_id, rule in RULES.items() if rule.engine == "tensorrt-llm"}

    assert {fault.rule for fault in TRTLLM_FAULTS} == declared


def test_no_evidence_claims_a_run_of_the_engine() -> None:
    lines = [
        line
        for rule in RULES.values()
        if rule.engine == "tensorrt-llm"
        for line in rule.evidence
        if not line.startswith("documented: ")
    ]

    assert lines == ["torch 2.13: torch.cat of F8_E4M3 and BF16 raises"]


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("FP8", LOADS),
        (PC_PT, LOADS),
        (PB_WO, LOADS),
        ("NVFP4", LOADS),
        ("W4A8_NVFP4_FP8", LOADS),
        ("W4A8_MXFP4_FP8", LOADS),
        ("W8A16", LOADS),
        ("NVFP4_AWQ", ("unknown", "loads")),
        ("MXFP8", ("refuses", "loads")),
        ("W4A16_NVFP4", ("refuses", "loads")),
        (MIXED, ("refuses", "loads")),
        ("W8A8_SQ_PER_CHANNEL", REFUSES),
        ("MXFP4", REFUSES),
        ("FP8_PB_REAL", REFUSES),
    ],
)
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_right_dense_checkpoint(
    model: str, algo: str, expected: tuple[Prediction, Prediction], tmp_path: Path
) -> None:
    assert verdicts(draft(model, algo).write(tmp_path / "made")) == expected


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("FP8", LOADS),
        ("NVFP4", LOADS),
        ("W4A8_MXFP4_FP8", LOADS),
        ("W8A16", LOADS),
        ("W4A16_NVFP4", ("refuses", "loads")),
        (MIXED, ("refuses", "loads")),
        (PB_WO, ("unknown", "loads-but-wrong")),
        (PC_PT, REFUSES),
        ("W4A16_AWQ", REFUSES),
    ],
)
def test_right_experts(algo: str, expected: tuple[Prediction, Prediction], tmp_path: Path) -> None:
    assert verdicts(draft("mixtral", algo).write(tmp_path / "made")) == expected


@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W4A8_AWQ"])
def test_awq_that_is_smoothed_where_it_is_not_fused_loads(algo: str, tmp_path: Path) -> None:
    made = draft("llama", algo)
    for layer in (0, 1):
        smooth(made, f"model.layers.{layer}.self_attn.o_proj", 256)
        smooth(made, f"model.layers.{layer}.mlp.down_proj", 384)

    assert verdicts(made.write(tmp_path / "made")) == LOADS


def test_support_and_readers_name_the_same_formats() -> None:
    declared = {
        name
        for name, found in formats().items()
        if any(reader.startswith("TensorRT-LLM") for reader in found.readers)
    }

    # W4A16_NVFP4 is read by 1.3, which its declaration does not say
    assert declared | {"W4A16_NVFP4"} == set(SUPPORT)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_file", ("loads-but-wrong", "loads")),
        ("no_file_beside_packed_codes", ("refuses", "loads")),
        ("flat_file", ("refuses", "loads")),
        ("config_of_another_method", ("loads-but-wrong", "refuses")),
        ("blocks_in_upper_case", REFUSES),
        ("cache_with_biases", REFUSES),
        ("no_group_size", REFUSES),
        ("blocks_in_a_mixed_checkpoint", REFUSES),
        ("one_part_listed", WRONG),
        ("layer_above_listed", ("loads", "loads-but-wrong")),
        ("quantized_head", ("loads-but-wrong", "loads")),
        ("one_packed_part_listed", REFUSES),
        ("experts_listed", REFUSES),
        ("plain_linear_not_listed", ("unknown", "loads-but-wrong")),
        ("plain_linear_listed_by_an_expression", ("unknown", "loads")),
        ("one_part_plain", REFUSES),
        ("one_part_missing", REFUSES),
        ("fused_block_scales_missing", REFUSES),
        ("block_scales_missing", ("unknown", "loads-but-wrong")),
        ("input_scale_of_nvfp4_missing", ("unknown", "loads-but-wrong")),
        ("parts_with_different_scales", REFUSES),
        ("scale_of_each_row", REFUSES),
        ("smoothing_beside_a_fused_part", REFUSES),
        ("weight_of_one_expert_missing", REFUSES),
        ("expert_that_calibration_never_saw", REFUSES),
        ("expert_in_fp8_that_calibration_never_saw", ("unknown", "loads-but-wrong")),
        ("up_with_another_scale", ("unknown", "unknown")),
        ("trtllm-gpu", REFUSES),
        ("trtllm-gpu-undocumented", ("unknown", "unknown")),
        ("trtllm-tp-rows", REFUSES),
        ("trtllm-blocks-misaligned", ("unknown", "loads-but-wrong")),
        ("scale_of_the_keys_alone", ("loads", "refuses")),
        ("scales_of_an_eight_bit_cache", LOADS),
    ],
)
def test_prediction_by_version(
    name: str, expected: tuple[Prediction, Prediction], tmp_path: Path
) -> None:
    fault = next(fault for fault in TRTLLM_FAULTS if name in (fault.name, fault.rule))

    assert verdicts(planted(fault, tmp_path / "made"), fault.deployment) == expected


def test_block_scales_of_two_dimensions_load(tmp_path: Path) -> None:
    """The format has four, and TensorRT-LLM squeezes them."""
    made = draft("llama", PB_WO)
    dtype, (rows, _, columns, _), data = made.tensor(f"{O_PROJ}.weight_scale")
    made.put(f"{O_PROJ}.weight_scale", (dtype, (rows, columns), data))

    assert verdicts(made.write(tmp_path / "made")) == LOADS


def test_deepseeks_name_of_block_scales_is_read(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    scale = made.pop(f"{O_PROJ}.weight_scale")
    made.put(f"{O_PROJ}.weight_scale_inv", scale, beside=f"{O_PROJ}.weight")
    findings = check(made.write(tmp_path / "made"))

    assert not [found for found in findings if found.rule.startswith("trtllm-")]


def test_experts_with_deepseeks_name_load(tmp_path: Path) -> None:
    made = draft("mixtral", PB_WO)
    for tensors in made.shards.values():
        for name in [name for name in tensors if ".experts." in name and name.endswith("_scale")]:
            tensors[f"{name}_inv"] = tensors.pop(name)

    assert verdicts(made.write(tmp_path / "made")) == LOADS


def test_fp8_without_any_input_scale_is_dynamic(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    for tensors in made.shards.values():
        for name in [name for name in tensors if name.endswith(".input_scale")]:
            del tensors[name]

    assert verdicts(made.write(tmp_path / "made")) == LOADS


def test_scales_of_fp8_parts_may_differ(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    made.put(f"{K}.weight_scale", ("F32", (), f32(3e-4)))

    assert verdicts(made.write(tmp_path / "made")) == LOADS


def test_number_in_one_dimension_is_a_number(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    _, _, data = made.tensor(f"{O_PROJ}.weight_scale")
    made.put(f"{O_PROJ}.weight_scale", ("F32", (1,), data))

    assert verdicts(made.write(tmp_path / "made")) == LOADS


def test_the_file_goes_before_the_config(tmp_path: Path) -> None:
    """Only hf_quant_config.json leaves a layer out, and TensorRT-LLM follows it."""
    made = draft("llama", PB_WO)
    made.nested["exclude_modules"] = [*made.exclude, O_PROJ]
    (found,) = [
        found
        for found in check(made.write(tmp_path / "made"))
        if found.rule == "trtllm-plain-layer"
    ]

    assert found.where == f"{O_PROJ}.weight"
    assert "excludes" in found.message


def test_plain_router_that_is_not_listed_is_built_plain(tmp_path: Path) -> None:
    made = draft("mixtral", "FP8")
    made.set_exclude(["lm_head"])

    assert verdicts(made.write(tmp_path / "made")) == LOADS


def test_head_that_1_3_quantizes(tmp_path: Path) -> None:
    """Its weight_scale decides, unless it is tied or listed."""

    def with_head(name: str, change: str) -> Path:
        made = draft("llama", "FP8")
        made.quantize("lm_head", formats()["FP8"])
        made.set_exclude(["lm_head"] if change == "listed" else ["model.embed_tokens"])
        made.config["tie_word_embeddings"] = change == "tied"
        return made.write(tmp_path / name)

    assert verdicts(with_head("free", "")) == ("loads-but-wrong", "loads")
    assert verdicts(with_head("tied", "tied"))[1] == "loads-but-wrong"
    assert verdicts(with_head("listed", "listed"))[1] == "loads-but-wrong"


@pytest.mark.parametrize(
    ("gpu", "algo", "expected"),
    [
        (90, "FP8", LOADS),
        (80, "FP8", REFUSES),
        (90, PB_WO, LOADS),
        (89, PB_WO, REFUSES),
        (120, PB_WO, ("unknown", "unknown")),
        (100, "NVFP4", LOADS),
        (120, "NVFP4", LOADS),
        (120, "W4A8_NVFP4_FP8", REFUSES),
        (90, PC_PT, LOADS),
        (80, "W8A16", LOADS),
        (90, "MXFP8", ("refuses", "loads")),
    ],
)
def test_gpu(gpu: int, algo: str, expected: tuple[Prediction, Prediction], tmp_path: Path) -> None:
    path = draft("qwen3", algo).write(tmp_path / "made")

    assert verdicts(path, Deployment(gpu=gpu)) == expected


def test_awq_beyond_hopper_is_listed_by_1_3_only(tmp_path: Path) -> None:
    made = draft("qwen3", "W4A16_AWQ")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        smooth(made, f"model.layers.0.{name}", 256)
    path = made.write(tmp_path / "made")

    assert verdicts(path, Deployment(gpu=100)) == ("unknown", "loads")


@pytest.mark.parametrize("algo", ["FP8", "NVFP4"])
def test_division_that_fits_has_no_findings(algo: str, tmp_path: Path) -> None:
    path = draft("llama", algo).write(tmp_path / "made")

    assert verdicts(path, Deployment(tp=2)) == LOADS
    assert verdicts(path, Deployment(tp=4)) == LOADS


def test_ones_scale_for_both_of_an_expert_is_right(tmp_path: Path) -> None:
    made = draft("mixtral", "NVFP4")
    for name in (W1, W3):
        made.put(f"{name}.weight_scale_2", ("F32", (), f32(3e-4)))

    assert verdicts(made.write(tmp_path / "made")) == LOADS


def test_first_entry_about_an_expert_decides_about_all(tmp_path: Path) -> None:
    made = draft("mixtral", MIXED)
    for listed in entries(made):
        listed[W3] = {"quant_algo": "FP8"}
    findings = check(made.write(tmp_path / "made"))

    assert ("trtllm-mixed-parts", f"{W3}.weight") in [(f.rule, f.where) for f in findings]


def test_part_that_is_not_the_first_is_no_reason(tmp_path: Path) -> None:
    """gate's entry is missing, so that gate and up are built plain."""
    made = draft("llama", MIXED)
    for listed in entries(made):
        del listed["model.layers.0.mlp.gate_proj"]
    findings = check(made.write(tmp_path / "made"))

    found = [finding.where for finding in findings if finding.rule == "trtllm-plain-layer-packed"]
    assert found == [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]


def test_message_says_what_excludes_and_as_what(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.set_exclude([*made.exclude, Q])
    findings = check(made.write(tmp_path / "made"))
    message = next(
        finding.message
        for finding in findings
        if (finding.rule, finding.where) == ("trtllm-plain-layer", f"{K}.weight")
    )

    assert message == (f"F8_E4M3, but {Q!r} excludes model.layers.0.self_attn.qkv_proj (as {Q})")
