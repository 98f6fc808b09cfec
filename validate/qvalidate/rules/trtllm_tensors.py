"""What TensorRT-LLM does with dense layers whose tensors are missing, misshapen or at odds.

Some tensors it looks up by name, and stops without; of others it takes what is there, and computes
with uninitialised memory where nothing is.
"""

from collections.abc import Iterator
from math import isclose, prod

from qschema.architectures import text_config
from qschema.formats import Format
from qvalidate.context import Context, Module, codes_spec
from qvalidate.layout import expected, misfit, sizes
from qvalidate.rules.registry import Severity, Spot, rule
from qvalidate.rules.trtllm_matching import Layer, layers
from qvalidate.rules.trtllm_support import BOTH, ENGINE, V12, V13, Support, support_of

_LINEAR = "documented: _torch/modules/linear.py"
_BLOCKS = "FP8_PB_WO"
# formats of which the loader takes weight_scale_inv for weight_scale
_WITH_INVERSE = frozenset({"FP8_PER_CHANNEL_PER_TOKEN", _BLOCKS, "MXFP8"})
_STORED = {"bfloat16": "BF16", "float16": "F16"}
# torch.allclose of the newer loader; the older one compares exactly
_RELATIVE, _ABSOLUTE = 1e-5, 1e-8


def dense(context: Context) -> Iterator[tuple[Layer, tuple[Module, ...], Support]]:
    """Yield the layers that are not experts, all of whose parts are in one supported format."""
    for layer in layers(context.quantized).values():
        if layer.kind == "experts":
            continue
        modules = tuple(context.quantized[part] for part in layer.parts)
        support = support_of(modules[0])
        is_uniform = all(module.declared is modules[0].declared for module in modules)
        if support is not None and is_uniform:
            yield layer, modules, support


def has(module: Module, suffix: str) -> bool:
    """Return whether the loader finds a tensor `suffix` of the module, under any of its names."""
    if suffix in module.tensors:
        return True
    is_inverse = module.declared is not None and module.declared.name in _WITH_INVERSE
    return suffix == "weight_scale" and is_inverse and "weight_scale_inv" in module.tensors


