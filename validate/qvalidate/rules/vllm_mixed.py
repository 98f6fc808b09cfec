"""What vLLM makes of the list of quantized layers of a mixed checkpoint.

It looks for its own, fused names: by the name, by the parts, by anything below the name, and for
`X.experts` by anything below X. Source: vLLM 0.32.0 and 0.33.0 modelopt.py _resolve_quant_algo.
"""

from collections.abc import Iterator, Mapping

from qvalidate.context import Context, Module
from qvalidate.rules.registry import Spot, rule, some
from qvalidate.rules.vllm_matching import Layer, layers, listed_entry, match
from qvalidate.rules.vllm_support import SUPPORT, VERSIONS

_SOURCE = "vLLM 0.33.0 modelopt.py:1748-1825; vLLM 0.32.0, _resolve_quant_algo"
# codecs that vLLM takes per layer only, and a name for experts
_PER_LAYER = frozenset({"IQ2_XS", "IQ2_XXS", "Q8_0", "FP8_BLOCK_SCALES"})


@rule(
    "vllm-layer-algo-unsupported",
    severity="error",
    summary="quantized_layers names an algorithm that vLLM has no method for",
    text="""Of a mixed checkpoint's layers vLLM knows six algorithms, and takes a layer with any
    other name for unquantized, without a message. It then stops at the layer's scales, or, in
    models that skip such names, reads the codes as weights.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(
        _SOURCE,
        "run with vLLM 0.32.0 on CPU: 'no module or parameter named o_proj.weight_scale'",
    ),
)
def vllm_layer_algo_unsupported(context: Context) -> Iterator[Spot]:
    listed, known = _listed(context), (SUPPORT.keys() | _PER_LAYER) - {"MIXED_PRECISION"}
    unknown = [name for name, algo in listed.items() if algo not in known]
    if unknown and context.obeyed is not None:
        algos = some(sorted({listed[name] for name in unknown}))
        where = f"{context.obeyed.where('quantized_layers')}.{unknown[0]}"
        message = f"vLLM has no method for {algos}, in {len(unknown)} entries: {some(unknown)}"
        yield Spot(context.obeyed.file, where, message)


@rule(
    "vllm-mixed-algos",
    severity="error",
    summary="parts that vLLM fuses into one layer are in different formats",
    text="""q, k and v (gate and up) become one matrix in one format: vLLM stops with "Mixed
    quant_algo within fused layer".""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(_SOURCE, "run with vLLM 0.32.0 on CPU: k_proj in another format than q_proj"),
)
def vllm_mixed_algos(context: Context) -> Iterator[Spot]:
    for layer in layers(context.quantized).values():
        if not layer.is_experts:
            yield from _differing(context, layer)


@rule(
    "vllm-mixed-experts",
    severity="error",
    summary="experts of one layer are in different formats",
    text="""All experts of a layer share one method, that of the first entry of quantized_layers
    that names one of them. vLLM stops at the first tensor that the method does not have, and
    computes with wrong numbers where the formats have the same tensors.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "unknown"},
    evidence=(_SOURCE,),
)
def vllm_mixed_experts(context: Context) -> Iterator[Spot]:
    for layer in layers(context.quantized).values():
        if layer.is_experts:
            yield from _differing(context, layer)


def _differing(context: Context, layer: Layer) -> Iterator[Spot]:
    """Yield the first part of `layer` whose format is not that of the first part."""
    first, *others = (context.quantized[part] for part in layer.parts)
    for module in others:
        if module.declared is not first.declared:
            message = (
                f"is {_format(module)}, {first.name} of the same {layer.name} is {_format(first)}"
            )
            yield Spot(module.file, module.weight_name, message)
            return


@rule(
    "vllm-layers-overreach",
    severity="error",
    summary="vLLM takes an unquantized layer for quantized, by an entry meant for another",
    text="""Where quantized_layers does not name a layer, vLLM asks for any name below it, and for
    the experts of X for any name below X: unquantized experts beside a quantized shared expert
    count as quantized. Their weights are then cast by value and multiplied with scales that were
    never loaded. Name the layer in `ignore`.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "wrong"},
    evidence=(_SOURCE, "vLLM 0.33.0, run with its own loader: BF16 experts, quantized shared one"),
)
def vllm_layers_overreach(context: Context) -> Iterator[Spot]:
    listed = _listed(context)
    for layer in layers(context.unquantized).values() if listed else ():
        names = [part for part in layer.parts if context.assignment.key(part)]
        entry = None if names else listed_entry(layer.name, listed)
        # what is listed by its own name is for listed-but-unquantized
        if entry is not None and match(layer.name, context.exclude).state == "no":
            weight = context.unquantized[layer.parts[0]]
            message = f"vLLM takes {layer.name} for {listed[entry]}, by the entry {entry!r}"
            yield Spot(str(weight.file), weight.name, message)


def _listed(context: Context) -> Mapping[str, str]:
    """Return module -> algorithm in upper case, of a mixed checkpoint."""
    if context.obeyed is None or not context.assignment.is_mixed:
        return {}
    layers_of = context.obeyed.layers or (context.in_file.layers if context.in_file else {})
    return {name: algo.upper() for name, algo in layers_of.items()}


def _format(module: Module) -> str:
    return module.declared.name if module.declared else "of no known format"
