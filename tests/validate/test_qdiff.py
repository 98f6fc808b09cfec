"""qdiff on documents: what is a difference of meaning, what is only another spelling."""

import json
import math
import shutil
from pathlib import Path

import pytest
from catalogue import PB_WO
from checkpoints import FIXTURES, MIXED, Draft, draft
from qdiff_edits import DOWN, Edit, after, between

from qschema.strict import Json
from qvalidate.diff.comparison import compare
from qvalidate.diff.documents import differences

LLAMA = FIXTURES / "llama"


@pytest.mark.parametrize("model", ["llama", "mixtral", "qwen3"])
@pytest.mark.parametrize("algo", [PB_WO, "NVFP4", MIXED])
def test_same_checkpoint_twice_is_the_same(tmp_path: Path, model: str, algo: str) -> None:
    path = draft(model, algo).write(tmp_path / "one")
    result = compare(path, path)

    assert result.areas == ()
    assert (result.exit_code, result.spelling, result.notes) == (0, [], [])
    assert result.tensors.num_equal == result.a.num_tensors


def nest(made: Draft) -> None:
    made.config["quantization_config"] = made.hf_quant_config | {"quant_method": "modelopt"}


def turn_around(made: Draft) -> None:
    made.set_exclude([*reversed(made.exclude)])


def shout(made: Draft) -> None:
    for config in made.each_config():
        config["quant_algo"] = str(config["quant_algo"]).upper()


def write_exclusions_otherwise(made: Draft) -> None:
    made.set_exclude(["*head", "*.embed_tokens", "no.such.module"])


def name_another_producer(made: Draft) -> None:
    made.quantization["producer"] = {"name": "modelopt", "version": "0.1"}


def upgrade_transformers(made: Draft) -> None:
    made.config["transformers_version"] = "99.0"


def name_the_dtype_as_before(made: Draft) -> None:
    made.config["torch_dtype"] = made.config.pop("dtype")


def leave_out_config_groups(made: Draft) -> None:
    made.quantization["config_groups"] = {"group_0": {"targets": ["Linear"]}}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (nest, "quantization_config is flat in A, nested in B"),
        (shout, "quant_algo is spelt fp8_pb_wo in A, FP8_PB_WO in B"),
        (shout, "hf_quant_config.json is written differently and means the same"),
        (turn_around, "the exclusions are in another order"),
        (write_exclusions_otherwise, "leave out the same modules"),
        (name_another_producer, "producer: modelopt 0.47.0 -> modelopt 0.1"),
        (upgrade_transformers, "$.transformers_version: "),
        (name_the_dtype_as_before, "torch_dtype and dtype are one key"),
        (leave_out_config_groups, "config_groups, which restate the format, are in B only"),
    ],
)
def test_spelling_is_told_and_is_no_difference(tmp_path: Path, edit: Edit, words: str) -> None:
    result = after(tmp_path, edit)

    assert result.areas == ()
    assert any(words in line for line in result.spelling), result.spelling


def test_nested_config_may_state_what_the_format_implies(tmp_path: Path) -> None:
    assert after(tmp_path, nest, algo="NVFP4").areas == ()


def test_config_is_compared_by_path(tmp_path: Path) -> None:
    def change(made: Draft) -> None:
        made.config["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
        made.config["new"] = None
        del made.config["hidden_act"]

    result = after(tmp_path, change)

    assert result.areas == ("config",)
    assert [(item.where, item.a, item.b) for item in result.config] == [
        ("$.hidden_act", '"silu"', None),
        ("$.rope_parameters.rope_theta", "10000.0", "7.0"),
        ("$.new", None, "null"),
    ]


def test_generation_config_is_compared_by_path(tmp_path: Path) -> None:
    path = Path(shutil.copytree(LLAMA, tmp_path / "b"))
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 7}))
    (change,) = compare(LLAMA, path).config

    assert (change.file, change.where, change.b) == (
        "generation_config.json",
        "$.eos_token_id",
        "7",
    )


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        ({"x": 1}, {"x": 1.0}, []),
        ({"x": math.nan}, {"x": math.nan}, []),
        ({"x": 1}, {"x": True}, [("x",)]),
        ({"x": 0}, {"x": None}, [("x",)]),
        ({"x": [1, 2]}, {"x": [1, 3]}, [("x", 1)]),
        ({"x": [1, 2]}, {"x": [1]}, [("x",)]),
        ({}, {"x": None}, [("x",)]),
        ({"x": {"y": 1}}, {"x": {}}, [("x", "y")]),
    ],
)
def test_values_of_json_are_the_same_or_not(
    a: Json, b: Json, where: list[tuple[str | int, ...]]
) -> None:
    assert [place for place, _, _ in differences(a, b)] == where


def test_format_is_said_in_words(tmp_path: Path) -> None:
    one, other = draft("llama", PB_WO), draft("llama", "NVFP4")
    result = compare(one.write(tmp_path / "a"), other.write(tmp_path / "b"))
    (change,) = result.quantization.changes

    assert (change.what, change.a, change.b) == ("format", "FP8_PB_WO", "NVFP4")
    assert [(item.a, item.b, len(item.modules)) for item in result.quantization.assignments] == [
        ("FP8_PB_WO", "NVFP4", 14)
    ]


