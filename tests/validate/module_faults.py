"""Faults in what is there at all: layers, experts, modules that have no tensors."""

from catalogue import DOWN, GATE, O_PROJ, PC_PT, V, fault
from checkpoints import Draft


@fault("missing-module", f"{V}.weight")
def missing_fused_part(draft: Draft) -> None:
    draft.pop(f"{V}.weight")
    draft.pop(f"{V}.weight_scale")


@fault("missing-module", f"{O_PROJ}.weight")
def missing_o_proj(draft: Draft) -> None:
    draft.pop_module(O_PROJ)


@fault("missing-module", f"{DOWN}.weight", algo=PC_PT)
def missing_down_proj(draft: Draft) -> None:
    draft.pop_module(DOWN)


@fault("missing-module", f"{GATE}.weight")
def missing_mlp(draft: Draft) -> None:
    draft.pop_module("model.layers.0.mlp")


@fault("missing-module", "model.layers.0.mlp.up_proj.weight", model="qwen3")
def missing_mlp_of_the_only_layer(draft: Draft) -> None:
    draft.pop_module("model.layers.0.mlp")


@fault("missing-module", "model.layers.0.self_attn.k_norm.weight", model="qwen3")
def missing_head_norm(draft: Draft) -> None:
    draft.pop("model.layers.0.self_attn.k_norm.weight")


@fault("missing-module", "model.layers.0.input_layernorm.weight")
def missing_norm(draft: Draft) -> None:
    draft.pop("model.layers.0.input_layernorm.weight")


@fault("missing-module", "model.norm.weight")
def missing_last_norm(draft: Draft) -> None:
    draft.pop("model.norm.weight")


@fault("missing-module", "model.embed_tokens.weight")
def missing_embedding(draft: Draft) -> None:
    draft.pop("model.embed_tokens.weight")


@fault("missing-module", "lm_head.weight")
def missing_untied_head(draft: Draft) -> None:
    draft.pop("lm_head.weight")


@fault("missing-module", "model.layers.0")
def missing_layers(draft: Draft) -> None:
    draft.pop_module("model.layers")


@fault("missing-module", "model.layers.0.block_sparse_moe.gate.weight", model="mixtral")
def missing_router(draft: Draft) -> None:
    draft.pop("model.layers.0.block_sparse_moe.gate.weight")


@fault("missing-module", "model.layers.1.block_sparse_moe.experts.*.w2.weight", model="mixtral")
def missing_part_of_all_experts(draft: Draft) -> None:
    for expert in range(4):
        draft.pop_module(f"model.layers.1.block_sparse_moe.experts.{expert}.w2")


@fault("missing-module", "model.layers.1.block_sparse_moe.experts.3.w2.weight", model="mixtral")
def missing_part_of_one_expert(draft: Draft) -> None:
    draft.pop_module("model.layers.1.block_sparse_moe.experts.3.w2")


@fault("missing-module", "model.layers.2")
def more_layers_than_numbers_can_list(draft: Draft) -> None:
    draft.config["num_hidden_layers"] = 10**12


@fault("missing-module", "model.layers.0.block_sparse_moe.experts.4", model="mixtral")
def more_experts_than_numbers_can_list(draft: Draft) -> None:
    draft.config["num_local_experts"] = 10**12


@fault("missing-module", "model.layers.1")
def missing_layer(draft: Draft) -> None:
    draft.pop_module("model.layers.1")


@fault("missing-module", "model.layers.1.block_sparse_moe.experts.2", model="mixtral")
def missing_expert(draft: Draft) -> None:
    draft.pop_module("model.layers.1.block_sparse_moe.experts.2")


@fault("missing-module", f"{O_PROJ}.weight")
def module_without_its_weight(draft: Draft) -> None:
    draft.pop(f"{O_PROJ}.weight")
