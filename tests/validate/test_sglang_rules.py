"""What SGLang 0.5.17 and 0.5.23 do with a checkpoint: planted faults, and no false alarm."""

from pathlib import Path

import pytest
from catalogue import Fault
from checkpoints import MIXED, Draft, draft, f32
from sglang_faults import FAULTS, only_nested

from qschema.formats import formats
from qschema.strict import Finding
from qvalidate.loader import load
from qvalidate.rules import RULES, raw
from qvalidate.targets import ONE_GPU, Deployment, parse_targets
from qvalidate.validation import predict

OLD, NEW = "0.5.17", "0.5.23"
# what both versions load, whatever the model
BOTH_LOAD = ("FP8", "NVFP4", "NVFP4_AWQ")


def found(
    made: Draft, tmp_path: Path, version: str = "", deployment: Deployment = ONE_GPU
) -> list[Finding]:
    """Return the findings of every rule that holds for SGLang, in one version or any."""
    path = made.write(tmp_path / "made")
    return list(raw(load(path, deployment), parse_targets(_spelled(version))))


def predicted(
    made: Draft, tmp_path: Path, version: str, deployment: Deployment = ONE_GPU
) -> tuple[str, list[str]]:
    (target,) = parse_targets(_spelled(version))
    return predict(found(made, tmp_path, version, deployment), target)


def _spelled(version: str) -> str:
    return f"sglang=={version}" if version else "sglang"


def planted(fault: Fault) -> Draft:
    made = draft(fault.model, fault.algo)
    fault.plant(made)
    return made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_found_at_its_place(fault: Fault, tmp_path: Path) -> None:
    findings = found(planted(fault), tmp_path, deployment=fault.deployment)
    places = [(finding.rule, finding.where, finding.severity) for finding in findings]

    assert (fault.rule, fault.where, fault.severity) in places


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_finding_names_a_file_of_the_checkpoint(fault: Fault, tmp_path: Path) -> None:
    for finding in found(planted(fault), tmp_path, deployment=fault.deployment):
        assert Path(finding.file).is_relative_to(tmp_path / "made"), finding


def test_every_sglang_rule_has_a_fault() -> None:
    rules = {rule_id for rule_id, rule in RULES.items() if rule.engine == "sglang"}

    assert {fault.rule for fault in FAULTS} == rules
    assert all(rule_id.startswith("sglang-") for rule_id in rules)


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("algo", BOTH_LOAD)
@pytest.mark.parametrize("model", ["llama", "qwen3", "mixtral", "llama_adv", "llama_block"])
def test_right_checkpoint_has_no_findings(
    model: str, algo: str, version: str, tmp_path: Path
) -> None:
    made = draft(model, algo)

    assert found(made, tmp_path, version, Deployment(gpu=90)) == []


@pytest.mark.parametrize(
    ("model", "algo", "gpu"),
    [
        ("llama", "W4A16_NVFP4", 90),
        ("qwen3", "W4A16_NVFP4", 80),
        ("mixtral", "W4A16_NVFP4", 90),
        ("qwen3", "MXFP8", 100),
        ("mixtral", "MXFP8", 100),
        ("llama_odd", "NVFP4", 90),
    ],
)
def test_0523_loads_what_it_has_learnt(model: str, algo: str, gpu: int, tmp_path: Path) -> None:
    assert found(draft(model, algo), tmp_path, NEW, Deployment(gpu=gpu)) == []


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("algo", sorted(set(formats()) - {*BOTH_LOAD, "MXFP8", "W4A16_NVFP4"}))
def test_other_formats_are_refused(algo: str, version: str, tmp_path: Path) -> None:
    verdict, by = predicted(draft("llama", algo), tmp_path, version)

    assert (verdict, by) == ("refuses", ["sglang-config-unsupported"])