@rule(
    "trtllm-scale-missing",
    severity="error",
    summary="TensorRT-LLM stops at a dense layer without this scale",
    text="""The scales of AWQ, W8A16, the MX formats and W4A8_NVFP4_FP8 are looked up by name
    (KeyError, IndexError, an assertion); so are the block scales of fused NVFP4 layers. Of
    weight_scale_2 and input_scale one of the fused parts is enough.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:load_weight_scales, load_weights_vanilla of each LinearMethod",),
)
def trtllm_scale_missing(context: Context) -> Iterator[Spot]:
    for layer, modules, support in dense(context):
        fused = support.needed_fused if layer.kind != "linear" else ()
        for suffix in (*support.needed, *fused):
            yield from _lacking(modules, suffix, "the loader looks it up")
        for suffix in support.needed_once:
            # NVFP4 without any input_scale has no product of the two to compute
            is_used = "input_scale" not in support.unloaded_once or any(
                has(module, "input_scale") for module in modules
            )
            if is_used and not any(has(module, suffix) for module in modules):
                yield from _lacking(modules[:1], suffix, "the loader multiplies with it")


@rule(
    "trtllm-scale-unloaded",
    severity="error",
    summary="TensorRT-LLM 1.3 computes with a scale that was never loaded",
    text="""Of FP8 formats, and of NVFP4 layers that are not fused, the loader takes the scales that
    are there. A missing one stays 1.0 or uninitialised memory, without a message; so does the
    input_scale of NVFP4, although there is code for inputs without one. FP8 without any input_scale
    is quantized dynamically, but where only some parts of a fused layer have one, memory that was
    never written takes part in their maximum.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "wrong"},
    evidence=(
        f"{_LINEAR}:FP8QDQLinearMethod, FP8BlockScalesLinearMethod, NVFP4LinearMethod (1.3)",
        "documented: a third party's patch of 1.3.0rc20 for NVFP4 without input_scale",
    ),
)
@rule(
    "trtllm-scale-unloaded-12",
    severity="error",
    summary="TensorRT-LLM 1.2 stops at a missing scale, or computes with one that was never loaded",
    text="""As trtllm-scale-unloaded. An older loader looked all scales up and stopped, a newer one
    does not; which of them 1.2.1 has is not known.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "unknown"},
    evidence=(f"{_LINEAR}:FP8QDQLinearMethod.load_weight_scales (two versions)",),
)
def trtllm_scale_unloaded(context: Context) -> Iterator[Spot]:
    for layer, modules, support in dense(context):
        for suffix in support.unloaded:
            if layer.kind == "linear" or suffix not in support.needed_fused:
                yield from _lacking(modules, suffix, "TensorRT-LLM does not ask for it")
        for suffix in support.unloaded_once:
            if not any(has(module, suffix) for module in modules):
                yield from _lacking(modules[:1], suffix, "TensorRT-LLM does not ask for it")
        for suffix in support.all_or_none:
            if any(has(module, suffix) for module in modules):
                yield from _lacking(modules, suffix, f"other parts of {layer.name} have it")


def _lacking(modules: tuple[Module, ...], suffix: str, why: str) -> Iterator[Spot]:
    for module in modules:
        if not has(module, suffix):
            yield Spot(module.file, module.tensor_name(suffix), f"missing; {why}")


@rule(
    "trtllm-scales-differ",
    severity="error",
    summary="TensorRT-LLM asserts that parts of a fused layer have the same scale",
    text="""weight_scale_2 and input_scale of q, k and v, and of gate and up, are asserted to be
    equal in the NVFP4 formats and W4A8_AWQ: exactly in older versions, a warning here, within
    torch.allclose in newer ones. Of FP8 the parts are encoded anew with the largest scale.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:NVFP4LinearMethod.load_weight_scales, load_weight_scales_w4a8",),
)
def trtllm_scales_differ(context: Context) -> Iterator[Spot]:
    for layer, modules, support in dense(context):
        for suffix in support.equal:
            names = [module.tensor_name(suffix) for module in modules]
            found = {name: context.numbers[name] for name in names if name in context.numbers}
            first, *others = found or [""]
            for name in others:
                one, other = found[name], found[first]
                if one == other:
                    continue
                near = isclose(one, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
                severity: Severity | None = "warning" if near else None
                message = f"{one:.9g}, {first} of the same {layer.name} is {other:.9g}"
                yield Spot(
                    context.checkpoint.tensors[name].file.as_posix(), name, message, severity
                )


@rule(
    "trtllm-scale-dtype",
    severity="error",
    summary="TensorRT-LLM asserts another dtype of the block scales",
    text="""weight_scale is E4M3 in the NVFP4 formats and U8, the exponent, in the MX formats; the
    loader asserts it. Other tensors are cast by value.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:load_weight_scales (assert ws.dtype)",),
)
def trtllm_scale_dtype(context: Context) -> Iterator[Spot]:
    for _, modules, support in dense(context):
        for module in modules:
            stored = module.tensors.get("weight_scale")
            if stored and support.scale_dtype and stored.dtype != support.scale_dtype:
                message = f"expected {support.scale_dtype}, got {stored.dtype}"
                yield Spot(str(stored.file), stored.name, message)


@rule(
    "trtllm-scale-shape",
    severity="error",
    summary="a weight or scale does not fit the parameter that TensorRT-LLM makes for it",
    text="""The parameters have the shapes that follow from the layer's rows and columns. Block
    scales of FP8 may have four dimensions or two, one number may be [] or [1]; anything else stops
    the copy: swizzled scales of NVFP4, [N, 1] instead of [N], a number for each row where one is
    expected.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:create_weights, copy_weight of each LinearMethod",),
)
def trtllm_scale_shape(context: Context) -> Iterator[Spot]:
    # experts by the thousand have the same shapes
    right: set[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]] = set()
    for module, declared in context.encoded:
        shapes = tuple((suffix, stored.shape) for suffix, stored in module.tensors.items())
        if (declared.name, shapes) in right or support_of(module) is None or module.is_stack:
            continue
        found = list(_misshapen(module, declared))
        yield from found
        if not found:
            right.add((declared.name, shapes))


