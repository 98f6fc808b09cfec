"""What vLLM refuses because a scale was not loaded: of all of them it looks at one kind only."""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.vllm_matching import is_plain, layers, match
from qvalidate.rules.vllm_support import VERSIONS, support_of

_CHECKED = "weight_scale"


@rule(
    "vllm-scale-not-loaded",
    severity="error",
    summary="vLLM finds NaN among the block scales of a dense NVFP4 layer",
    text="""vLLM fills the weight_scale of a dense layer in NVFP4 or W4A16_NVFP4 with NaN before it
    loads it, and stops at any NaN that is there afterwards: "NVFP4 weight_scale for layer ... was
    never loaded (still NaN)". So it refuses a layer without its weight_scale, an unquantized one
    that the list does not exclude, and NaN in the checkpoint. It looks at no other tensor, no other
    format and no experts: what they lack stays uninitialised memory.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0 modelopt.py:2077, vLLM 0.32.0 modelopt.py:2040-2052",),
)
def vllm_scale_not_loaded(context: Context) -> Iterator[Spot]:
    num_nan = {scale.stats.stored.name: scale.stats.num_nan for scale in context.scales}
    for layer in layers([*context.quantized, *context.unquantized]).values():
        if layer.is_experts or is_plain(layer.name, context.model_type):
            continue
        if match(layer.name, context.exclude).state != "no":
            continue
        for module in (context.modules[part] for part in layer.parts):
            support = support_of(module)
            if support is None or not support.is_scale_checked:
                continue
            name = module.tensor_name(_CHECKED)
            if _CHECKED not in module.tensors:
                message = f"missing; vLLM finds NaN in the weight_scale of its layer {layer.name}"
                yield Spot(module.file, name, message)
            elif num_nan.get(name):
                yield Spot(module.file, name, f"{num_nan[name]} NaN; vLLM stops at them")