@pytest.mark.parametrize(
    ("model", "algo", "expected"),
    [
        ("llama", "FP8", "loads"),
        ("qwen3", "FP8", "loads"),
        ("mixtral", "FP8", "loads"),
        ("llama", "FP8_PB_WO", "refuses"),
        ("llama", "FP8_PER_CHANNEL_PER_TOKEN", "refuses"),
        ("llama", "MXFP8", "refuses"),
        ("llama", "MXFP4", "refuses"),
        ("llama", "W4A8_MXFP4_FP8", "refuses"),
        ("llama", "W4A16_AWQ", "refuses"),
        ("llama", "W4A8_AWQ", "refuses"),
        ("llama", "W8A16", "refuses"),
        ("llama", "W8A8_SQ_PER_CHANNEL", "refuses"),
        ("llama", "W4A16_NVFP4", "refuses"),
        ("llama", MIXED, "refuses"),
        ("qwen3", MIXED, "refuses"),
        ("mixtral", MIXED, "refuses"),
        ("mixtral", "FP8_PER_CHANNEL_PER_TOKEN", "refuses"),
    ],
)
def test_0517_does_what_it_did_on_an_h200(
    model: str, algo: str, expected: str, tmp_path: Path
) -> None:
    made = draft(model, algo)

    assert predicted(made, tmp_path, OLD, Deployment(gpu=90))[0] == expected


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("blocks_by_their_name_in_small_letters", "refuses", "refuses"),
        ("blocks_by_their_name_in_capitals_in_the_file", "refuses", "loads-but-wrong"),
        ("nested_form_inside_config_json", "refuses", "refuses"),
        ("exclusions_of_the_nested_form", "loads", "loads-but-wrong"),
        ("exclusions_under_the_other_key", "loads-but-wrong", "loads-but-wrong"),
        ("exclusions_of_nvfp4_under_the_other_key", "refuses", "loads"),
        ("method_in_capitals", "unknown", "unknown"),
        ("mixed_llama", "refuses", "refuses"),
        ("file_alone_with_an_unknown_name", "loads-but-wrong", "loads-but-wrong"),
        ("file_alone_in_a_model_that_looks_names_up", "refuses", "refuses"),
        ("mxfp8_by_the_file_alone", "refuses", "loads-but-wrong"),
        ("smoothing_in_a_format_without", "loads-but-wrong", "loads-but-wrong"),
        ("mixed_without_nvfp4", "loads-but-wrong", "loads-but-wrong"),
        ("wildcards_over_packed_parts", "refuses", "refuses"),
        ("experts_listed_one_by_one", "loads-but-wrong", "loads-but-wrong"),
        ("one_part_of_qkv_listed", "refuses", "refuses"),
        ("mxfp8_of_a_llama", "refuses", "loads-but-wrong"),
        ("cache_of_qwen3", "loads", "loads"),
        ("cache_of_large_values", "loads-but-wrong", "loads-but-wrong"),
        ("cache_of_mixtral", "loads", "loads"),
        ("smoothing_of_fused_parts", "refuses", "refuses"),
        ("smoothing_under_marlin", "loads-but-wrong", "loads-but-wrong"),
        ("rows_that_marlin_does_not_pad", "refuses", "loads"),
        ("model_in_float32", "loads", "loads"),
    ],
)
def test_versions_differ_where_they_do(name: str, old: str, new: str, tmp_path: Path) -> None:
    fault = next(fault for fault in FAULTS if fault.name == name)
    verdicts = []
    for version in (OLD, NEW):
        folder = tmp_path / version
        folder.mkdir()
        verdicts.append(predicted(planted(fault), folder, version, fault.deployment)[0])

    assert verdicts == [old, new]


@pytest.mark.parametrize("algo", ["FP8", "NVFP4"])
def test_file_alone_serves_where_the_name_is_known(algo: str, tmp_path: Path) -> None:
    made = draft("llama", algo)
    only_nested(made)

    assert predicted(made, tmp_path, OLD) == ("loads", [])


def test_missing_quant_method_is_modelopts(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    del made.quantization["quant_method"]

    assert predicted(made, tmp_path, NEW) == ("loads", [])


@pytest.mark.parametrize("gpu", [None, 100])
def test_smoothing_of_o_proj_is_right_but_under_marlin(gpu: int | None, tmp_path: Path) -> None:
    made = draft("llama", "NVFP4_AWQ")
    next(fault for fault in FAULTS if fault.name == "smoothing_under_marlin").plant(made)

    assert found(made, tmp_path, NEW, Deployment(gpu=gpu)) == []


def test_scales_of_a_cache_are_loaded_by_llama(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    made.quantize_cache("FP8")

    assert found(made, tmp_path) == []


def test_experts_are_excluded_by_a_pattern_for_all(tmp_path: Path) -> None:
    made = draft("mixtral", "FP8", also_keep=("*.experts.*",))
    made.set_exclude(["lm_head", "model.embed_tokens", "model.layers.*.block_sparse_moe*"])

    assert found(made, tmp_path) == []


def test_mixed_qwen3_moe_has_its_fused_names(tmp_path: Path) -> None:
    made = draft("mixtral", MIXED)
    made.config["model_type"] = "qwen3_moe"
    rules = {finding.rule for finding in found(made, tmp_path)}

    assert not {rule for rule in rules if rule.startswith("sglang-")}


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale"])
def test_a_scale_that_is_missing_stays_unset(suffix: str, tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    made.pop(f"model.layers.0.self_attn.o_proj.{suffix}")

    assert predicted(made, tmp_path, OLD) == ("loads-but-wrong", ["missing-tensor"])


def test_causes_are_told_once(tmp_path: Path) -> None:
    """Four layers of a mixed Llama, two in each decoder layer, have one cause for each kind."""
    findings = found(draft("llama", MIXED), tmp_path, NEW)
    told = [finding.message for finding in findings if finding.rule == "sglang-codes-refused"]

    assert told == [
        "SGLang's llama does not map its gate_up_proj to the parts of it, so that quantized_layers "
        "does not name it (model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj, "
        "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj)"
    ]


def test_a_large_global_scale_is_no_matter_where_marlin_does_not_run(tmp_path: Path) -> None:
    made = draft("llama", "NVFP4")
    for name in ("q_proj", "k_proj", "v_proj"):
        scale = ("F32", (), f32(512.0))
        made.put(f"model.layers.0.self_attn.{name}.weight_scale_2", scale)

    assert predicted(made, tmp_path, NEW, Deployment(gpu=100)) == ("loads", [])


def test_a_plain_stack_of_experts_that_is_not_excluded_is_found(tmp_path: Path) -> None:
    """It has a name, but is no module with a weight."""
    made = draft("mixtral", "FP8")
    name = "model.layers.0.block_sparse_moe.experts.down_proj"
    made.pop_module(name.rpartition(".")[0])
    beside = "model.layers.0.self_attn.q_proj.weight"
    made.put(name, ("BF16", (4, 256, 256), bytes(2 * 4 * 256 * 256)), beside=beside)
    made.config["model_type"] = "gpt_oss"
    findings = found(made, tmp_path, NEW)

    assert ("sglang-plain-cast", name) in [(item.rule, item.where) for item in findings]
