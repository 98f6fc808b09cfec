"""Nothing is there that belongs to nothing: leftovers of quantization, and layers past the end."""

import re
from collections.abc import Iterator

from qschema.architectures import KNOWN, text_config
from qvalidate.context import Context, Module, positive_int
from qvalidate.rules.modules import missing_module
from qvalidate.rules.registry import Severity, Spot, rule
from qvalidate.rules.suffixes import KV_SUFFIX, PLAIN_SUFFIX, QUANT_SUFFIX
from qvalidate.rules.vllm_support import support_of

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# more digits than any layer has; int() refuses thousands of them
_MOST_DIGITS = 6


@rule(
    "orphan-tensor",
    severity="error",
    summary="a tensor belongs to no weight of the format, or to no module of the model",
    text="""A scale beside an unquantized weight, a scale without a weight, a suffix of
    another format or dialect (weight_scale_inv, input_scale, ...), a layer past
    num_hidden_layers. Most models of vLLM stop at a name they do not know; some (qwen3_moe,
    exaone_moe) drop it in silence, and then the weight is read without its scale. An input_scale
    of W4A16_NVFP4, which older exports have, is a warning: vLLM loads it and drops it.""",
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0: 'There is no module or parameter named', run with its own loader",
        "vLLM 0.33.0 modelopt.py:2532-2555 drops the input_scale of W4A16_NVFP4",
    ),
)
def orphan_tensor(context: Context) -> Iterator[Spot]:
    depth = positive_int(context.checkpoint.config, "num_hidden_layers")
    has_mtp = "num_nextn_predict_layers" in text_config(context.checkpoint.config)
    lost = {spot.where for spot in missing_module(context)}
    for name, module in context.modules.items():
        layer = _LAYER.match(f"{name}.")
        if layer and depth and not has_mtp and _is_past(layer[1], depth):
            number = layer[1][: 2 * _MOST_DIGITS]
            message = f"belongs to layer {number}, config.json says num_hidden_layers {depth}"
            yield from (
                Spot(str(stored.file), stored.name, message) for stored in module.tensors.values()
            )
            continue
        if f"{name}.weight" in lost:
            # the module belongs here, and engines load what is left of it
            continue
        expected = _expected(context, module)
        for suffix, stored in module.tensors.items():
            message = _problem(context, suffix, expected, module)
            if message:
                severity: Severity | None = "warning" if _is_dropped(suffix, module) else None
                yield Spot(str(stored.file), stored.name, message, severity)
            elif context.model_type in KNOWN and not (
                suffix in PLAIN_SUFFIX or suffix in expected or QUANT_SUFFIX.fullmatch(suffix)
            ):
                message = f"no module of {context.model_type} has a tensor {suffix!r}"
                yield Spot(str(stored.file), stored.name, message, "warning")


def _is_dropped(suffix: str, module: Module) -> bool:
    support = support_of(module)
    return module.is_quantized and support is not None and suffix in support.dropped


def _is_past(number: str, depth: int) -> bool:
    return len(number) > _MOST_DIGITS or int(number) >= depth


def _expected(context: Context, module: Module) -> set[str]:
    """Return the suffixes of the module's format; of any, where an unlisted module has none."""
    declared = (module.declared,) if module.declared else context.assignment.formats
    return {"weight"} | {spec.suffix for found in declared for spec in found.tensors}


def _problem(context: Context, suffix: str, expected: set[str], module: Module) -> str:
    """Return what is wrong with a tensor `suffix` of `module`, "" if nothing is."""
    if suffix == "weight" or not (suffix in expected or QUANT_SUFFIX.fullmatch(suffix)):
        return ""
    if suffix in expected:
        if module.is_quantized:
            return ""
        weight = module.tensors.get("weight")
        if weight is None:
            return f"there is no {module.weight_name} that it belongs to"
        return f"{module.weight_name} is {weight.dtype}, not quantized, and has no use for it"
    if KV_SUFFIX.fullmatch(suffix):
        kv = context.obeyed and context.obeyed.kv_algo
        return "" if kv else "a KV cache scale, but the config quantizes no KV cache"
    if not context.assignment.formats or (module.is_quantized and module.declared is None):
        # the format's own tensors are unknown; another rule says so
        return ""
    listed = ", ".join(sorted(expected))
    name = module.declared.name if module.declared else "what is quantized here"
    return f"{name} has no {suffix!r}, a module's tensors are {listed}"
