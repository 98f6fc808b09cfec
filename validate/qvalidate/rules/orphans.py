"""Nothing is there that belongs to nothing: leftovers of quantization, and layers past the end."""

import re
from collections.abc import Iterator

from qschema.architectures import KNOWN, text_config
from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule

# last parts of the names that quantizers give what they store beside a weight, in any dialect
QUANT_SUFFIX = re.compile(
    r"weight_scale(_\d|_inv)?|input_scale|output_scale|scales?|scale_inv|pre_quant_scale"
    r"|weight_packed|weight_shape|weight_zero_point|input_global_scale|weight_global_scale"
    r"|[kv]_(scale|bias)|kv_scale|q_scale|prob_scale|qweight|qzeros|zeros|g_idx|weight_g_idx"
    r"|_amax|_pre_quant_scale|_svdquant_lora_[ab]|svdquant_lora_[ab]|weight_blocks|\w+_blocks"
    r"|\w+_proj_(weight|input)_scale(_2)?"
)
KV_SUFFIX = re.compile(r"[kv]_scale|[kv]_bias|kv_scale")
# what modules of the known model types own beside the format's tensors
PLAIN_SUFFIX = frozenset({"weight", "bias", "e_score_correction_bias", "inv_freq"})
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@rule(
    "orphan-tensor",
    severity="error",
    summary="a tensor belongs to no weight of the format, or to no module of the model",
    text="""A scale beside an unquantized weight, a scale without a weight, a suffix of
    another format or dialect (weight_scale_inv, input_scale, ...), a layer past
    num_hidden_layers. Most models of vLLM stop at a name they do not know; some (qwen3_moe,
    exaone_moe) drop it in silence, and then the weight is read without its scale.""",
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0: 'There is no module or parameter named', run with its own loader",),
)
def orphan_tensor(context: Context) -> Iterator[Spot]:
    declared = context.declared
    expected = {spec.suffix for spec in declared.tensors} if declared else {"weight"}
    depth = text_config(context.checkpoint.config).get("num_hidden_layers")
    has_mtp = "num_nextn_predict_layers" in text_config(context.checkpoint.config)
    for name, module in context.modules.items():
        layer = _LAYER.match(f"{name}.")
        if layer and isinstance(depth, int) and int(layer[1]) >= depth and not has_mtp:
            message = f"belongs to layer {layer[1]}, config.json says num_hidden_layers {depth}"
            yield from (
                Spot(str(stored.file), stored.name, message) for stored in module.tensors.values()
            )
            continue
        for suffix, stored in module.tensors.items():
            message = _problem(context, suffix, expected, module.is_quantized, name)
            if message:
                yield Spot(str(stored.file), stored.name, message)
            elif context.model_type in KNOWN and not (
                suffix in PLAIN_SUFFIX or suffix in expected or QUANT_SUFFIX.fullmatch(suffix)
            ):
                message = f"no module of {context.model_type} has a tensor {suffix!r}"
                yield Spot(str(stored.file), stored.name, message, "warning")


def _problem(
    context: Context, suffix: str, expected: set[str], is_quantized: bool, name: str
) -> str:
    """Return what is wrong with a tensor `suffix` of the module `name`, "" if nothing is."""
    if suffix == "weight" or not (suffix in expected or QUANT_SUFFIX.fullmatch(suffix)):
        return ""
    if suffix in expected:
        if is_quantized:
            return ""
        weight = context.modules[name].tensors.get("weight")
        if weight is None:
            return f"there is no {name}.weight that it belongs to"
        return f"{name}.weight is {weight.dtype}, not quantized, and has no use for it"
    if KV_SUFFIX.fullmatch(suffix):
        kv = context.obeyed and (
            context.obeyed.body.get("kv_cache_quant_algo")
            or context.obeyed.raw.get("kv_cache_scheme")
        )
        return "" if kv else "a KV cache scale, but the config quantizes no KV cache"
    if context.declared is None:
        # the format's own tensors are unknown; unknown-algo says so
        return ""
    listed = ", ".join(sorted(expected))
    return f"{context.declared.name} has no {suffix!r}, a module's tensors are {listed}"
