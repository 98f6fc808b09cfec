"""Faults that only SGLang minds, in one version or in both. A catalogue of its own: these stay
out of the one that asks vLLM."""

from collections.abc import Callable

from catalogue import DOWN, GATE, O_PROJ, PB_WO, Fault, K, Q, V
from checkpoints import MIXED, Draft, f32
from mixed_faults import EXPERTS, FLAT, LAYERS, entries

from qschema.formats import find
from qvalidate.targets import ONE_GPU, Deployment

ALGO = f"{FLAT}.quant_algo"
FIRST = "model.layers.0.mlp.down_proj"
QKV = (Q, K, V)

FAULTS: list[Fault] = []


def fault(
    rule: str,
    where: str,
    *,
    model: str = "llama",
    algo: str = "FP8",
    severity: str = "error",
    deployment: Deployment = ONE_GPU,
) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    """Put the decorated function into this catalogue."""

    def declare(plant: Callable[[Draft], None]) -> Callable[[Draft], None]:
        FAULTS.append(Fault(plant, rule, where, model, algo, severity, True, deployment))
        return plant

    return declare


def only_nested(draft: Draft) -> None:
    """Leave hf_quant_config.json as the only config."""
    del draft.config["quantization_config"]


def nested_in_config(draft: Draft) -> None:
    """Put the nested form into config.json, with the quant_method beside it."""
    nested = {**draft.hf_quant_config, "quant_method": "modelopt"}
    draft.config["quantization_config"] = nested


def plain(draft: Draft, module: str, rows: int = 256, columns: int = 256) -> None:
    """Make `module` an unquantized Linear, whatever it was."""
    shard = draft.shards[draft.shard_of(f"{module}.weight")]
    for name in [name for name in shard if name.startswith(f"{module}.")]:
        del shard[name]
    shard[f"{module}.weight"] = ("BF16", (rows, columns), bytes(2 * rows * columns))


def plain_attention(draft: Draft) -> None:
    """Leave q, k and v of the first layer unquantized."""
    for module, rows in zip(QKV, (256, 128, 128), strict=True):
        plain(draft, module, rows)


def smooth(draft: Draft, module: str, columns: int = 256) -> None:
    """Give `module` a pre_quant_scale."""
    scale = ("BF16", (columns,), bytes.fromhex("003f") * columns)
    draft.put(f"{module}.pre_quant_scale", scale, beside=f"{module}.weight")


@fault("sglang-config-unsupported", ALGO, algo=PB_WO)
def blocks_by_their_name_in_small_letters(draft: Draft) -> None:
    assert draft.quantization["quant_algo"] == "fp8_pb_wo"


@fault("sglang-config-unsupported", ALGO)
def fp8_in_small_letters(draft: Draft) -> None:
    for config in draft.each_config():
        config["quant_algo"] = "fp8"


@fault("sglang-config-unsupported", ALGO, algo="W4A8_NVFP4_FP8")
def four_bits_of_another_kind(draft: Draft) -> None:
    assert "FP4" in str(draft.quantization["quant_algo"])


@fault("sglang-config-unsupported", "$.quantization.group_size", algo="NVFP4")
def nested_form_without_group_size(draft: Draft) -> None:
    only_nested(draft)
    del draft.nested["group_size"]


@fault("sglang-config-unsupported", f"{FLAT}.group_size", algo="NVFP4")
def another_group_size(draft: Draft) -> None:
    draft.quantization["group_size"] = 32


@fault("sglang-config-unsupported", f"{FLAT}.ignore", algo="NVFP4")
def list_that_is_null(draft: Draft) -> None:
    draft.quantization["ignore"] = None


@fault("sglang-config-unsupported", ALGO, algo=MIXED)
def mixed_config_without_a_kv_key_or_a_file(draft: Draft) -> None:
    draft.hf_quant_config = {}


@fault("sglang-config-unsupported-0517", ALGO, algo="W4A16_NVFP4")
def weight_only_nvfp4(draft: Draft) -> None:
    assert draft.quantization["quant_algo"] == "W4A16_NVFP4"


@fault("sglang-config-unsupported-0517", ALGO, algo="MXFP8", model="qwen3")
def mxfp8_taken_for_fp8(draft: Draft) -> None:
    assert draft.quantization["quant_algo"] == "MXFP8"


@fault("sglang-config-unsupported-0517", "$.quantization.quant_algo", algo=PB_WO)
def blocks_by_their_name_in_capitals_in_the_file(draft: Draft) -> None:
    only_nested(draft)
    draft.nested["quant_algo"] = PB_WO


@fault("sglang-config-unsupported-0517", f"{FLAT}.quantization.quant_algo", algo="NVFP4")
def nested_form_inside_config_json(draft: Draft) -> None:
    nested_in_config(draft)


