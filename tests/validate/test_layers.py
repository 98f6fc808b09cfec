"""Which layers lack what the others have, and which are just of another kind."""

from pathlib import Path

import pytest
from catalogue import PB_WO
from checkpoints import Draft, draft

from qschema.architectures import KNOWN
from qvalidate.loader import load
from qvalidate.rules.layers import Layers, alike
from qvalidate.rules.modules import missing_module
from qvalidate.rules.required import LAYER_PARTS

ATTENTION = {f"self_attn.{name}_proj.weight" for name in "qkvo"} | {"input_layernorm.weight"}
LINEAR = {"linear_attn.in_proj.weight", "linear_attn.out_proj.weight", "input_layernorm.weight"}
DENSE = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
EXPERTS = {"mlp.gate.weight"} | {f"mlp.experts.*.{name.removeprefix('mlp.')}" for name in DENSE}
SHARED = {f"mlp.shared_experts.{name.removeprefix('mlp.')}" for name in DENSE}


def layers(*owned: set[str]) -> Layers:
    return {index: frozenset(names) for index, names in enumerate(owned)}


DEEPSEEK = layers(*[ATTENTION | DENSE] * 3, *[ATTENTION | EXPERTS | SHARED] * 27)
QWEN3_NEXT = layers(*[*[LINEAR | EXPERTS] * 3, ATTENTION | EXPERTS] * 6)
JAMBA = layers(*[*[LINEAR | DENSE, LINEAR | EXPERTS] * 2, ATTENTION | DENSE] * 4)
NO_KV = ATTENTION - {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}
SHARED_KV = layers(*[ATTENTION | DENSE] * 20, *[NO_KV | DENSE] * 15)
CROSS_LAYER_KV = layers(*[ATTENTION | DENSE, NO_KV | DENSE] * 16)
# attention left out of some layers by a search (Nemotron)
SEARCHED = layers(*[ATTENTION | DENSE, ATTENTION | DENSE, DENSE] * 16)
STACKS = [DEEPSEEK, QWEN3_NEXT, JAMBA, SHARED_KV, CROSS_LAYER_KV, SEARCHED]
IDS = ["deepseek", "qwen3_next", "jamba", "shared_kv", "cross_layer_kv", "searched"]


@pytest.mark.parametrize("stack", STACKS, ids=IDS)
def test_kinds_of_layers_are_no_loss(stack: Layers) -> None:
    assert list(alike(stack)) == []


@pytest.mark.parametrize("lost", ["self_attn.o_proj.weight", "mlp.experts.*.down_proj.weight"])
@pytest.mark.parametrize("stack", [DEEPSEEK, QWEN3_NEXT], ids=["deepseek", "qwen3_next"])
def test_what_one_layer_lacks_alone_is_a_loss(stack: Layers, lost: str) -> None:
    index = max(index for index, owned in stack.items() if lost in owned)
    made = {**stack, index: stack[index] - {lost}}

    ((found, lacking, num_others),) = alike(made)
    assert (found, lacking) == (index, {lost})
    assert num_others == sum(owned == stack[index] for owned in stack.values()) - 1


def test_whole_mlp_of_a_layer_is_a_loss() -> None:
    made = layers(ATTENTION | DENSE, ATTENTION, ATTENTION | DENSE)

    assert list(alike(made)) == [(1, DENSE, 2)]


def test_two_layers_do_not_outvote_each_other() -> None:
    assert list(alike(layers(ATTENTION | DENSE, ATTENTION))) == []


def test_every_known_model_type_is_declared() -> None:
    assert set(LAYER_PARTS) == KNOWN


def missing(made: Draft, path: Path) -> list[str]:
    return [spot.where for spot in missing_module(load(made.write(path / "made")))]


def test_prediction_layer_past_the_end_owns_what_it_likes(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.config["num_nextn_predict_layers"] = 1
    norm = made.tensor("model.norm.weight")
    made.put("model.layers.2.enorm.weight", norm, beside="model.norm.weight")

    assert missing(made, tmp_path) == []


def test_classifier_has_no_head(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.config["architectures"] = ["LlamaForSequenceClassification"]
    made.pop("lm_head.weight")

    assert missing(made, tmp_path) == []


@pytest.mark.parametrize("tied", [None, True, False])
def test_gemma_ties_its_head_unless_it_says_otherwise(tied: bool | None, tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    made.config["model_type"] = "gemma3_text"
    made.config["tie_word_embeddings"] = tied
    if tied is None:
        del made.config["tie_word_embeddings"]
    made.pop("lm_head.weight")

    assert ("lm_head.weight" in missing(made, tmp_path)) == (tied is False)


def test_fused_names_are_a_way_to_store_a_layer(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    for layer in (0, 1):
        for parts, fused in (("qkv", "self_attn.qkv_proj"), (("gate", "up"), "mlp.gate_up_proj")):
            parent = f"model.layers.{layer}.{fused.split('.')[0]}"
            target = f"model.layers.{layer}.{fused}.weight"
            made.put(
                target,
                made.tensor(f"{parent}.{parts[0]}_proj.weight"),
                beside=f"{parent}.{parts[0]}_proj.weight",
            )
            for part in parts:
                made.pop_module(f"{parent}.{part}_proj")

    assert missing(made, tmp_path) == []


@pytest.mark.parametrize(("layer", "severity"), [(0, "warning"), (1, None)])
def test_unknown_model_may_lack_something_in_its_first_layer(
    layer: int, severity: str | None, tmp_path: Path
) -> None:
    made = draft("llama", PB_WO)
    made.config["model_type"] = "new"
    made.config["num_hidden_layers"] = 3
    for name in [name for shard in made.shards.values() for name in shard if ".layers.1." in name]:
        made.put(name.replace(".1.", ".2."), made.tensor(name), beside=name)
    made.pop(f"model.layers.{layer}.input_layernorm.weight")
    (found,) = missing_module(load(made.write(tmp_path / "made")))

    assert found.where == f"model.layers.{layer}.input_layernorm.weight"
    assert found.severity == severity
