"""Faults that only vLLM minds, or that only its own matching makes faults of."""

from catalogue import GATE, O_PROJ, PB_WO, PC_PT, K, Q, V, fault
from checkpoints import MIXED, Draft, f32
from mixed_faults import FLAT, LAYERS, entries

from qschema.formats import find
from qvalidate.targets import Deployment

EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


@fault("vllm-algo-unsupported", "$.quantization_config.quant_algo", engine=True)
def vllm_refuses_the_name(draft: Draft) -> None:
    draft.quantization["quant_algo"] = "W8A16"
    draft.hf_quant_config["quantization"]["quant_algo"] = "W8A16"


@fault("vllm-experts-unsupported", EXPERT, model="mixtral", engine=True)
def experts_in_blocks(draft: Draft) -> None:
    assert draft.config["model_type"] == "mixtral"


@fault("vllm-experts-unsupported", EXPERT, model="mixtral", algo=PC_PT, engine=True)
def experts_in_channels(draft: Draft) -> None:
    assert draft.config["model_type"] == "mixtral"


@fault("vllm-columns", f"{GATE}.weight", model="llama_odd", engine=True)
def columns_not_a_multiple_of_128(draft: Draft) -> None:
    assert draft.tensor(f"{GATE}.weight")[1][1] == 192


@fault("vllm-fused-rows", f"{Q}.weight", model="llama_odd", engine=True)
def fused_part_ends_inside_a_block(draft: Draft) -> None:
    assert draft.tensor(f"{Q}.weight")[1][0] == 192


@fault("vllm-lm-head", "lm_head.weight", engine=True)
def quantized_head_in_blocks(draft: Draft) -> None:
    draft.quantize("lm_head", find(PB_WO))
    draft.set_exclude(["model.embed_tokens"])


@fault("vllm-stray-weights", "", model="qwen3", engine=True)
def stray_file_without_an_index(draft: Draft) -> None:
    draft.shards["adapter.safetensors"] = {"lora": ("F32", (1,), f32(1.0))}


@fault("vllm-model-dtype", "$.dtype", severity="note", engine=True)
def model_in_float32(draft: Draft) -> None:
    draft.config["dtype"] = "float32"


@fault("vllm-partial-fusion", f"{Q}.weight", engine=True)
def one_part_of_qkv_unquantized(draft: Draft) -> None:
    draft.dequantize(Q)
    draft.set_exclude([*draft.exclude, Q])


@fault("vllm-partial-fusion", f"{K}.weight", engine=True)
def one_part_of_qkv_listed(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, K])


@fault("vllm-mixed-fusion", f"{Q}.weight", engine=True)
def one_part_of_qkv_unquantized_and_not_listed(draft: Draft) -> None:
    draft.dequantize(Q)


@fault(
    "vllm-mixed-fusion",
    "model.layers.0.block_sparse_moe.experts.1.w2.weight",
    model="mixtral",
    engine=True,
)
def one_expert_unquantized(draft: Draft) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w2"
    draft.dequantize(name)
    draft.set_exclude([*draft.exclude, name])


@fault("vllm-exclusion-overreach", f"{GATE}.weight", engine=True)
def router_pattern_hits_gate_up(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, "model.layers.0.mlp.gate"])


@fault("vllm-exclusion-overreach", f"{O_PROJ}.weight", engine=True)
def pattern_hits_the_middle_of_a_name(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, "layers.0.self_attn.o"])


@fault("vllm-exclusion-missed", f"{Q}.weight", engine=True)
def wildcards_over_the_parts(draft: Draft) -> None:
    for layer in (0, 1):
        for part in "qkv":
            draft.dequantize(f"model.layers.{layer}.self_attn.{part}_proj")
    draft.set_exclude([*draft.exclude, "*.q_proj", "*.k_proj", "*.v_proj"])


@fault("vllm-tied-head", "$.quantization_config.ignore", model="qwen3", engine=True)
def tied_head_not_listed(draft: Draft) -> None:
    draft.set_exclude(["model.embed_tokens"])


@fault("vllm-ignore-key", "$.quantization_config.exclude_modules", engine=True)
def exclusions_under_the_other_key(draft: Draft) -> None:
    draft.quantization["exclude_modules"] = draft.quantization.pop("ignore")


def only_nested(draft: Draft) -> None:
    """Leave hf_quant_config.json as the only config."""
    del draft.config["quantization_config"]


@fault("vllm-nested-config", "$.quantization.quant_algo", algo="W4A16_NVFP4", engine=True)
def weight_only_nvfp4_in_the_nested_form(draft: Draft) -> None:
    only_nested(draft)


@fault("vllm-nested-config", "$.quantization.quant_algo", algo="MXFP8", engine=True)
def mxfp8_in_the_nested_form(draft: Draft) -> None:
    only_nested(draft)


@fault("vllm-nested-config", "$.quantization.kv_cache_quant_algo", algo="NVFP4", engine=True)
def nested_form_without_a_key(draft: Draft) -> None:
    only_nested(draft)
    del draft.nested["kv_cache_quant_algo"]