@fault("sglang-quant-method", f"{FLAT}.quant_method")
def method_in_capitals(draft: Draft) -> None:
    draft.quantization["quant_method"] = "MODELOPT"


@fault("sglang-nested-exclusions", f"{FLAT}.quantization.exclude_modules")
def exclusions_of_the_nested_form(draft: Draft) -> None:
    nested_in_config(draft)


@fault("sglang-ignore-key", f"{FLAT}.exclude_modules")
def exclusions_under_the_other_key(draft: Draft) -> None:
    draft.quantization["exclude_modules"] = draft.quantization.pop("ignore")


@fault("sglang-ignore-key-0517", f"{FLAT}.exclude_modules", algo="NVFP4")
def exclusions_of_nvfp4_under_the_other_key(draft: Draft) -> None:
    draft.quantization["exclude_modules"] = draft.quantization.pop("ignore")


@fault("sglang-capability", ALGO, deployment=Deployment(gpu=80))
def fp8_on_ampere(draft: Draft) -> None:
    assert draft.quantization["quant_algo"] == "FP8"


@fault("sglang-capability", ALGO, algo="MXFP8", model="qwen3", deployment=Deployment(gpu=90))
def mxfp8_on_hopper(draft: Draft) -> None:
    assert draft.quantization["quant_algo"] == "MXFP8"


@fault("sglang-model-dtype", "$.dtype", severity="note")
def model_in_float32(draft: Draft) -> None:
    draft.config["dtype"] = "float32"


@fault("sglang-codes-refused", f"{Q}.weight", algo="NVFP4")
def pattern_hits_the_fused_name(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, "*v_proj*"])


@fault("sglang-codes-refused", f"{GATE}.weight", algo=MIXED)
def mixed_llama(draft: Draft) -> None:
    assert draft.config["model_type"] == "llama"


@fault("sglang-codes-refused", f"{EXPERTS}.0.w1.weight", model="mixtral", algo=MIXED)
def mixed_mixtral(draft: Draft) -> None:
    assert draft.config["model_type"] == "mixtral"


@fault("sglang-codes-refused", f"{GATE}.weight", model="qwen3", algo=PB_WO)
def file_alone_in_a_model_that_looks_names_up(draft: Draft) -> None:
    only_nested(draft)


@fault("sglang-codes-misread", f"{FIRST}.weight", algo=PB_WO)
def file_alone_with_an_unknown_name(draft: Draft) -> None:
    only_nested(draft)


@fault("sglang-codes-misread", f"{FIRST}.weight", algo="MXFP8")
def mxfp8_by_the_file_alone(draft: Draft) -> None:
    only_nested(draft)


@fault("sglang-codes-misread", f"{O_PROJ}.weight")
def pattern_hits_a_part_of_the_name(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, "o_proj"])


@fault("sglang-codes-misread", f"{FIRST}.weight")
def mixed_without_nvfp4(draft: Draft) -> None:
    names = [
        name.removesuffix(".weight_scale")
        for tensors in draft.shards.values()
        for name in tensors
        if name.endswith(".weight_scale")
    ]
    for config in draft.each_config():
        config["quant_algo"] = MIXED
        config[LAYERS] = {name: {"quant_algo": "FP8"} for name in names}


@fault("sglang-codes-misread", "model.embed_tokens.weight")
def quantized_embedding(draft: Draft) -> None:
    draft.quantize("model.embed_tokens", find("FP8"))
    draft.set_exclude(["lm_head"])


@fault("sglang-plain-refused", f"{Q}.weight", algo="NVFP4")
def wildcards_over_packed_parts(draft: Draft) -> None:
    plain_attention(draft)
    draft.set_exclude([*draft.exclude, "*.q_proj", "*.k_proj", "*.v_proj"])


@fault("sglang-plain-cast", f"{EXPERTS}.0.w2.weight", model="mixtral")
def experts_listed_one_by_one(draft: Draft) -> None:
    draft.config["model_type"] = "qwen3_moe"
    for expert in range(4):
        for leaf in ("w1", "w2", "w3"):
            rows, columns = (256, 128) if leaf == "w2" else (128, 256)
            plain(draft, f"{EXPERTS}.{expert}.{leaf}", rows, columns)
    draft.set_exclude([*draft.exclude, f"{EXPERTS}.*.w?"])


@fault("sglang-plain-cast", f"{O_PROJ}.weight", model="qwen3", algo="MXFP8")
def wildcard_under_a_method_that_knows_none(draft: Draft) -> None:
    plain(draft, O_PROJ)
    draft.set_exclude([*draft.exclude, "model.layers.0.self_attn.o*"])


@fault("sglang-plain-cast", "lm_head.weight")
def head_in_no_list(draft: Draft) -> None:
    draft.set_exclude(["model.embed_tokens"])


