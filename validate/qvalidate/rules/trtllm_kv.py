"""What TensorRT-LLM makes of the scales of a quantized KV cache."""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.trtllm_config import obeyed_config
from qvalidate.rules.trtllm_matching import layers
from qvalidate.rules.trtllm_support import BOTH, ENGINE, V13

_LINEAR = "documented: _torch/modules/linear.py"
# formats whose method of fused q, k and v reads the scales
_READING = frozenset({"FP8", "NVFP4", "NVFP4_AWQ"})


@rule(
    "trtllm-kv-unpaired",
    severity="error",
    summary="TensorRT-LLM 1.3 asserts that an attention with a k_scale has a v_scale",
    text="""The two are read together with q, k and v in FP8 and NVFP4, whatever the cache is:
    "k_scale and v_scale must be loaded together". TRTLLM_LOAD_KV_SCALES=0 switches that off, which
    was the default once.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:FP8QDQLinearMethod, NVFP4LinearMethod (load_kv_scales)",),
)
def trtllm_kv_unpaired(context: Context) -> Iterator[Spot]:
    for layer in layers(context.quantized).values():
        first = context.quantized[layer.parts[0]]
        if layer.kind != "qkv" or not first.declared or first.declared.name not in _READING:
            continue
        modules = [context.quantized[part] for part in layer.parts]
        found = {suffix for module in modules for suffix in module.tensors}
        if "k_scale" in found and "v_scale" not in found:
            parent = layer.name.rpartition(".")[0]
            message = f"missing; {parent} has a k_scale"
            yield Spot(modules[0].file, f"{parent}.v_proj.v_scale", message)


@rule(
    "trtllm-kv-unscaled",
    severity="warning",
    summary="an NVFP4 KV cache without scales, for which TensorRT-LLM takes 1.0",
    text="""The scales of an NVFP4 cache come from calibration, as k_proj.k_scale and
    v_proj.v_scale. Where there are none, TensorRT-LLM keeps 1.0, without a message.""",
    engine=ENGINE,
    versions=BOTH,
    evidence=(f"{_LINEAR}:create_weights (kv_scales of ones)",),
)
def trtllm_kv_unscaled(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    if config is None or config.kv_algo != "NVFP4":
        return
    for name, module in context.modules.items():
        if name.endswith(".k_proj") and "k_scale" not in module.tensors:
            yield Spot(module.file, f"{name}.k_scale", "missing; 1.0 is taken")


@rule(
    "trtllm-kv-ignored",
    severity="note",
    summary="TensorRT-LLM has no use for the scales of an FP8 KV cache",
    text="""An FP8 cache has the scale 1.0 in TensorRT-LLM's attention, whatever the checkpoint
    says. Numbers above 448 saturate there, and not in an engine that takes the scales.""",
    engine=ENGINE,
    versions=BOTH,
    evidence=("documented: _torch/modules/attention.py (scales of the FP4 cache only)",),
)
def trtllm_kv_ignored(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    if config is None or config.kv_algo != "FP8":
        return
    found = [module for module in context.modules.values() if "k_scale" in module.tensors]
    if found:
        stored = found[0].tensors["k_scale"]
        yield Spot(str(stored.file), stored.name, f"not used, as in {len(found)} layers")
