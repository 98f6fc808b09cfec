"""Every tensor that the format declares is there, with its dtype, rank and shape."""

from collections.abc import Iterator

from qschema.formats import Format
from qvalidate.context import Context, Module, axes, codes_spec
from qvalidate.rules.registry import Spot, rule


@rule(
    "missing-tensor",
    severity="error",
    summary="a quantized module lacks a tensor that its format declares",
    text="""A weight stored as codes means nothing without its scale. Engines do not check:
    vLLM's missing-weight check is off for quantized models, so the scale stays uninitialised
    memory and the model generates noise, or dies later in a kernel that names no tensor.""",
    effects={"vllm": "wrong"},
    evidence=(
        "vLLM 0.33.0 model_executor/model_loader/default_loader.py:510-524",
        "run on an H200 with vLLM 0.33.0: a missing down_proj.weight_scale loads",
    ),
)
def missing_tensor(context: Context) -> Iterator[Spot]:
    if context.declared is None:
        return
    for module in context.quantized.values():
        expected = _expected(module, context.declared)
        for spec in context.declared.tensors:
            if spec.suffix in module.tensors:
                continue
            shape = f" {list(expected[spec.suffix][1])}" if expected else ""
            yield Spot(
                module.file,
                f"{module.name}.{spec.suffix}",
                f"missing; {context.declared.name} needs {spec.dtype}{shape} ({spec.meaning})",
            )


@rule(
    "wrong-dtype",
    severity="error",
    summary="a tensor's dtype is not the one that the format declares",
    text="""Engines copy values into a parameter of their own dtype. Where the stored dtype
    is another one, the values are converted: bits that were meant as codes become numbers,
    and nothing is reported.""",
    effects={"vllm": "unknown"},
    evidence=("vLLM 0.33.0: value cast by copy_ in every weight loader",),
)
def wrong_dtype(context: Context) -> Iterator[Spot]:
    if context.declared is None:
        return
    for module in context.quantized.values():
        for spec in context.declared.tensors:
            stored = module.tensors.get(spec.suffix)
            if stored is not None and stored.dtype != spec.dtype:
                yield Spot(
                    str(stored.file),
                    stored.name,
                    f"expected {spec.dtype} ({context.declared.name} {spec.meaning}), "
                    f"got {stored.dtype}",
                )


@rule(
    "wrong-shape",
    severity="error",
    summary="a tensor's rank or shape is not the one that the format declares",
    text="""The shape follows from the weight [N, K]. Squeezed, flattened or extra dimensions
    count: vLLM asserts on [N, 1] where FP8_PER_CHANNEL_PER_TOKEN has [N], and on a 2-D scale
    where FP8_PB_WO has four dimensions, also for a weight of a single block.""",
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 model_executor/parameter.py: bare AssertionError on a shape",
        "vLLM 0.33.0 model_executor/layers/quantization/modelopt.py:2491-2528",
    ),
)
def wrong_shape(context: Context) -> Iterator[Spot]:
    if context.declared is None:
        return
    codes = codes_spec(context.declared)
    for module in context.quantized.values():
        weight = module.codes(context.declared)
        if weight is None:
            continue
        expected = _expected(module, context.declared)
        if expected is None:
            yield Spot(
                str(weight.file),
                weight.name,
                f"expected shape [{', '.join(codes.shape)}], got {list(weight.shape)} "
                f"of rank {len(weight.shape)}",
            )
            continue
        for suffix, (_, shape) in expected.items():
            stored = module.tensors.get(suffix)
            if stored is None or stored.shape == shape:
                continue
            rank = "" if len(shape) == len(stored.shape) else f" (rank {len(stored.shape)})"
            yield Spot(
                str(stored.file),
                stored.name,
                f"expected shape {list(shape)} for weight {list(weight.shape)} in "
                f"{context.declared.name}, got {list(stored.shape)}{rank}",
            )


def _expected(module: Module, declared: Format) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Return suffix -> (dtype, shape) for the module's own N and K, None if its codes have none."""
    weight = module.codes(declared)
    found = None if weight is None else axes(codes_spec(declared), weight.shape)
    if found is None:
        return None
    return dict(declared.outputs(rows=found[0], columns=found[1]))
