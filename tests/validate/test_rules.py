"""Every planted fault is found by its rule at its place, and right checkpoints raise no alarm."""

from pathlib import Path

import codes_faults  # noqa: F401
import deployment_faults  # noqa: F401  (these seven fill the catalogue)
import document_faults  # noqa: F401
import format_faults  # noqa: F401
import mixed_faults  # noqa: F401
import module_faults  # noqa: F401
import pytest
import tensor_faults  # noqa: F401
import vllm_faults  # noqa: F401
from catalogue import DOWN, FAULTS, O_PROJ, PB_WO, PC_PT, Fault, K, Q
from checkpoints import MIXED, draft, f32

from qschema.formats import formats
from qschema.strict import Finding
from qvalidate.loader import load
from qvalidate.rules import RULES, raw, run
from qvalidate.rules.vllm_support import SUPPORT
from qvalidate.targets import ONE_GPU, Deployment, every_target, parse_targets
from qvalidate.validation import predict, validate

FORMATS = [*formats(), MIXED]
(VLLM,) = parse_targets("vllm")
# no Linear of the model has columns for the format
TOO_NARROW = {("llama_odd", "W4A16_AWQ"), ("llama_odd", "W4A8_AWQ")}


def check(path: Path, engine: str | None = None, deployment: Deployment = ONE_GPU) -> list[Finding]:
    """Return what the rules say; without an engine, what those for any engine and vLLM's say."""
    findings = run(load(path, deployment), parse_targets(engine) if engine else ())
    return [found for found in findings if RULES[found.rule].engine in (None, "vllm")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found_at_its_place(fault: Fault, tmp_path: Path) -> None:
    made = draft(fault.model, fault.algo)
    fault.plant(made)
    path = made.write(tmp_path / "made")
    findings = check(path, "vllm" if fault.engine else None, fault.deployment)

    found = [(found.rule, found.where, found.severity) for found in findings]
    assert (fault.rule, fault.where, fault.severity) in found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_finding_names_a_file_of_the_checkpoint(fault: Fault, tmp_path: Path) -> None:
    made = draft(fault.model, fault.algo)
    fault.plant(made)
    path = made.write(tmp_path / "made")

    for found in check(path, "vllm", fault.deployment):
        assert Path(found.file).is_relative_to(path), found


@pytest.mark.parametrize("algo", FORMATS)
@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_right_checkpoint_has_no_findings(model: str, algo: str, tmp_path: Path) -> None:
    path = draft(model, algo).write(tmp_path / "made")
    refusal = [] if algo in SUPPORT else ["vllm-algo-unsupported"]

    assert [found.rule for found in check(path, "vllm")] == refusal
    assert [found.rule for found in check(path)] == refusal


@pytest.mark.parametrize("algo", FORMATS)
@pytest.mark.parametrize("model", ["mixtral", "llama_odd", "llama_adv", "llama_block"])
def test_right_format_has_no_findings_but_an_engines(model: str, algo: str, tmp_path: Path) -> None:
    if (model, algo) in TOO_NARROW:
        return
    findings = check(draft(model, algo).write(tmp_path / "made"))

    assert [found for found in findings if found.severity != "note"] == []
    assert all(RULES[found.rule].engine == "vllm" for found in findings)


@pytest.mark.parametrize("algo", ["FP8", "NVFP4", "W4A16_NVFP4", "MXFP8", MIXED])
def test_mixtral_in_a_format_for_experts_suits_vllm(algo: str, tmp_path: Path) -> None:
    assert check(draft("mixtral", algo).write(tmp_path / "made"), "vllm") == []


@pytest.mark.parametrize("algo", [name for name, found in formats().items() if found.stackable])
def test_right_stack_has_no_findings_but_an_engines(algo: str, tmp_path: Path) -> None:
    made = draft("mixtral", algo)
    made.stack_experts(formats()[algo])
    findings = check(made.write(tmp_path / "made"))

    assert {found.rule for found in findings} - {"vllm-algo-unsupported"} == {
        "vllm-stacked-experts"
    }


@pytest.mark.parametrize("cache", ["FP8", "NVFP4", "NVFP4_AFFINE"])
def test_right_scales_of_the_cache_have_no_findings(cache: str, tmp_path: Path) -> None:
    made = draft("llama", "NVFP4")
    made.quantize_cache(cache)

    assert check(made.write(tmp_path / "made"), "vllm", Deployment(gpu=100)) == []


@pytest.mark.parametrize(
    ("cache", "gpu", "predicted"),
    [
        ("NVFP4", None, "unknown"),
        ("NVFP4", 120, "unknown"),
        ("NVFP4", 103, "loads"),
        ("FP8", None, "loads"),
        ("NVFP4_AFFINE", None, "loads"),
    ],
)
def test_cache_in_nvfp4_hangs_on_vllms_attention(
    cache: str, gpu: int | None, predicted: str, tmp_path: Path
) -> None:
    made = draft("llama", "NVFP4")
    made.quantize_cache(cache)
    found = check(made.write(tmp_path / "made"), "vllm", Deployment(gpu=gpu))

    assert predict(found, VLLM)[0] == predicted


@pytest.mark.parametrize("algo", ["FP8", "NVFP4", "W4A16_NVFP4"])
def test_right_stack_of_llama_4_with_vision_suits_vllm(algo: str, tmp_path: Path) -> None:
    made = draft("mixtral", algo)
    made.stack_experts(formats()[algo])
    made.config["model_type"] = "llama4"

    assert check(made.write(tmp_path / "made"), "vllm") == []


def test_cache_alone_is_quantized(tmp_path: Path) -> None:
    """ModelOpt writes quant_algo null then; vLLM wants one."""
    made = draft("llama", PC_PT)
    made.dequantize_all()
    made.quantize_cache("FP8")
    del made.quantization["quant_algo"], made.nested["exclude_modules"]
    made.quantization["ignore"] = []
    made.nested["quant_algo"] = None

    assert [found.rule for found in check(made.write(tmp_path / "made"))] == [
        "vllm-algo-unsupported"
    ]


@pytest.mark.parametrize("algo", ["NVFP4_AWQ", "W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_smoothing_is_optional_module_by_module(algo: str, tmp_path: Path) -> None:
    made = draft("llama", algo)
    for module in (O_PROJ, DOWN):
        columns = 256 if module == O_PROJ else 384
        scale = ("BF16", (columns,), bytes.fromhex("003f") * columns)
        made.put(f"{module}.pre_quant_scale", scale, beside=f"{module}.weight")

    assert [found.rule for found in check(made.write(tmp_path / "made"))] == [
        "vllm-algo-unsupported"
    ]


@pytest.mark.parametrize("spelling", [MIXED, MIXED.lower()])
def test_mixed_config_may_leave_the_list_to_the_other_file(tmp_path: Path, spelling: str) -> None:
    """In any case of letters, as vLLM takes it."""
    made = draft("llama", MIXED)
    made.quantization["quant_algo"] = spelling
    del made.quantization["quantized_layers"]
    findings = check(made.write(tmp_path / "made"), "vllm")

    assert {found.rule for found in findings} == {"config-malformed"}


def test_ratio_of_fused_scales_is_said(tmp_path: Path) -> None:
    made = draft("llama", "NVFP4")
    made.put(f"{K}.weight_scale_2", ("F32", (), f32(3e-4)))
    (found,) = check(made.write(tmp_path / "made"))

    assert found.message == f"0.0003, {Q}.weight_scale_2 is 0.00015, ratio 2; NVFP4 shares it"


def test_readers_and_support_name_vllm_for_the_same_formats() -> None:
    declared = {
        name
        for name, found in formats().items()
        if any(reader.startswith("vLLM") for reader in found.readers)
    }

    assert declared == set(SUPPORT) - {MIXED}


def test_channel_scales_of_a_ragged_llama_suit_vllm(tmp_path: Path) -> None:
    path = draft("llama_odd", PC_PT).write(tmp_path / "made")

    assert check(path, "vllm") == []


def test_mixtral_with_plain_experts_suits_vllm(tmp_path: Path) -> None:
    made = draft("mixtral", PB_WO, also_keep=("*.experts.*",))
    made.set_exclude(["lm_head", "model.embed_tokens", "model.layers.*.block_sparse_moe*"])

    assert check(made.write(tmp_path / "made"), "vllm") == []


@pytest.mark.parametrize("spelling", ["fp8_pb_wo", "FP8_PB_WO", "Fp8_Pb_Wo"])
def test_algorithm_is_known_in_any_case(spelling: str, tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.quantization["quant_algo"] = spelling
    findings = check(made.write(tmp_path / "made"), "vllm")

    # the strict model knows the two spellings that occur
    assert {found.rule for found in findings} <= {"config-malformed"}


def test_single_block_scale_keeps_its_four_dimensions(tmp_path: Path) -> None:
    """A weight of [128, 128] is one block, and its scale is [1, 1, 1, 1]."""
    made = draft("llama", PB_WO)
    name = "model.layers.0.mlp.down_proj"
    made.put(f"{name}.weight", ("F8_E4M3", (128, 128), bytes((0x38, 0xB8)) * 64 * 128))
    dtype, _, data = made.tensor(f"{name}.weight_scale")
    made.put(f"{name}.weight_scale", (dtype, (1, 1, 1, 1), data[:4]))
    found = check(made.write(tmp_path / "made"))

    # that weight is not this model's
    assert {finding.rule for finding in found} == {"shape-disagrees-with-config"}


def test_message_says_expected_and_found(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    dtype, _, data = made.tensor("model.layers.0.mlp.down_proj.weight_scale")
    made.put("model.layers.0.mlp.down_proj.weight_scale", (dtype, (2, 3), data))
    (found,) = check(made.write(tmp_path / "made"))

    assert found.message == (
        "expected shape [2, 1, 3, 1] for weight [256, 384] in FP8_PB_WO, got [2, 3] (rank 2)"
    )


def test_engine_rules_soften_without_the_engine(tmp_path: Path) -> None:
    """What one engine would refuse or get wrong is a note without it, an error with it."""
    refused = draft("mixtral", PB_WO).write(tmp_path / "refused")
    made = draft("qwen3", PB_WO)
    made.set_exclude(["model.embed_tokens"])
    wrong = made.write(tmp_path / "wrong")

    assert {found.severity for found in check(refused)} == {"note"}
    assert {found.severity for found in check(wrong)} == {"note"}
    assert {found.severity for found in check(refused, "vllm")} == {"error"}
    assert {found.severity for found in check(wrong, "vllm")} == {"error"}


def test_number_of_a_vision_layer_is_not_counted_up_to(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    norm = made.tensor("model.norm.weight")
    made.put("vision.layers.99999999999.x.weight", norm, beside="model.norm.weight")
    made.put("vision.layers.999999.x.weight", norm, beside="model.norm.weight")
    (found,) = check(made.write(tmp_path / "made"))

    assert found.rule == "missing-module"
    assert found.message.endswith("vision.layers.4, ... (999999 in all)")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain_checkpoint", "loads"),
        ("config_of_a_plain_checkpoint", "loads-but-wrong"),
        ("no_quantization_config_at_all", "refuses"),
        ("no_quant_method", "refuses"),
        ("one_part_of_qkv_unquantized_and_not_listed", "loads-but-wrong"),
        ("one_part_of_qkv_unquantized", "refuses"),
        ("one_part_of_qkv_listed", "refuses"),
        ("stray_file_beside_an_index", "loads"),
        ("stray_file_without_an_index", "refuses"),
        ("missing_o_proj", "loads-but-wrong"),
        ("module_without_its_weight", "loads-but-wrong"),
        ("missing_embedding", "loads-but-wrong"),
        ("missing_scale", "loads-but-wrong"),
        ("missing_block_scales", "refuses"),
        ("nan_among_block_scales", "refuses"),
        ("plain_linear_in_no_list", "refuses"),
        ("missing_global_scale", "loads-but-wrong"),
        ("nan_global_scale", "loads-but-wrong"),
    ],
)
def test_prediction_is_what_vllm_does(name: str, expected: str, tmp_path: Path) -> None:
    """As seen with vLLM 0.32."""
    fault = next(fault for fault in FAULTS if fault.name == name)
    made = draft(fault.model, fault.algo)
    fault.plant(made)
    findings = check(made.write(tmp_path / "made"), "vllm")

    assert predict(findings, VLLM)[0] == expected
    assert any(found.severity == "error" for found in findings)


def test_vllm_drops_the_input_scale_of_a_weight_only_format(tmp_path: Path) -> None:
    made = draft("llama", "W4A16_NVFP4")
    made.put(f"{Q}.input_scale", ("F32", (), f32(0.5)), beside=f"{Q}.weight")
    findings = check(made.write(tmp_path / "made"), "vllm")

    assert [(found.rule, found.severity) for found in findings] == [("orphan-tensor", "warning")]
    assert predict(findings, VLLM) == ("loads", [])


def test_vllm_looks_at_no_scale_of_experts(tmp_path: Path) -> None:
    made = draft("mixtral", "NVFP4")
    made.pop("model.layers.0.block_sparse_moe.experts.0.w1.weight_scale")
    findings = check(made.write(tmp_path / "made"), "vllm")

    assert predict(findings, VLLM) == ("loads-but-wrong", ["missing-tensor"])


def test_every_rule_has_a_fault() -> None:
    """Those for one other engine have theirs beside their own tests."""
    expected = {name for name, found in RULES.items() if found.engine in (None, "vllm")}

    assert {fault.rule for fault in FAULTS} == expected


def test_nan_among_the_codes_loads_right_in_no_engine(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    dtype, shape, data = made.tensor(f"{Q}.weight")
    made.put(f"{Q}.weight", (dtype, shape, b"\x7f" + data[1:]))
    findings = list(raw(load(made.write(tmp_path / "made")), every_target()))

    for target in every_target():
        assert predict(findings, target) == ("loads-but-wrong", ["codes-nan"]), target


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8", "awq"])
def test_another_dialect_is_neither_right_nor_wrong(tmp_path: Path, method: str) -> None:
    """Its names are not ModelOpt's, so the rules about those would only cry wolf."""
    made = draft("llama", PC_PT)
    made.hf_quant_config = {}
    made.quantization["quant_method"] = method
    result = validate(made.write(tmp_path / "made"))

    assert [found.rule for found in result.findings] == ["other-dialect"]
    assert {report.predicted for report in result.engines} == {"unknown"}
