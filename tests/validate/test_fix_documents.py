"""What `qvalidate fix` makes of config.json and hf_quant_config.json."""

from pathlib import Path

import pytest
from catalogue import PB_WO, PC_PT, Q
from checkpoints import MIXED, draft, quantized
from fixing import in_json, planted, repaired, rules_of

from qschema.formats import formats
from qvalidate.fix import fix
from qvalidate.loader import load
from qvalidate.rules import RULES


def test_upper_case_of_blocks_becomes_what_tensorrt_llm_reads(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    for config in made.each_config():
        config["quant_algo"] = "FP8_PB_WO"
    report = repaired(made, tmp_path)

    assert [(repair.id, repair.becomes) for repair in report.repairs] == [
        ("algo-corrected", '"fp8_pb_wo"')
    ] * 2


def test_config_json_is_made_from_the_other_document(tmp_path: Path) -> None:
    made = draft("llama", "NVFP4")
    wanted = dict(made.quantization)
    del made.config["quantization_config"]
    report = repaired(made, tmp_path)

    found = in_json(tmp_path / "out", "config.json")["quantization_config"]
    assert isinstance(found, dict)
    assert found.pop("config_groups") == {
        "group_0": {**formats()["NVFP4"].config_group, "targets": ["Linear"]}
    }
    assert found == wanted
    assert rules_of(report) == set()


@pytest.mark.parametrize("algo", ["NVFP4", "NVFP4_AWQ", PB_WO, MIXED])
def test_hf_quant_config_is_made_from_config_json(algo: str, tmp_path: Path) -> None:
    made = draft("llama", algo)
    wanted = made.hf_quant_config
    made.hf_quant_config = {}
    repaired(made, tmp_path)

    assert in_json(tmp_path / "out", "hf_quant_config.json") == wanted


def test_hf_quant_config_that_is_not_json_is_made_again(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    wanted = in_json(path, "hf_quant_config.json")
    (path / "hf_quant_config.json").write_text("{")
    report = fix(path, tmp_path / "out")

    assert [found.rule for found in report.before] == ["json-syntax"]
    assert in_json(tmp_path / "out", "hf_quant_config.json") == wanted
    assert rules_of(report) == set()


def test_flat_hf_quant_config_becomes_nested(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    wanted = made.hf_quant_config
    made.hf_quant_config = dict(made.quantization)
    report = repaired(made, tmp_path)

    assert in_json(tmp_path / "out", "hf_quant_config.json") == wanted
    assert rules_of(report) == set()


@pytest.mark.parametrize("algo", ["NVFP4", "MXFP8", MIXED])
def test_nested_form_in_config_json_becomes_flat(algo: str, tmp_path: Path) -> None:
    """vLLM refuses MXFP8 in it, SGLang 0.5.23 loses its exclusions."""
    made = draft("llama", algo)
    wanted = dict(made.quantization)
    made.config["quantization_config"] = made.hf_quant_config
    repaired(made, tmp_path)

    found = in_json(tmp_path / "out", "config.json")["quantization_config"]
    assert isinstance(found, dict)
    assert {key: found[key] for key in wanted} == wanted


def test_experts_that_are_listed_one_by_one_are_listed_together_too(tmp_path: Path) -> None:
    """SGLang 0.5.23 ignores the names of single experts, and casts their weights by value."""
    made = draft("mixtral", PB_WO, also_keep=("*.experts.*",))
    repaired(made, tmp_path)

    listed = load(tmp_path / "out").exclude
    assert listed[len(made.exclude) :] == tuple(
        f"model.layers.{layer}.block_sparse_moe.experts*" for layer in (0, 1)
    )


def test_documents_follow_what_is_stored_where_they_disagree(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.quantization["quant_algo"] = PC_PT
    report = repaired(made, tmp_path)

    (found,) = report.repairs
    assert (found.file, found.was, found.becomes) == ("config.json", f'"{PC_PT}"', '"fp8_pb_wo"')
    assert found.where == "$.quantization_config.quant_algo"


def test_groups_of_another_format_go_with_its_name(tmp_path: Path) -> None:
    made = draft("llama", "NVFP4")
    targets = {"targets": ["Linear"]}
    for config in made.each_config():
        config["quant_algo"] = "FP8"
    made.quantization["config_groups"] = {"group_0": {**formats()["FP8"].config_group, **targets}}
    repaired(made, tmp_path)

    found = in_json(tmp_path / "out", "config.json")["quantization_config"]
    assert isinstance(found, dict)
    assert found["quant_algo"] == "NVFP4"
    assert found["config_groups"] == {"group_0": {**formats()["NVFP4"].config_group, **targets}}


def test_documents_that_agree_stand_where_nothing_else_fits(tmp_path: Path) -> None:
    made = draft("qwen3", "NVFP4")
    for tensors in made.shards.values():
        for name, (_, shape, data) in tensors.items():
            if name.endswith("weight_scale"):
                tensors[name] = ("U8", shape, data)
    report = repaired(made, tmp_path)

    assert report.repairs == []
    assert rules_of(report) == {"wrong-dtype"}


def test_weight_with_a_part_below_its_module_is_of_no_known_format(tmp_path: Path) -> None:
    """SVDQuant's low-rank part is added to a weight that looks like NVFP4."""
    made = draft("llama", "NVFP4")
    for config in made.each_config():
        config["quant_algo"] = "NVFP4_SVD"
    part = ("BF16", (8, 256), bytes(2 * 8 * 256))
    made.put(f"{Q}.weight_quantizer._svdquant_lora_a", part, beside=f"{Q}.weight")
    report = repaired(made, tmp_path)

    assert report.repairs == []
    assert [left.rule for left in report.left] == ["unknown-algo"]


def test_entry_in_the_engines_spelling_of_blocks_stays(tmp_path: Path) -> None:
    """SGLang and vLLM read FP8_BLOCK_SCALES in quantized_layers, with a 2-D weight_scale_inv."""
    made = draft("llama", {"*o_proj": PB_WO, "*": "FP8"})
    for config in made.each_config():
        layers = config["quantized_layers"]
        assert isinstance(layers, dict)
        for name in [name for name in layers if name.endswith("o_proj")]:
            layers[name] = {"quant_algo": "FP8_BLOCK_SCALES"}
    report = repaired(made, tmp_path)

    assert report.repairs == []


def test_entry_that_is_not_told_comes_along_into_a_document_that_is_made(tmp_path: Path) -> None:
    made = draft("llama", {"*o_proj": PB_WO, "*": "FP8"})
    for config in made.each_config():
        layers = config["quantized_layers"]
        assert isinstance(layers, dict)
        for name in [name for name in layers if name.endswith("o_proj")]:
            layers[name] = {"quant_algo": "FP8_BLOCK_SCALES"}
    wanted = made.nested["quantized_layers"]
    made.hf_quant_config = {}
    repaired(made, tmp_path)

    found = in_json(tmp_path / "out", "hf_quant_config.json")["quantization"]
    assert isinstance(found, dict)
    assert found["quantized_layers"] == wanted


def test_plain_experts_beside_a_quantized_shared_one_are_named(tmp_path: Path) -> None:
    """vLLM would take them for quantized, by the entry of the shared one."""
    fault = planted("plain_experts_beside_a_quantized_shared_one")
    made = draft(fault.model, fault.algo)
    fault.plant(made)
    owner = "model.layers.0.block_sparse_moe"
    beside = f"{owner}.gate.weight"
    for suffix, tensor in quantized(formats()["NVFP4"], (128, 256), seed="shared").items():
        made.put(f"{owner}.shared_expert.up_proj.{suffix}", tensor, beside=beside)
    for config in made.each_config():
        layers = config["quantized_layers"]
        assert isinstance(layers, dict)
        layers[f"{owner}.shared_expert.up_proj"] = {"quant_algo": "NVFP4", "group_size": 16}
    report = repaired(made, tmp_path)

    assert "vllm-layers-overreach" not in rules_of(report)
    assert load(tmp_path / "out").exclude == (f"{owner}.experts*",)


def test_formats_of_the_same_tensors_are_not_told_apart(tmp_path: Path) -> None:
    """MXFP4 and W4A8_MXFP4_FP8 differ in what the engine does with inputs."""
    made = draft("llama", "MXFP4")
    made.nested["quant_algo"] = "W4A8_MXFP4_FP8"
    report = repaired(made, tmp_path)

    assert report.repairs == []
    assert [left.rule for left in report.left] == ["config-algo-disagrees"]
    assert report.exit_code == 1


def test_cache_follows_the_stored_scales(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    made.quantize_cache("FP8")
    del made.quantization["kv_cache_scheme"]
    report = repaired(made, tmp_path)

    found = in_json(tmp_path / "out", "config.json")["quantization_config"]
    assert isinstance(found, dict)
    assert found["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert rules_of(report) == set()


def test_cache_that_only_a_document_of_the_wrong_form_names_stays(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    made.config["quantization_config"] = {
        "producer": made.hf_quant_config["producer"],
        "quantization": {**made.nested, "kv_cache_quant_algo": "FP8"},
    }
    report = repaired(made, tmp_path)

    found = in_json(tmp_path / "out", "config.json")["quantization_config"]
    assert isinstance(found, dict)
    assert found["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert "config-kv-disagrees" in rules_of(report)


def test_lost_calibration_is_no_other_format(tmp_path: Path) -> None:
    """NVFP4 without any input_scale is W4A16_NVFP4 in every byte, but nobody said so."""
    made = draft("llama", "NVFP4")
    for tensors in made.shards.values():
        for name in [name for name in tensors if name.endswith("input_scale")]:
            del tensors[name]
    report = repaired(made, tmp_path)

    assert report.repairs == []
    assert rules_of(report) == {"missing-tensor"}


def test_input_scales_of_an_older_weight_only_export_make_it_no_nvfp4(tmp_path: Path) -> None:
    made = draft("qwen3", "NVFP4")
    for config in made.each_config():
        config["quant_algo"] = "W4A16_NVFP4"
    report = repaired(made, tmp_path)

    assert report.repairs == []


def test_another_dialect_is_left_as_it_is(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.quantization["quant_method"] = "fp8"
    made.hf_quant_config = {}
    report = repaired(made, tmp_path)

    assert report.repairs == []
    assert report.notes == ["documents of the dialect 'fp8' are left as they are"]


def test_one_document_names_each_layer_where_the_layers_differ(tmp_path: Path) -> None:
    made = draft("llama", MIXED)
    made.quantization["quant_algo"] = "FP8"
    del made.quantization["quantized_layers"]
    report = repaired(made, tmp_path)

    found = in_json(tmp_path / "out", "config.json")["quantization_config"]
    assert isinstance(found, dict)
    assert found["quant_algo"] == MIXED
    assert found["quantized_layers"] == made.nested["quantized_layers"]
    assert rules_of(report) == set()


def test_all_experts_of_a_layer_are_one_entry(tmp_path: Path) -> None:
    made = draft("mixtral", MIXED)
    name = "model.layers.0.block_sparse_moe.experts"
    for config in made.each_config():
        layers = dict(config["quantized_layers"])  # type: ignore[call-overload]
        del layers[name]
        config["quantized_layers"] = layers
    report = repaired(made, tmp_path)

    assert {repair.where.rpartition("quantized_layers.")[2] for repair in report.repairs} == {name}
    assert rules_of(report) == set()


def test_config_of_the_language_model_is_repaired_in_its_place(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    del made.quantization["quant_method"]
    made.config["text_config"] = {"quantization_config": made.config.pop("quantization_config")}
    repaired(made, tmp_path)

    config = in_json(tmp_path / "out", "config.json")
    assert "quantization_config" not in config
    assert config["text_config"]["quantization_config"]["quant_method"] == "modelopt"  # type: ignore[index]


def test_every_rule_named_as_left_exists(tmp_path: Path) -> None:
    """Loading's own findings apart."""
    made = draft("llama", "MXFP4")
    made.nested["quant_algo"] = "W4A8_MXFP4_FP8"

    assert {left.rule for left in repaired(made, tmp_path).left} <= RULES.keys()