def test_module_that_becomes_excluded_is_named(tmp_path: Path) -> None:
    result = after(tmp_path, lambda made: made.set_exclude([*made.exclude, "*0.mlp.down_proj"]))
    (change,) = result.quantization.assignments

    assert (change.a, change.b, change.modules) == ("FP8_PB_WO", "excluded", [DOWN])


def test_module_that_is_excluded_no_more_is_named(tmp_path: Path) -> None:
    result = after(tmp_path, lambda made: made.set_exclude(["model.embed_tokens"]))
    (change,) = result.quantization.assignments

    assert (change.a, change.b, change.modules) == ("excluded", "FP8_PB_WO", ["lm_head"])


def test_head_without_a_weight_counts_among_the_excluded(tmp_path: Path) -> None:
    def forget(made: Draft) -> None:
        made.set_exclude([name for name in made.exclude if name != "lm_head"])

    (change,) = after(tmp_path, forget, model="qwen3").quantization.assignments

    assert (change.a, change.b, change.modules) == ("excluded", "FP8_PB_WO", ["lm_head"])


def test_list_of_layers_in_one_file_only_is_a_difference(tmp_path: Path) -> None:
    """vLLM takes it from hf_quant_config.json then, and other engines have none."""
    result = after(tmp_path, lambda made: made.quantization.pop("quantized_layers"), algo=MIXED)
    (change,) = result.quantization.fields

    assert (change.where, change.b) == ("$.quantization_config.quantized_layers", None)


def test_module_of_a_mixed_checkpoint_has_its_own_change(tmp_path: Path) -> None:
    def swap(made: Draft) -> None:
        for config in made.each_config():
            layers = config["quantized_layers"]
            assert isinstance(layers, dict)
            layers[DOWN] = {"quant_algo": "FP8"}

    (change,) = after(tmp_path, swap, algo=MIXED).quantization.assignments

    assert (change.a, change.b, change.modules) == ("NVFP4", "FP8", [DOWN])


def test_field_of_one_layer_has_its_path(tmp_path: Path) -> None:
    def regroup(made: Draft) -> None:
        layers = made.quantization["quantized_layers"]
        assert isinstance(layers, dict)
        layers[DOWN]["group_size"] = 32

    # the draft's two documents share the object
    change, _ = after(tmp_path, regroup, algo=MIXED).quantization.fields

    assert change.where == f"$.quantization_config.quantized_layers['{DOWN}'].group_size"
    assert (change.a, change.b) == ("16", "32")


def test_quantized_cache_is_said_in_words(tmp_path: Path) -> None:
    result = after(tmp_path, lambda made: made.quantize_cache("FP8"))
    (change,) = result.quantization.changes

    assert (change.what, change.a, change.b) == ("kv cache", "none", "FP8")
    assert {entry.name.rpartition(".")[2] for entry in result.tensors.added} == {
        "k_scale",
        "v_scale",
    }


def in_words(made: Draft) -> None:
    made.quantization["kv_cache_scheme"] = "FP8"


@pytest.mark.parametrize(("num_bits", "areas"), [(8, ()), (4, ("quantization",))])
def test_scheme_of_the_cache_is_that_of_its_name(
    tmp_path: Path, num_bits: int, areas: tuple[str, ...]
) -> None:
    def in_numbers(made: Draft) -> None:
        scheme = {"dynamic": False, "num_bits": num_bits, "type": "float"}
        made.quantization["kv_cache_scheme"] = scheme

    assert between(tmp_path, in_words, in_numbers).areas == areas


def test_cache_that_is_quantized_with_the_model_is_said_too(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.quantize_cache("NVFP4")
    changes = compare(LLAMA, made.write(tmp_path / "b"), weights=False).quantization.changes

    assert [(item.what, item.b) for item in changes] == [
        ("format", "FP8_PB_WO"),
        ("kv cache", "NVFP4"),
    ]


def test_file_that_config_json_outranks_is_compared_too(tmp_path: Path) -> None:
    def stale(made: Draft) -> None:
        made.nested["quant_algo"] = "FP8"

    (change,) = after(tmp_path, stale).quantization.fields

    assert (change.file, change.where) == ("hf_quant_config.json", "$.quantization.quant_algo")


def test_config_in_one_place_only_is_a_difference(tmp_path: Path) -> None:
    result = after(tmp_path, lambda made: made.config.pop("quantization_config"))
    (change,) = result.quantization.changes

    assert (change.what, change.a, change.b) == (
        "place",
        "config.json::$.quantization_config",
        "hf_quant_config.json only",
    )


def test_another_place_in_config_json_is_a_difference(tmp_path: Path) -> None:
    def move(made: Draft) -> None:
        made.config["text_config"] = {"quantization_config": made.config.pop("quantization_config")}

    (change,) = after(tmp_path, move).quantization.changes

    assert (change.what, change.b) == (
        "place",
        "config.json::$.text_config.quantization_config",
    )


def test_unquantized_against_quantized_names_the_format(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "b")
    quantization = compare(LLAMA, path, weights=False).quantization

    assert [(item.what, item.a, item.b) for item in quantization.changes] == [
        ("format", "none", "FP8_PB_WO")
    ]
    assert [(item.a, len(item.modules)) for item in quantization.assignments] == [
        ("unquantized", 14)
    ]
