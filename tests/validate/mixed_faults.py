"""Faults in mixed checkpoints, in what configs say of formats, and in the KV cache's scales."""

from catalogue import GATE, O_PROJ, K, Q, V, fault
from checkpoints import MIXED, Draft, f32

LAYERS = "quantized_layers"
FLAT = "$.quantization_config"
EXPERTS = "model.layers.0.block_sparse_moe.experts"


def entries(draft: Draft) -> list[dict[str, object]]:
    """Return quantized_layers of both documents; they are one object until they are copied."""
    found = [dict(config[LAYERS]) for config in draft.each_config()]  # type: ignore[call-overload]
    for config, layers in zip(draft.each_config(), found, strict=True):
        config[LAYERS] = layers
    return found


@fault("unlisted-but-quantized", f"{O_PROJ}.weight", algo=MIXED)
def quantized_module_not_listed(draft: Draft) -> None:
    for layers in entries(draft):
        del layers[O_PROJ]


@fault("listed-but-unquantized", "lm_head.weight", algo=MIXED)
def plain_module_listed(draft: Draft) -> None:
    for layers in entries(draft):
        layers["lm_head"] = {"quant_algo": "FP8"}


@fault("listed-but-missing", f"{FLAT}.{LAYERS}.model.layers.7.x", algo=MIXED, severity="warning")
def name_of_no_module_listed(draft: Draft) -> None:
    for layers in entries(draft):
        layers["model.layers.7.x"] = {"quant_algo": "FP8"}


@fault("unknown-layer-algo", f"{FLAT}.{LAYERS}.{O_PROJ}", algo=MIXED)
def format_of_a_layer_is_not_declared(draft: Draft) -> None:
    for layers in entries(draft):
        layers[O_PROJ] = {"quant_algo": "q8_0"}


@fault("config-layers-disagree", f"$.quantization.{LAYERS}", algo=MIXED)
def lists_of_layers_differ(draft: Draft) -> None:
    entries(draft)[1][O_PROJ] = {"quant_algo": "MXFP8"}


@fault("wrong-dtype", f"{O_PROJ}.weight", algo=MIXED)
def module_in_another_format_than_listed(draft: Draft) -> None:
    for layers in entries(draft):
        layers[O_PROJ] = {"quant_algo": "NVFP4", "group_size": 16}


@fault("missing-tensor", f"{GATE}.weight_scale_2", algo=MIXED)
def tensor_of_a_modules_own_format_missing(draft: Draft) -> None:
    draft.pop(f"{GATE}.weight_scale_2")


@fault("orphan-tensor", f"{O_PROJ}.weight_scale_2", algo=MIXED)
def tensor_of_another_modules_format(draft: Draft) -> None:
    draft.put(f"{O_PROJ}.weight_scale_2", ("F32", (), f32(1.0)), beside=f"{O_PROJ}.weight")


@fault("missing-tensor", f"{EXPERTS}.3.w2.weight_scale_2", model="mixtral", algo=MIXED)
def tensor_below_an_entry_for_all_experts(draft: Draft) -> None:
    assert EXPERTS in entries(draft)[0]
    draft.pop(f"{EXPERTS}.3.w2.weight_scale_2")


@fault("group-size-disagrees", "$.quantization.group_size", algo="NVFP4")
def group_size_of_another_format(draft: Draft) -> None:
    draft.nested["group_size"] = 32


@fault("group-size-disagrees", f"{FLAT}.{LAYERS}.{GATE}.group_size", algo=MIXED)
def group_size_of_a_layer(draft: Draft) -> None:
    for layers in entries(draft):
        layers[GATE] = {"quant_algo": "NVFP4", "group_size": 32}


@fault("kv-scale-unpaired", f"{V}.v_scale", algo="FP8")
def scale_of_the_values_missing(draft: Draft) -> None:
    draft.quantize_cache("FP8")
    draft.pop(f"{V}.v_scale")


@fault("kv-scale-unpaired", f"{K}.k_bias", algo="NVFP4")
def bias_of_an_affine_cache_missing(draft: Draft) -> None:
    draft.quantize_cache("NVFP4_AFFINE")
    draft.pop(f"{K}.k_bias")


@fault("kv-scale-incomplete", f"{K}.k_scale", algo="FP8")
def layer_without_scales_of_the_cache(draft: Draft) -> None:
    draft.quantize_cache("FP8")
    draft.pop(f"{K}.k_scale")
    draft.pop(f"{V}.v_scale")


@fault("kv-scale-shape", f"{K}.k_scale", algo="FP8")
def scale_of_the_cache_per_head(draft: Draft) -> None:
    draft.quantize_cache("FP8")
    draft.put(f"{K}.k_scale", ("F32", (2,), f32(0.5, 0.5)))


@fault("nonpositive-scale", f"{K}.k_scale", algo="NVFP4")
def scale_of_the_cache_is_zero(draft: Draft) -> None:
    draft.quantize_cache("NVFP4")
    draft.put(f"{K}.k_scale", ("F32", (), f32(0.0)))


@fault("orphan-tensor", f"{Q}.weight_scale_2", algo="W8A16")
def global_scale_in_a_format_without(draft: Draft) -> None:
    draft.put(f"{Q}.weight_scale_2", ("F32", (), f32(1.0)), beside=f"{Q}.weight")