def _misshapen(module: Module, declared: Format) -> Iterator[Spot]:
    codes = module.codes(declared)
    if codes is not None and sizes(module, declared) is None:
        message = f"{len(codes.shape)} dimensions, expected {len(codes_spec(declared).shape)}"
        yield Spot(module.file, module.weight_name, message)
    if problem := misfit(module, declared):
        yield Spot(module.file, module.weight_name, problem)
    for suffix, (_, shape) in (expected(module, declared) or {}).items():
        stored = module.tensors.get(suffix)
        if stored is not None and not _fits(stored.shape, shape, declared):
            message = f"expected shape {list(shape)}, got {list(stored.shape)}"
            yield Spot(str(stored.file), stored.name, message)


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], declared: Format) -> bool:
    if declared.name == _BLOCKS and found == wanted[::2]:
        return True
    return found == wanted or (not wanted and prod(found) == 1)


@rule(
    "trtllm-smoothing-missing",
    severity="error",
    summary="TensorRT-LLM wants a pre_quant_scale of every AWQ layer that is not fused",
    text="""Of o_proj, down_proj and every other layer that is not fused, pre_quant_scale is looked
    up: KeyError without it, also where nothing was smoothed. Ones would do. Of fused layers it has
    to be in the norm before them.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:W4A16_AWQ_LinearMethod.load_weights_vanilla, W4A8_AWQ_LinearMethod",),
)
def trtllm_smoothing_missing(context: Context) -> Iterator[Spot]:
    for layer, modules, support in dense(context):
        if support.smoothing_needed and layer.kind == "linear":
            yield from _lacking(modules, "pre_quant_scale", "the loader looks it up (KeyError)")


@rule(
    "trtllm-smoothing-ignored",
    severity="error",
    summary="TensorRT-LLM does not read the pre_quant_scale of this fused layer",
    text="""q, k and v, and in W4A16_AWQ gate and up, are taken to be smoothed by the norm before
    them. A pre_quant_scale beside them is not read, and their inputs are not smoothed, without a
    message.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "wrong"},
    evidence=(f"{_LINEAR}:load_weights_fused_qkv_linear, load_weights_fused_gate_up_linear",),
)
def trtllm_smoothing_ignored(context: Context) -> Iterator[Spot]:
    for layer, modules, support in dense(context):
        for module in modules if layer.kind in support.smoothing_ignored else ():
            stored = module.tensors.get("pre_quant_scale")
            if stored is not None:
                message = f"not read for {layer.name}; it has to be in the norm before"
                yield Spot(str(stored.file), stored.name, message)


@rule(
    "trtllm-smoothing-dtype",
    severity="error",
    summary="a pre_quant_scale has not the model's dtype, which TensorRT-LLM asserts",
    text="""W4A8_AWQ asserts the dtype while loading, NVFP4_AWQ at the first input. W4A16_AWQ
    multiplies whatever there is.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:W4A8_AWQ_LinearMethod, NVFP4LinearMethod._input_prepare",),
)
def trtllm_smoothing_dtype(context: Context) -> Iterator[Spot]:
    wanted = _STORED.get(model_dtype(context) or "")
    for module, declared in context.encoded:
        stored = module.tensors.get("pre_quant_scale")
        if stored is None or declared.name not in ("W4A8_AWQ", "NVFP4_AWQ"):
            continue
        if wanted is not None and stored.dtype != wanted:
            yield Spot(str(stored.file), stored.name, f"{stored.dtype}, the model is {wanted}")


def model_dtype(context: Context) -> str | None:
    """Return the dtype that config.json gives the model, None if it gives none."""
    config = context.checkpoint.config
    for part in (config, text_config(config)):
        for key in ("dtype", "torch_dtype"):
            found = part.get(key)
            if isinstance(found, str):
                return found
    return None
