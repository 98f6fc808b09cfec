"""Faults in the JSON and in the files around the tensors."""

from catalogue import O_PROJ, PB_WO, PC_PT, Q, fault
from checkpoints import Draft, f32

from qschema.formats import find


@fault("other-dialect", "$.quantization_config.quant_method", severity="warning")
def another_dialect(draft: Draft) -> None:
    draft.hf_quant_config = {}
    draft.quantization["quant_method"] = "compressed-tensors"


@fault("excluded-but-quantized", "lm_head.weight", algo=PC_PT)
def excluded_layer_quantized(draft: Draft) -> None:
    draft.quantize("lm_head", find(PC_PT))


@fault("excluded-but-quantized", f"{O_PROJ}.weight")
def quantized_layer_listed_as_excluded(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, O_PROJ])


@fault("excluded-but-quantized", "model.layers.1.mlp.up_proj.weight")
def quantized_layers_excluded_by_wildcard(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, "model.layers.1*"])


@fault("unquantized-not-excluded", f"{O_PROJ}.weight")
def unquantized_layer_not_listed(draft: Draft) -> None:
    draft.dequantize(O_PROJ)


@fault("unquantized-not-excluded", "model.layers.1.block_sparse_moe.gate.weight", model="mixtral")
def router_not_listed(draft: Draft) -> None:
    draft.set_exclude(["lm_head", "model.layers.0.block_sparse_moe.gate"])


@fault("config-number", "$.num_hidden_layers")
def number_of_layers_is_true(draft: Draft) -> None:
    draft.config["num_hidden_layers"] = True


@fault("config-number", "$.num_hidden_layers")
def number_of_layers_is_negative(draft: Draft) -> None:
    draft.config["num_hidden_layers"] = -1


@fault("config-number", "$.num_local_experts", model="mixtral")
def number_of_experts_is_text(draft: Draft) -> None:
    draft.config["num_local_experts"] = "8"


@fault("config-algo-disagrees", "$.quantization.quant_algo")
def algorithms_differ(draft: Draft) -> None:
    draft.hf_quant_config["quantization"]["quant_algo"] = PC_PT


@fault("config-exclusions-disagree", "$.quantization.exclude_modules")
def exclusions_differ(draft: Draft) -> None:
    draft.quantization["ignore"] = [*draft.exclude, "model.vision*"]


@fault("config-kv-disagrees", "$.quantization.kv_cache_quant_algo")
def kv_cache_differs(draft: Draft) -> None:
    draft.hf_quant_config["quantization"]["kv_cache_quant_algo"] = "FP8"


@fault("config-malformed", "$.quantization_config.quant_alog")
def misspelt_key(draft: Draft) -> None:
    draft.quantization["quant_alog"] = PB_WO


@fault("config-incomplete", "", severity="warning")
def no_hf_quant_config(draft: Draft) -> None:
    draft.hf_quant_config = {}


@fault("quant-method-missing", "$.quantization_config.quant_method")
def no_quant_method(draft: Draft) -> None:
    del draft.quantization["quant_method"]


@fault("no-quantization-config", "$.quantization_config")
def no_quantization_config_at_all(draft: Draft) -> None:
    del draft.config["quantization_config"]
    draft.hf_quant_config = {}


@fault("no-quantized-module", "$.quantization_config.quant_algo")
def config_of_a_plain_checkpoint(draft: Draft) -> None:
    draft.dequantize_all()


@fault("not-quantized", "$.quantization_config")
def plain_checkpoint(draft: Draft) -> None:
    draft.dequantize_all()
    del draft.config["quantization_config"]
    draft.hf_quant_config = {}


@fault("not-quantized", "$.quantization_config.ignore")
def all_excluded_and_nothing_quantized(draft: Draft) -> None:
    draft.dequantize_all()
    draft.set_exclude(["*"])


@fault("unknown-algo", "$.quantization_config.quant_algo")
def algorithm_of_another_tool(draft: Draft) -> None:
    for config in draft.each_config():
        config["quant_algo"] = "NVFP4_SVD"
        config["group_size"] = 16


@fault("stray-safetensors", "", model="qwen3")
def stray_file_beside_a_single_one(draft: Draft) -> None:
    draft.shards["adapter.safetensors"] = {"lora": ("F32", (1,), f32(1.0))}


@fault("stray-safetensors", "")
def stray_file_beside_an_index(draft: Draft) -> None:
    draft.shards["old.safetensors"] = {"old": ("F32", (1,), f32(1.0))}
    draft.unindexed.add("old")


@fault("stray-safetensors", "", severity="note")
def stray_file_in_a_subfolder(draft: Draft) -> None:
    draft.files["original/old.safetensors"] = bytes(8)


@fault("unindexed-tensor", f"{Q}.weight_scale")
def tensor_outside_the_index(draft: Draft) -> None:
    draft.unindexed.add(f"{Q}.weight_scale")


@fault("index-total-size", "$.metadata.total_size", severity="warning")
def index_lies_about_the_size(draft: Draft) -> None:
    draft.total_size = 1_000_000


@fault("tokenizer-missing", "", severity="warning")
def no_tokenizer(draft: Draft) -> None:
    del draft.files["tokenizer.json"]


@fault("auto-map-target-missing", "$.auto_map.AutoModel", severity="warning")
def remote_code_not_there(draft: Draft) -> None:
    draft.config["auto_map"] = {"AutoModel": "modeling_x.XModel", "AutoConfig": "you/repo--a.B"}
