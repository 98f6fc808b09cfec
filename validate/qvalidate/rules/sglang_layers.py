"""Where SGLang builds a layer of another kind than the one that is stored.

Codes meet a plain layer, or a plain weight meets a quantized one, because of the list, of names
that it does not map, or of a config that it does not read. A finding stands for all layers of one
cause.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qschema.architectures import keep_reason
from qvalidate.context import LM_HEAD, Context, Module
from qvalidate.layout import sizes
from qvalidate.rules import sglang_support as support
from qvalidate.rules.registry import Spot, rule, some
from qvalidate.rules.sglang_matching import Layer, layers
from qvalidate.rules.sglang_reading import Reading, built, read
from qvalidate.rules.sglang_support import BOTH, NEW

_SOURCE = "SGLang 0.5.23 modelopt_quant.py:308-424, :978-1118; quantization/utils.py:48-125"
# parts of a model whose layers SGLang names in its own way, or does not load with the model
_APART = frozenset(
    {
        "vision or audio part",
        "multi-token prediction",
        "small projection of a linear-attention or state-space layer",
    }
)


class _Clash(NamedTuple):
    """A module that meets a layer of another kind, and whether SGLang stops there."""

    module: str
    stops: bool
    message: str


@rule(
    "sglang-codes-refused",
    severity="error",
    summary="SGLang stops at a quantized weight, for which it builds no such layer",
    text="""SGLang builds the layer unquantized, or for another format. It stops with an
    AssertionError at the shape of packed codes, and, in models that look up every name (qwen3, an
    unquantized mixtral), with a KeyError at the scale. Causes: a pattern that it takes for the
    layer (it compares its own fused names, so "*v_proj*" excludes qkv_proj); a mixed checkpoint of
    a model whose class has no packed_modules_mapping (Llama, Qwen2, Qwen3, Mixtral);
    hf_quant_config.json alone, with an algorithm that it does not know.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=(
        _SOURCE,
        "SGLang 0.5.23, run with its own loader: Llama in MIXED_PRECISION, '*v_proj*'",
        "run on an H200 with SGLang 0.5.17: KeyError gate_up_proj.input_scale for a mixed qwen3",
    ),
)
def sglang_codes_refused(context: Context) -> Iterator[Spot]:
    yield from _grouped(context, (clash for clash in _codes(context) if clash.stops))


@rule(
    "sglang-codes-misread",
    severity="error",
    summary="SGLang reads a weight's codes as numbers, and drops the scales",
    text="""SGLang builds the layer unquantized, or for another format, casts the codes by value and
    drops the scales, with a warning at most: it starts, generates, and what it generates is noise.
    Causes: hf_quant_config.json alone, with an algorithm that it does not know (FP8_PB_WO and
    FP8_PER_CHANNEL_PER_TOKEN load as a BF16 model); a pattern that it takes for the layer; a mixed
    checkpoint without any NVFP4 layer, which is taken for W4AFP8; a quantized lm_head or router in
    a model that has none.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "wrong"},
    evidence=(
        _SOURCE,
        "SGLang 0.5.23, run with its own loader: FP8_PB_WO by hf_quant_config.json alone; FP8 and "
        "FP8_PB_WO mixed",
        "SGLang 0.5.23 configs/model_config.py:1855-1862",
    ),
)
def sglang_codes_misread(context: Context) -> Iterator[Spot]:
    yield from _grouped(context, (clash for clash in _codes(context) if not clash.stops))


@rule(
    "sglang-plain-refused",
    severity="error",
    summary="SGLang builds a packed layer for an unquantized weight, and stops",
    text="""No pattern excludes the layer as SGLang compares them: with its own names, fused ones
    included, so that "*.q_proj", "*.k_proj" and "*.v_proj" together do not exclude qkv_proj, and
    "experts.*.gate_proj" no expert. In the NVFP4 family the weight has another shape than the
    layer: AssertionError. List the parts by their full names, experts by "...experts*".""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=(
        _SOURCE,
        "SGLang 0.5.23 layers/linear.py:1547, :1708; run with its own loader: experts.*.gate_proj",
    ),
)
def sglang_plain_refused(context: Context) -> Iterator[Spot]:
    yield from _grouped(context, (clash for clash in _plain(context) if clash.stops))


