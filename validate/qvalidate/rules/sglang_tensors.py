"""What SGLang drops, or stops at, by the names of the tensors beside a weight that it knows."""

from collections.abc import Iterator

from qvalidate.context import KV_SCALES, Context, Module
from qvalidate.layout import sizes
from qvalidate.rules import sglang_support as support
from qvalidate.rules.registry import Severity, Spot, rule, some
from qvalidate.rules.sglang_layers import is_looked_up
from qvalidate.rules.sglang_matching import Layer, layers
from qvalidate.rules.sglang_reading import built, read
from qvalidate.rules.sglang_support import BOTH, NEW

_SMOOTHING = "pre_quant_scale"
_AWQ = "NVFP4_AWQ"
# the first weight_scale_2 that is too large for Marlin
_OVERFLOWS = 512.0
_FIRST = frozenset(group[0] for group in support.FUSED_NAMES)
_STATIC = frozenset({"weight", "bias", "weight_scale", "input_scale"})
_NVFP4 = _STATIC | {"weight_scale_2"}
_INVERSE = frozenset({"weight", "bias", "weight_scale_inv"})
# algorithm -> the tensors of a layer, by the names in the checkpoint
_KNOWN = {
    "FP8": _STATIC,
    "NVFP4": _NVFP4,
    "NVFP4_AWQ": _NVFP4 | {_SMOOTHING},
    "W4A16_NVFP4": _NVFP4,
    "FP8_PB_WO": _INVERSE,
    "FP8_BLOCK_SCALES": _INVERSE,
    "MXFP8": _INVERSE,
}


@rule(
    "sglang-scale-name",
    severity="error",
    summary="SGLang looks for the scale under another name and drops this one",
    text="""SGLang calls the scales of blocks (MXFP8, FP8_PB_WO) weight_scale_inv. It renames
    ModelOpt's weight_scale in a checkpoint that is MXFP8 throughout, not in a mixed one; and the
    loader of Llama, Mistral and Phi-3 renames it back. The scale is then dropped, with a warning at
    most, and the weights are multiplied with zeros or with what was in memory.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "wrong"},
    evidence=(
        "SGLang 0.5.23 model_loader/loader.py:1052-1060, models/llama.py:723",
        "SGLang 0.5.23, run with its own loader: MXFP8 of a Llama, mixed qwen3_moe",
        "sgl-project/sglang issue 31282",
    ),
)
def sglang_scale_name(context: Context) -> Iterator[Spot]:
    reading = read(context, NEW)
    renames_back = context.model_type in support.RENAMES_INVERSE
    if reading.method != support.MIXED and not (reading.method == support.MXFP8 and renames_back):
        return
    names = [
        part
        for layer in layers(context.quantized, context.model_type)
        for part in layer.parts
        if built(layer, reading, context).algo in support.INVERSE
        and "weight_scale" in context.quantized[part].tensors
    ]
    if names:
        module = context.quantized[names[0]]
        message = f"SGLang looks for weight_scale_inv in {some(names)}, and drops weight_scale"
        yield Spot(module.file, module.tensor_name("weight_scale"), message)


@rule(
    "sglang-unknown-tensor",
    severity="error",
    summary="SGLang stops at a tensor that its layer does not have",
    text="""The loader of qwen3 looks up every name of q/k/v and gate/up, and stops with a KeyError
    at one that the layer does not have, a leftover scale or smoothing. Other loaders drop such a
    tensor, with a warning at most.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=(
        "SGLang 0.5.17 models/qwen3.py:647-657",
        "SGLang 0.5.23, run with its own loader: KeyError qkv_proj.weight_scale_2",
        "run on an H200 with SGLang 0.5.17: KeyError gate_up_proj.input_scale",
    ),
)
def sglang_unknown_tensor(context: Context) -> Iterator[Spot]:
    reading = read(context, NEW)
    if reading.refusal or context.model_type not in support.STRICT:
        return
    for layer in layers(context.modules, context.model_type):
        made = built(layer, reading, context)
        for module in (context.modules[part] for part in layer.parts):
            # quantized, in a plain layer: sglang-codes-refused says so
            if not is_looked_up(context, module, reading) or (
                module.is_quantized and made.algo is None
            ):
                continue
            known = _KNOWN.get(made.algo or "", frozenset({"weight", "bias"}))
            if reading.method == support.MXFP8:
                known |= {"weight_scale"}
            if layer.is_experts:
                known -= {_SMOOTHING}
            for suffix in sorted(module.tensors.keys() - known - KV_SCALES):
                stored = module.tensors[suffix]
                message = f"KeyError in SGLang: {context.model_type}'s {layer.leaf} has no {suffix}"
                yield Spot(str(stored.file), stored.name, message)


