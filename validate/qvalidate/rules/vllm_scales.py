"""Scales that vLLM refuses for not being loaded, one kind only, and those that it can't hold."""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.vllm_matching import is_plain, layers, match
from qvalidate.rules.vllm_support import VERSIONS, support_of

_CHECKED = "weight_scale"
# the first GPU with instructions for NVFP4, and the first weight_scale_2 that is too large before
_HAS_NVFP4, _OVERFLOWS = 100, 512.0


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


@rule(
    "vllm-scale-overflow",
    severity="error",
    summary="vLLM's Marlin kernels turn a weight_scale_2 this large into infinity",
    text="""Where the GPU has no NVFP4 instructions (below sm_100) vLLM multiplies weight_scale_2 by
    2^119 for a bf16 model, or by 2^7 for an f16 one, to undo the way in which Marlin reads the
    codes. From 512 on that is more than the dtype holds: everything that comes out is NaN. A
    weight_scale_2 of 512 belongs to a weight with a largest magnitude of 1.4 million.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "wrong"},
    evidence=(
        "vLLM 0.33.0 layers/quantization/utils/marlin_utils_fp4.py:144-156",
        "run on an H200 with vLLM 0.33.0: llama_adv W4A16_NVFP4, weight_scale_2 3.7e33, all NaN",
    ),
)
def vllm_scale_overflow(context: Context) -> Iterator[Spot]:
    gpu = context.deployment.gpu
    if context.deployment.on_cpu or (gpu is not None and gpu >= _HAS_NVFP4):
        return
    for module, _ in context.encoded:
        stored = module.tensors.get("weight_scale_2")
        support = support_of(module)
        if stored is None or support is None:
            continue
        value = context.numbers.get(stored.name)
        if value is not None and value >= _OVERFLOWS:
            message = f"{value:.4g}; vLLM's Marlin kernels hold less than {_OVERFLOWS:g}"
            yield Spot(str(stored.file), stored.name, message)