@rule(
    "sglang-plain-cast",
    severity="error",
    summary="SGLang builds a quantized layer for an unquantized weight, and casts it",
    text="""No pattern excludes the layer as SGLang compares them (see sglang-plain-refused; MXFP8's
    method knows no wildcards at all). The 16-bit weight is cast to E4M3 by value and multiplied
    with a scale that was never loaded, without a message.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "wrong"},
    evidence=(
        _SOURCE,
        "SGLang 0.5.23 fp8.py:389-412; run with its own loader: FP8 experts, MXFP8 'self_attn*'",
    ),
)
def sglang_plain_cast(context: Context) -> Iterator[Spot]:
    yield from _grouped(context, (clash for clash in _plain(context) if not clash.stops))


@rule(
    "sglang-partial-fusion",
    severity="error",
    summary="SGLang can't build a fused layer of which the config names some parts",
    text="""q, k and v (gate and up) become one matrix in one format. Where the list of exclusions
    names some of them SGLang stops with "Detected some but not all shards of ... are quantized",
    and where quantized_layers gives them several formats with "Mixed quant_algo within fused
    layer". A pattern that is no regular expression stops it too.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=(_SOURCE, "SGLang 0.5.23, run with its own loader"),
)
def sglang_partial_fusion(context: Context) -> Iterator[Spot]:
    reading = read(context, NEW)
    clashes = (
        _Clash(layer.parts[0], True, made.refusal)
        for layer in _layers(context, reading)
        if (made := built(layer, reading, context)).refusal
    )
    yield from _grouped(context, clashes)


def _codes(context: Context) -> Iterator[_Clash]:
    """Yield the modules stored as codes whose layer has no use for them."""
    reading = read(context, NEW)
    for layer in _layers(context, reading):
        made = built(layer, reading, context)
        if made.refusal or made.algo not in (None, "W4AFP8"):
            continue
        for module in (
            context.quantized[part] for part in layer.parts if part in context.quantized
        ):
            # stacks have a rule of their own
            if module.is_stack:
                continue
            if made.algo is None:
                yield _Clash(module.name, _stops(context, module, reading), made.why)
            else:
                why = "SGLang takes a mixed checkpoint without an NVFP4 layer for W4AFP8"
                stops = layer.is_experts or _is_ragged(module) or _stops(context, module, reading)
                yield _Clash(module.name, stops, why)


def _plain(context: Context) -> Iterator[_Clash]:
    """Yield the unquantized modules whose layer is built quantized."""
    reading = read(context, NEW)
    for layer in _layers(context, reading):
        algo = built(layer, reading, context).algo
        if algo is None:
            continue
        message = f"SGLang builds its {layer.leaf} in {algo}, and no pattern excludes it there"
        for part in layer.parts:
            if part in context.unquantized:
                is_packed = algo in support.PACKED or (algo == "W4AFP8" and layer.is_experts)
                yield _Clash(part, is_packed, message)


def _layers(context: Context, reading: Reading) -> tuple[Layer, ...]:
    """Return the layers of the language model that SGLang builds, none where it refuses."""
    if reading.refusal or not reading.is_known:
        return ()
    config = context.checkpoint.config
    return tuple(
        layer
        for layer in layers([*context.quantized, *context.unquantized], context.model_type)
        if not (layer.name == LM_HEAD and context.is_tied)
        and keep_reason(layer.parts[0], config=config) not in _APART
    )


def _stops(context: Context, module: Module, reading: Reading) -> bool:
    """Return whether the loader of a plain layer stops at the module's tensors."""
    weight = module.tensors["weight"]
    found = sizes(module, module.declared) if module.declared else None
    is_packed = weight.shape != found if found else weight.dtype == "U8"
    return is_packed or is_looked_up(context, module, reading)


def is_looked_up(context: Context, module: Module, reading: Reading) -> bool:
    """Return whether the model's loader stops at a name of this module that it does not know."""
    leaf = module.name.rpartition(".")[2]
    is_fused = leaf in support.FUSED_LEAVES or ".experts." in module.name
    has_more = bool(module.tensors.keys() - {"weight", "bias"})
    strict = support.STRICT_IF_PLAIN if reading.method is None else support.STRICT
    return context.model_type in strict and is_fused and has_more


def _is_ragged(module: Module) -> bool:
    found = sizes(module, module.declared) if module.declared else None
    return found is not None and any(size % support.BLOCK for size in found)


def _grouped(context: Context, clashes: Iterable[_Clash]) -> Iterator[Spot]:
    """Yield one spot for each cause, at the first module that it concerns."""
    causes: dict[str, list[str]] = {}
    for clash in clashes:
        causes.setdefault(clash.message, []).append(clash.module)
    for message, names in causes.items():
        # a plain stack of experts is no module, but a parameter of one
        plain = context.unquantized.get(names[0])
        stored = plain or context.modules[names[0]].tensors["weight"]
        yield Spot(str(stored.file), stored.name, f"{message} ({some(names)})")
