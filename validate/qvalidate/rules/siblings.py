"""Weights that engines load as one agree on what the format says they share.

Siblings are q/k/v, gate/up, q_a/kv_a, and the gate and up of every expert.
"""

from collections.abc import Iterator
from itertools import groupby

from qschema.architectures import experts_of, fused_siblings
from qschema.formats import Format, TensorSpec
from qschema.safetensors import Stored
from qvalidate.context import Context, Module
from qvalidate.rules.registry import Severity, Spot, rule


@rule(
    "fused-scale-differs",
    severity="error",
    summary="siblings that engines load as one weight differ in a scale that they must share",
    text="""q/k/v, and gate/up, become one matrix with one scale of the whole weight. Under NVFP4
    vLLM takes the largest weight_scale_2 of q/k/v, and of an expert's gate and up the gate's, and
    does not encode the other parts anew: their weights come out multiplied with the ratio, with a
    warning at most. Where engines encode anew (FP8), or only the input is concerned, it is a
    warning: the numbers stay close, but the writer departs from its format.""",
    effects={"vllm": "wrong"},
    evidence=("vLLM 0.33.0 modelopt.py:2083-2095 (q/k/v), :1055-1063 (experts), :2190-2194 (FP8)",),
)
def fused_scale_differs(context: Context) -> Iterator[Spot]:
    for module, declared in context.encoded:
        for spec in declared.tensors:
            if spec.shared == "own" or (
                spec.shared == "experts" and experts_of(module.name) is None
            ):
                continue
            yield from _differing(context, module, declared, spec)


def _differing(
    context: Context, module: Module, declared: Format, spec: TensorSpec
) -> Iterator[Spot]:
    """Yield `module` if its value is not that of the first of its siblings."""
    for name in fused_siblings(module.name):
        first = context.modules.get(name)
        if first is None or first.declared is not declared or spec.suffix not in first.tensors:
            continue
        own = context.numbers.get(module.tensor_name(spec.suffix))
        other = context.numbers.get(first.tensor_name(spec.suffix))
        if own is not None and other is not None and own != other:
            is_silent = spec.role == "global" and spec.shared == "siblings"
            severity: Severity = "error" if is_silent else "warning"
            message = f"{own:.6g}, {first.tensor_name(spec.suffix)} is {other:.6g}"
            message += f", ratio {own / other:.4g}" if other else ""
            stored = module.tensors[spec.suffix]
            yield Spot(
                str(stored.file), stored.name, f"{message}; {declared.name} shares it", severity
            )
        return


@rule(
    "expert-input-scales-differ",
    severity="warning",
    summary="the experts of a layer have different input scales",
    text="""Which expert sees which token is not known beforehand, so calibration gives all
    experts of a projection one input_scale. Engines reduce them to one: vLLM takes the largest of
    the layer, and gate and up share a slot, in which the last one read stays.""",
    evidence=("vLLM 0.33.0, run with its own loader: FP8 experts",),
)
def expert_input_scales_differ(context: Context) -> Iterator[Spot]:
    found: list[tuple[str, float, Stored]] = []
    for module, declared in context.encoded:
        expert = experts_of(module.name)
        for spec in declared.specs("input"):
            stored = module.tensors.get(spec.suffix)
            value = context.numbers.get(module.tensor_name(spec.suffix))
            if expert is not None and stored is not None and value is not None:
                found.append((".*.".join(expert), value, stored))
    found.sort(key=lambda item: item[0])
    for projection, items in groupby(found, key=lambda item: item[0]):
        values = {value: stored for _, value, stored in items}
        if len(values) > 1:
            low, high = min(values), max(values)
            ratio = f", ratio {high / low:.4g}" if low else ""
            message = f"from {low:.6g} ({values[low].name}) to {high:.6g}{ratio} in {projection}"
            yield Spot(str(values[high].file), values[high].name, message)