@rule(
    "sglang-smoothing-fused",
    severity="error",
    summary="SGLang can't load a smoothing of a fused layer",
    text="""SGLang has one pre_quant_scale for a layer, as long as its columns, and cuts it like
    rows where q/k/v or gate/up are loaded into one: "start (0) + length (512) exceeds dimension
    size (256)". Fold the smoothing of these into the norm before them, as ModelOpt's export does;
    o_proj and down_proj may keep theirs.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=("SGLang 0.5.23 layers/parameter.py:193; run with its own loader",),
)
def sglang_smoothing_fused(context: Context) -> Iterator[Spot]:
    for layer, module, algo in _smoothed(context):
        leaf = module.name.rpartition(".")[2]
        # the first part of a fused layer fits, if it is square
        found = sizes(module, module.declared) if module.declared else None
        fits = leaf in _FIRST and found is not None and found[0] == found[1]
        if algo == _AWQ and leaf in support.FUSED_LEAVES and not layer.is_experts and not fits:
            yield _at(module, "its layer is fused with others in SGLang")


@rule(
    "sglang-smoothing-dropped",
    severity="error",
    summary="SGLang does not apply a smoothing",
    text="""NVFP4_AWQ's weights are those of the smoothed input: without pre_quant_scale the layer
    computes something else. On sm_80 to sm_90 SGLang decodes NVFP4 with Marlin and leaves that path
    before the smoothing (it is right on sm_100). Experts, and formats other than NVFP4_AWQ, have no
    parameter for it on any GPU, and drop it with a warning at most.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "wrong"},
    evidence=(
        "SGLang 0.5.23 modelopt_quant.py:2082-2105, :2508-2648",
        "SGLang 0.5.17 modelopt_quant.py:1712-1740",
    ),
)
def sglang_smoothing_dropped(context: Context) -> Iterator[Spot]:
    gpu = context.deployment.gpu
    for layer, module, algo in _smoothed(context):
        if algo != _AWQ or layer.is_experts:
            # a loader that looks names up stops: sglang-unknown-tensor
            if not is_looked_up(context, module, read(context, NEW)):
                what = "experts have" if layer.is_experts else f"{algo} has"
                yield _at(module, f"SGLang's {what} no parameter for it")
        elif gpu is not None and gpu < support.BLACKWELL:
            yield _at(module, f"on sm_{gpu} SGLang runs Marlin, which does not apply it")


def _smoothed(context: Context) -> Iterator[tuple[Layer, Module, str]]:
    """Yield the smoothed modules that SGLang builds quantized, with their layer's algorithm."""
    smoothed = [name for name, own in context.quantized.items() if _SMOOTHING in own.tensors]
    reading = read(context, NEW)
    for layer in () if reading.refusal else layers(smoothed, context.model_type):
        algo = built(layer, reading, context).algo
        for part in layer.parts if algo else ():
            yield layer, context.quantized[part], algo or ""


def _at(module: Module, message: str) -> Spot:
    stored = module.tensors[_SMOOTHING]
    return Spot(str(stored.file), stored.name, message)


