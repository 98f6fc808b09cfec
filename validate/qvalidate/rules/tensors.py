"""Every tensor that a module's format declares is there, with its dtype, rank and shape."""

from collections.abc import Iterator

from qschema.formats import Format
from qvalidate.context import Context, Module, codes_spec
from qvalidate.layout import expected, misfit, sizes
from qvalidate.rules.registry import Spot, rule


@rule(
    "missing-tensor",
    severity="error",
    summary="a quantized module lacks a tensor that its format declares",
    text="""A weight stored as codes means nothing without its scale. Engines do not check:
    vLLM's missing-weight check is off for quantized models, so the scale stays uninitialised
    memory and the model generates noise, or dies later in a kernel that names no tensor. A static
    input_scale is missing after a conversion without calibration. What a format may do without,
    pre_quant_scale, is not asked for.""",
    effects={"vllm": "wrong"},
    evidence=(
        "vLLM 0.33.0 model_executor/model_loader/default_loader.py:510-524",
        "run on an H200 with vLLM 0.33.0: a missing down_proj.weight_scale loads",
    ),
)
def missing_tensor(context: Context) -> Iterator[Spot]:
    for module, declared in context.encoded:
        found = expected(module, declared)
        for spec in declared.tensors:
            if spec.suffix in module.tensors or not spec.required:
                continue
            shape = f" {list(found[spec.suffix][1])}" if found else ""
            message = f"missing; {declared.name} needs {spec.dtype}{shape} ({spec.meaning})"
            yield Spot(module.file, module.tensor_name(spec.suffix), message)


@rule(
    "wrong-dtype",
    severity="error",
    summary="a tensor's dtype is not the one that the format declares",
    text="""Engines copy values into a parameter of their own dtype. Where the stored dtype
    is another one, the values are converted: bits that were meant as codes become numbers,
    and nothing is reported. E8M0 scales are U8: as F8_E8M0 they are cast by value.""",
    effects={"vllm": "unknown"},
    evidence=("vLLM 0.33.0: value cast by copy_ in every weight loader",),
)
def wrong_dtype(context: Context) -> Iterator[Spot]:
    for module, declared in context.encoded:
        for spec in declared.tensors:
            stored = module.tensors.get(spec.suffix)
            if stored is not None and stored.dtype != spec.dtype:
                yield Spot(
                    str(stored.file),
                    stored.name,
                    f"expected {spec.dtype} ({declared.name} {spec.meaning}), got {stored.dtype}",
                )


@rule(
    "wrong-shape",
    severity="error",
    summary="a tensor's rank or shape is not the one that the format declares",
    text="""The shape follows from the weight [N, K]. Squeezed, flattened or extra dimensions
    count: vLLM asserts on [N, 1] where FP8_PER_CHANNEL_PER_TOKEN has [N], and on a 2-D scale
    where FP8_PB_WO has four dimensions, also for a weight of a single block. Sizes that the
    format's groups do not divide are a wrong shape too. Of experts stacked in one tensor,
    [E, K, N], the scales have the dimensions in that order.""",
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 model_executor/parameter.py: bare AssertionError on a shape",
        "vLLM 0.33.0 model_executor/layers/quantization/modelopt.py:2491-2528",
    ),
)
def wrong_shape(context: Context) -> Iterator[Spot]:
    for module, declared in context.encoded:
        weight = module.codes(declared)
        if weight is None:
            continue
        if sizes(module, declared) is None:
            dims = ", ".join(codes_spec(declared).shape)
            message = (
                f"expected shape [{dims}], got {list(weight.shape)} of rank {len(weight.shape)}"
            )
            yield Spot(str(weight.file), weight.name, message)
        elif problem := misfit(module, declared):
            yield Spot(str(weight.file), weight.name, problem)
        else:
            yield from _misshapen(module, declared)


def _misshapen(module: Module, declared: Format) -> Iterator[Spot]:
    weight, shapes = module.codes(declared), expected(module, declared)
    assert weight is not None
    for suffix, (_, shape) in (shapes or {}).items():
        stored = module.tensors.get(suffix)
        if stored is None or stored.shape == shape:
            continue
        rank = "" if len(shape) == len(stored.shape) else f" (rank {len(stored.shape)})"
        message = (
            f"expected shape {list(shape)} for weight {list(weight.shape)} in {declared.name}, "
            f"got {list(stored.shape)}{rank}"
        )
        yield Spot(str(stored.file), stored.name, message)


@rule(
    "stack-unsupported",
    severity="error",
    summary="experts are stacked in one tensor in a format that has no such layout",
    text="""ModelOpt writes the experts of Llama 4 and gpt-oss as one tensor [E, K, N] per
    projection, blocks along K, for FP8 and the NVFP4 family only. What it writes for other formats
    has its blocks along the outputs, and no engine reads it.""",
    effects={"vllm": "unknown"},
    evidence=("ModelOpt 0.47.0 export/unified_export_hf.py:722-779",),
)
def stack_unsupported(context: Context) -> Iterator[Spot]:
    for module, declared in context.encoded:
        if module.is_stack and not declared.stackable:
            message = f"{declared.name} has no layout for experts stacked in one tensor"
            yield Spot(module.file, module.name, message)