@fault("vllm-model-dtype", "$.dtype", algo="MXFP8", engine=True)
def mxfp8_of_a_float16_model(draft: Draft) -> None:
    draft.config["dtype"] = "float16"


@fault(
    "vllm-stacked-experts",
    "model.layers.0.block_sparse_moe.experts.gate_up_proj",
    model="mixtral",
    algo="NVFP4",
    engine=True,
)
def stacked_experts_of_mixtral(draft: Draft) -> None:
    draft.stack_experts(find("NVFP4"))


@fault(
    "vllm-stacked-experts",
    "model.layers.0.block_sparse_moe.experts.gate_up_proj",
    model="mixtral",
    algo="FP8",
    engine=True,
)
def stacked_experts_of_a_llama_4_without_vision(draft: Draft) -> None:
    """The stack is right, and the loader takes its scales for weights."""
    draft.stack_experts(find("FP8"))
    draft.config["model_type"] = "llama4_text"


@fault(
    "vllm-stacked-experts",
    "model.layers.0.block_sparse_moe.experts.gate_up_proj",
    model="mixtral",
    algo="NVFP4",
    engine=True,
)
def stacked_experts_of_gpt_oss(draft: Draft) -> None:
    """The stack is right, and the loader finds no place for its biases."""
    draft.stack_experts(find("NVFP4"))
    draft.config["model_type"] = "gpt_oss"


@fault(
    "vllm-kv-backend",
    "$.quantization_config.kv_cache_scheme",
    algo="NVFP4",
    engine=True,
    deployment=Deployment(gpu=90),
)
def cache_in_nvfp4_on_hopper(draft: Draft) -> None:
    draft.quantize_cache("NVFP4")


@fault("vllm-embedding", "model.embed_tokens.weight", algo="W4A16_NVFP4", engine=True)
def quantized_embedding(draft: Draft) -> None:
    draft.quantize("model.embed_tokens", find("W4A16_NVFP4"))
    draft.set_exclude(["lm_head"])


@fault("vllm-layer-algo-unsupported", f"{FLAT}.{LAYERS}.{O_PROJ}", algo=MIXED, engine=True)
def layer_in_a_format_that_vllm_does_not_know(draft: Draft) -> None:
    for layers in entries(draft):
        layers[O_PROJ] = {"quant_algo": "W8A16"}


@fault("vllm-mixed-algos", f"{K}.weight", algo=MIXED, engine=True)
def fused_part_in_another_format(draft: Draft) -> None:
    for layers in entries(draft):
        layers[K] = {"quant_algo": PC_PT}


@fault(
    "vllm-mixed-experts",
    "model.layers.0.block_sparse_moe.experts.0.w3.weight",
    model="mixtral",
    algo=MIXED,
    engine=True,
)
def expert_in_another_format(draft: Draft) -> None:
    name = "model.layers.0.block_sparse_moe.experts"
    for layers in entries(draft):
        layers[f"{name}.0.w3"] = {"quant_algo": "FP8"}


@fault(
    "vllm-layers-overreach",
    "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    model="mixtral",
    algo=MIXED,
    engine=True,
)
def plain_experts_beside_a_quantized_shared_one(draft: Draft) -> None:
    owner = "model.layers.0.block_sparse_moe"
    for layers in entries(draft):
        layers[f"{owner}.shared_expert.up_proj"] = layers.pop(f"{owner}.experts")
    for expert in range(4):
        for leaf in ("w1", "w2", "w3"):
            name = f"{owner}.experts.{expert}.{leaf}"
            for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
                draft.pop(f"{name}.{suffix}")
            draft.put(f"{name}.weight", ("BF16", (128, 128), bytes(2 * 128 * 128)))


@fault("vllm-partial-fusion", f"{K}.weight", algo="NVFP4", engine=True)
def one_part_of_qkv_in_nvfp4_listed(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, K])


@fault("vllm-scale-not-loaded", f"{Q}.weight_scale", algo="NVFP4", engine=True)
def missing_block_scales(draft: Draft) -> None:
    draft.pop(f"{Q}.weight_scale")


@fault("vllm-scale-not-loaded", f"{GATE}.weight_scale", algo="W4A16_NVFP4", engine=True)
def nan_among_block_scales(draft: Draft) -> None:
    dtype, shape, data = draft.tensor(f"{GATE}.weight_scale")
    draft.put(f"{GATE}.weight_scale", (dtype, shape, data[:-1] + b"\x7f"))


@fault("vllm-scale-not-loaded", "model.layers.0.mlp.gate.weight_scale", algo="NVFP4", engine=True)
def plain_linear_in_no_list(draft: Draft) -> None:
    draft.put(
        "model.layers.0.mlp.gate.weight", ("BF16", (4, 256), bytes(2048)), beside=f"{Q}.weight"
    )


@fault("vllm-scale-overflow", f"{Q}.weight_scale_2", algo="NVFP4", engine=True)
def global_scale_that_overflows(draft: Draft) -> None:
    for name in (Q, K, V):
        draft.put(f"{name}.weight_scale_2", ("F32", (), f32(512.0)))