@rule(
    "sglang-scale-overflow",
    severity="error",
    summary="SGLang's Marlin kernels turn a weight_scale_2 this large into infinity",
    text="""Where the GPU has no NVFP4 instructions (below sm_100) SGLang decodes NVFP4 with Marlin,
    and multiplies weight_scale_2 by 2^119 for a bf16 model, or by 2^7 for an f16 one, as vLLM does
    (vllm-scale-overflow). From 512 on that is more than the dtype holds.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "wrong"},
    evidence=(
        "SGLang 0.5.17 layers/quantization/marlin_utils_fp4.py:45-54, 0.5.23 the same :52-56",
    ),
)
def sglang_scale_overflow(context: Context) -> Iterator[Spot]:
    gpu = context.deployment.gpu
    if (gpu is not None and gpu >= support.BLACKWELL) or read(context, NEW).refusal:
        return
    for module, declared in context.encoded:
        stored = module.tensors.get("weight_scale_2")
        value = context.numbers.get(stored.name) if stored else None
        if stored and declared.name in support.PACKED and value is not None and value >= _OVERFLOWS:
            message = f"{value:.4g}; SGLang's Marlin kernels hold less than {_OVERFLOWS:g}"
            yield Spot(str(stored.file), stored.name, message)


@rule(
    "sglang-kv-scales-dropped",
    severity="warning",
    summary="SGLang drops the scales of the KV cache, and quantizes it all the same",
    text="""The config alone makes SGLang's KV cache FP8. Mixtral, Qwen2, Qwen2-MoE and Qwen3-MoE
    have no name for its scales and drop them in silence, Qwen3 with a warning; keys and values are
    then cast with the scale 1.0. Small ones lose precision, a warning here. Where a scale is above
    1, calibration saw values above 448, which saturate, and that is an error.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "wrong"},
    evidence=(
        "SGLang 0.5.23 model_loader/weight_utils.py:1779-1857, mem_cache/kv_cache_dtype.py:49-59",
        "SGLang 0.5.17 and 0.5.23, run with their own loaders: mixtral, qwen2, qwen3, qwen3_moe",
        "sgl-project/sglang issue 39942",
    ),
)
def sglang_kv_scales_dropped(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is None or obeyed.kv_algo != "FP8" or read(context, NEW).method is None:
        return
    if context.model_type not in support.WITHOUT_KV_SCALES:
        return
    found = [
        stored
        for module in context.modules.values()
        for suffix, stored in module.tensors.items()
        if suffix in KV_SCALES
    ]
    if found:
        large = [stored for stored in found if context.numbers.get(stored.name, 0.0) > 1.0]
        severity: Severity | None = "error" if large else None
        first = (large or found)[0]
        message = f"SGLang's {context.model_type} drops it and {len(found) - 1} others; all are 1.0"
        if large:
            message += f", but {context.numbers[first.name]:.6g} here says that values saturate"
        yield Spot(str(first.file), first.name, message, severity)


@rule(
    "sglang-stacked-experts",
    severity="error",
    summary="quantized experts stacked in one tensor, where SGLang loads expert by expert",
    text="""SGLang's loaders of Mixtral and Qwen3-MoE know experts by number. A stack of all of them
    belongs to no name there and is dropped, with a warning at most: the experts stay uninitialised
    memory. Llama 4's loader takes stacks. Write the experts one by one.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "wrong"},
    evidence=("SGLang 0.5.17 models/mixtral_quant.py:417-428, models/qwen3_moe.py:1153-1221",),
)
def sglang_stacked_experts(context: Context) -> Iterator[Spot]:
    names = [own.name for own in context.quantized.values() if own.is_stack]
    if names and context.model_type in support.SPLIT_EXPERTS:
        message = f"SGLang's {context.model_type} takes experts one by one and drops {some(names)}"
        yield Spot(context.modules[names[0]].file, names[0], message)


@rule(
    "sglang-stray-weights",
    severity="error",
    summary="SGLang reads a stray safetensors file as weights of the model",
    text="""Without an index SGLang loads every *.safetensors of the folder, but for
    consolidated.safetensors beside model.safetensors. A name that the model has is overwritten,
    another is dropped or stops it, by the model's loader. With an index it reads the files that it
    names and no others.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "unknown"},
    evidence=("SGLang 0.5.17 model_loader/weight_utils.py:665-701",),
)
def sglang_stray_weights(context: Context) -> Iterator[Spot]:
    strays = [name for name in context.checkpoint.stray_shards if "/" not in name]
    if context.checkpoint.index is None and strays != ["consolidated.safetensors"]:
        for name in strays:
            message = "without an index SGLang reads every *.safetensors here; remove it"
            yield Spot(str(context.path / name), "", message)