@fault("sglang-partial-fusion", f"{Q}.weight", algo="NVFP4")
def one_part_of_qkv_listed(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, K])


@fault("sglang-partial-fusion", f"{Q}.weight", model="mixtral", algo=MIXED)
def parts_in_several_formats(draft: Draft) -> None:
    draft.config["model_type"] = "qwen3_moe"
    for layers in entries(draft):
        layers[K] = {"quant_algo": "NVFP4", "group_size": 16}


@fault("sglang-scale-name", f"{FIRST}.weight_scale", algo="MXFP8")
def mxfp8_of_a_llama(draft: Draft) -> None:
    assert draft.config["model_type"] == "llama"


@fault("sglang-scale-name", f"{O_PROJ}.weight_scale", model="mixtral", algo=MIXED)
def blocks_in_a_mixed_checkpoint(draft: Draft) -> None:
    draft.config["model_type"] = "qwen3_moe"
    for layers in entries(draft):
        layers[O_PROJ] = {"quant_algo": "FP8_PB_WO"}


@fault("sglang-unknown-tensor", f"{Q}.weight_scale_2", model="qwen3")
def leftover_scale(draft: Draft) -> None:
    draft.put(f"{Q}.weight_scale_2", ("F32", (), f32(1.0)), beside=f"{Q}.weight")


@fault("sglang-kv-scales-dropped", f"{K}.k_scale", model="mixtral", severity="warning")
def cache_of_mixtral(draft: Draft) -> None:
    draft.quantize_cache("FP8")


@fault("sglang-smoothing-fused", f"{K}.pre_quant_scale", algo="NVFP4_AWQ")
def smoothing_of_fused_parts(draft: Draft) -> None:
    for module in QKV:
        smooth(draft, module)


@fault(
    "sglang-smoothing-dropped",
    f"{O_PROJ}.pre_quant_scale",
    algo="NVFP4_AWQ",
    deployment=Deployment(gpu=90),
)
def smoothing_under_marlin(draft: Draft) -> None:
    smooth(draft, O_PROJ)


@fault("sglang-smoothing-dropped", f"{O_PROJ}.pre_quant_scale", algo="NVFP4")
def smoothing_in_a_format_without(draft: Draft) -> None:
    smooth(draft, O_PROJ)


@fault("sglang-kv-scales-dropped", f"{K}.k_scale", model="qwen3", severity="warning")
def cache_of_qwen3(draft: Draft) -> None:
    draft.quantize_cache("FP8")


@fault("sglang-kv-scales-dropped", f"{V}.v_scale", model="qwen3")
def cache_of_large_values(draft: Draft) -> None:
    draft.quantize_cache("FP8")
    draft.put(f"{V}.v_scale", ("F32", (), f32(2.0)))


@fault("sglang-stacked-experts", f"{EXPERTS}.down_proj", model="mixtral", algo="NVFP4")
def stacked_experts_of_mixtral(draft: Draft) -> None:
    draft.stack_experts(find("NVFP4"))


@fault("sglang-stray-weights", "", model="qwen3")
def stray_file_without_an_index(draft: Draft) -> None:
    draft.shards["adapter.safetensors"] = {"lora": ("F32", (1,), f32(1.0))}


@fault("sglang-experts", "$.num_local_experts", model="mixtral", deployment=Deployment(tp=3, ep=3))
def four_experts_on_three_gpus(draft: Draft) -> None:
    draft.config["model_type"] = "qwen3_moe"


@fault("sglang-local-size", f"{DOWN}.weight", algo="NVFP4", deployment=Deployment(tp=16))
def columns_of_24_on_each_of_16_gpus(draft: Draft) -> None:
    assert draft.tensor(f"{DOWN}.weight")[1] == (256, 192)


@fault(
    "sglang-marlin-experts",
    f"{EXPERTS}.0.w2.weight",
    model="mixtral",
    algo="NVFP4",
    deployment=Deployment(tp=4, gpu=90),
)
def experts_of_32_columns_on_each_of_4_gpus(draft: Draft) -> None:
    draft.config["model_type"] = "qwen3_moe"


@fault(
    "sglang-marlin-rows-0517",
    f"{GATE}.weight",
    model="llama_odd",
    algo="NVFP4",
    deployment=Deployment(gpu=90),
)
def rows_that_marlin_does_not_pad(draft: Draft) -> None:
    assert draft.config["model_type"] == "llama"


@fault("sglang-scale-overflow", f"{Q}.weight_scale_2", algo="NVFP4")
def global_scale_that_overflows_in_marlin(draft: Draft) -> None:
    for name in QKV:
        draft.put(f"{name}.weight_scale_2", ("F32", (), f32(512.0)))
