"""Which layers TensorRT-LLM builds quantized and which plain, where the weights are otherwise.

It builds by the config alone and copies whatever has the name: a weight of another dtype is cast by
value, one of another shape stops the loader.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qschema.architectures import KNOWN, keep_reason
from qvalidate.assignment import declared_as
from qvalidate.context import LM_HEAD, Context
from qvalidate.documents import QuantConfig
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.trtllm_config import obeyed_config
from qvalidate.rules.trtllm_matching import FUSED, Layer, excluded_by, layers, listed_entry
from qvalidate.rules.trtllm_support import BOTH, ENGINE, V12, V13, is_packed

_EXCLUDE_12 = (
    "documented: models/modeling_utils.py:QuantConfig.is_module_excluded_from_quantization (1.2: "
    "fnmatch of the full name)"
)
_EXCLUDE_13 = (
    "documented: models/modeling_utils.py:QuantConfig.is_module_excluded_from_quantization (1.3: "
    "the names above, re:, a trailing .*)"
)
_FUSED = "documented: _torch/models/modeling_utils.py:apply_quant_config_exclude_modules"
_LAYERWISE = "documented: _torch/models/modeling_utils.py:apply_layerwise_quant_config"
_COPY = "documented: _torch/modules/linear.py:copy_weight"
_VIEW = "documented: _torch/modules/fused_moe/quantization.py:load_expert_w3_w1_weight (view)"
_HEAD = "documented: _torch/models/modeling_utils.py:_resolve_lm_head_quant_config (1.3)"
# keep_reason() of what the models build without a quantization config
_PLAIN = frozenset({"embedding", "router of a mixture of experts", "vision or audio part"})
# formats whose scales the newer loader takes if they are there; of others it looks them up
_SCALES_OPTIONAL = frozenset({"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"})


@dataclass(frozen=True)
class Build:
    """How one layer is built: by which quant_algo, None if it is plain, and why."""

    layer: Layer
    algo: str | None
    reason: str


def builds(context: Context, *, walks: bool) -> Iterator[Build]:
    """Yield how each layer is built by 1.3 (`walks`) or 1.2, None where it reads no config."""
    config = obeyed_config(context)
    # 1.2 builds nothing quantized without the file, and no mixed model
    if config is None or (not walks and (config is context.in_config or config.is_mixed)):
        return
    for layer in layers([*context.quantized, *context.unquantized]).values():
        yield _build(context, config, layer, walks)


def _build(context: Context, config: QuantConfig, layer: Layer, walks: bool) -> Build:
    reason = keep_reason(layer.name, config=context.checkpoint.config)
    if reason in _PLAIN:
        return Build(layer, None, f"TensorRT-LLM has no quantized {reason}")
    if layer.name.rpartition(".")[2] == LM_HEAD:
        if not walks:
            return Build(layer, None, "1.2 has no quantized lm_head")
        if not _has_quantized_head(context, config):
            return Build(layer, None, "1.3 builds a plain lm_head, tied or without a weight_scale")
    if found := excluded_by(layer.name, config.exclude, walks=walks):
        return Build(layer, None, f"{found[0]!r} excludes {layer.name} (as {found[1]})")
    if not config.is_mixed:
        return Build(layer, config.algo, f"no pattern excludes {layer.name}")
    entry = listed_entry(layer, config.layers)
    if entry is None:
        return Build(layer, None, f"no entry of quantized_layers is about {layer.name}")
    return Build(layer, config.layers[entry], f"{entry!r} decides about {layer.name}")


def _has_quantized_head(context: Context, config: QuantConfig) -> bool:
    if context.checkpoint.config.get("tie_word_embeddings") is True:
        return False
    if config.is_mixed:
        return LM_HEAD in config.layers
    return f"{LM_HEAD}.weight_scale" in context.checkpoint.tensors


@rule(
    "trtllm-plain-layer",
    severity="error",
    summary="TensorRT-LLM 1.3 builds a plain layer where codes of one byte are stored",
    text="""The list excludes the layer under 1.3's matching, a mixed config does not name it, or it
    is an lm_head or an embedding that can't be quantized. The codes are cast to numbers, without
    the scale and without a message. One hit is enough for a fused layer: where the list names
    q_proj, k_proj and v_proj are plain too. In 1.3 a pattern excludes all below what it names.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "wrong"},
    evidence=(_EXCLUDE_13, _FUSED, _LAYERWISE, _HEAD, _COPY),
)
def trtllm_plain_layer(context: Context) -> Iterator[Spot]:
    yield from _plain(context, walks=True, refused=False)


@rule(
    "trtllm-plain-layer-packed",
    severity="error",
    summary="TensorRT-LLM 1.3 builds a plain layer, which the stored codes do not fit",
    text="""As trtllm-plain-layer, where two codes share a byte: the sizes differ and the copy
    stops. The weights of experts are not cast, but read as bits of the layer's dtype, so that codes
    of one byte do not fit either.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "refuses"},
    evidence=(_EXCLUDE_13, _FUSED, _LAYERWISE, _COPY, _VIEW),
)
def trtllm_plain_layer_packed(context: Context) -> Iterator[Spot]:
    yield from _plain(context, walks=True, refused=True)


@rule(
    "trtllm-plain-layer-12",
    severity="error",
    summary="TensorRT-LLM 1.2 builds a plain layer where codes of one byte are stored",
    text="""As trtllm-plain-layer, under 1.2's matching: the full name, or that of one part of a
    fused layer, has to match as a shell wildcard. 1.2 has no quantized lm_head.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "wrong"},
    evidence=(_EXCLUDE_12, _FUSED, _COPY, "documented: pull request 15680 (lm_head)"),
)
def trtllm_plain_layer_12(context: Context) -> Iterator[Spot]:
    yield from _plain(context, walks=False, refused=False)


@rule(
    "trtllm-plain-layer-packed-12",
    severity="error",
    summary="TensorRT-LLM 1.2 builds a plain layer, which the stored codes do not fit",
    text="""As trtllm-plain-layer-packed, under 1.2's matching.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "refuses"},
    evidence=(_EXCLUDE_12, _FUSED, _COPY, _VIEW),
)
def trtllm_plain_layer_packed_12(context: Context) -> Iterator[Spot]:
    yield from _plain(context, walks=False, refused=True)


def _plain(context: Context, *, walks: bool, refused: bool) -> Iterator[Spot]:
    for build in builds(context, walks=walks):
        for part in () if build.algo else build.layer.parts:
            module = context.quantized.get(part)
            if module and refused == (build.layer.kind == "experts" or is_packed(module)):
                dtype = module.tensors["weight"].dtype
                yield Spot(module.file, module.weight_name, f"{dtype}, but {build.reason}")


@rule(
    "trtllm-quantized-layer",
    severity="error",
    summary="TensorRT-LLM 1.3 builds a quantized layer where a 16-bit weight is stored",
    text="""1.3 builds a quantized layer for every Linear that the list does not exclude, or that
    an entry of a mixed config is about. In the FP8 formats the weight is cast to E4M3 by value, and
    its scale is 1.0 or was never loaded; there is no message.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "wrong"},
    evidence=(_EXCLUDE_13, _LAYERWISE, _COPY),
)
def trtllm_quantized_layer(context: Context) -> Iterator[Spot]:
    yield from _quantized(context, walks=True, refused=False)


@rule(
    "trtllm-quantized-layer-12",
    severity="error",
    summary="TensorRT-LLM 1.2 builds a quantized layer where a 16-bit weight is stored",
    text="""As trtllm-quantized-layer, under 1.2's matching: "model.layers.3" excludes nothing
    below it, "x.*" does not exclude x, and "re:" patterns exclude nothing. An older loader stopped
    where the scale is missing, a newer one goes on; which of them 1.2.1 has is not known.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "unknown"},
    evidence=(_EXCLUDE_12, _COPY),
)
def trtllm_quantized_layer_12(context: Context) -> Iterator[Spot]:
    yield from _quantized(context, walks=False, refused=False)


@rule(
    "trtllm-quantized-layer-lookup",
    severity="error",
    summary="TensorRT-LLM 1.3 builds a quantized layer, which a 16-bit weight does not fit",
    text="""As trtllm-quantized-layer, in a format of packed codes, in one whose scales are looked
    up, or for experts: the copy stops at the sizes, or the loader at the missing scale.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "refuses"},
    evidence=(_EXCLUDE_13, _LAYERWISE, _COPY, _VIEW),
)
def trtllm_quantized_layer_lookup(context: Context) -> Iterator[Spot]:
    yield from _quantized(context, walks=True, refused=True)


@rule(
    "trtllm-quantized-layer-lookup-12",
    severity="error",
    summary="TensorRT-LLM 1.2 builds a quantized layer, which a 16-bit weight does not fit",
    text="""As trtllm-quantized-layer-lookup, under 1.2's matching.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "refuses"},
    evidence=(_EXCLUDE_12, _COPY, _VIEW),
)
def trtllm_quantized_layer_lookup_12(context: Context) -> Iterator[Spot]:
    yield from _quantized(context, walks=False, refused=True)


def _quantized(context: Context, *, walks: bool, refused: bool) -> Iterator[Spot]:
    for build in builds(context, walks=walks):
        built = declared_as(build.algo)
        if built is None:
            continue
        stops = build.layer.kind == "experts" or built.name not in _SCALES_OPTIONAL
        for part in build.layer.parts if stops == refused else ():
            weight = context.unquantized.get(part)
            if weight is not None:
                message = f"{weight.dtype}, but built as {build.algo}: {build.reason}"
                yield Spot(str(weight.file), weight.name, message)


@rule(
    "trtllm-mixed-fusion",
    severity="error",
    summary="parts of a layer that TensorRT-LLM fuses are stored in different dtypes",
    text="""q, k and v (gate and up) are joined to one tensor before they are copied. Torch joins
    no E4M3 with another dtype, and packed codes have other sizes than plain weights: the loader
    stops, whatever the list says.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(
        "documented: _torch/modules/linear.py:load_weights_fused_qkv_linear (torch.cat)",
        "torch 2.13: torch.cat of F8_E4M3 and BF16 raises",
    ),
)
def trtllm_mixed_fusion(context: Context) -> Iterator[Spot]:
    for layer in layers([*context.quantized, *context.unquantized]).values():
        codes = [part for part in layer.parts if part in context.quantized]
        plain = [part for part in layer.parts if part in context.unquantized]
        if layer.kind == "experts" or not codes or not plain:
            continue
        stored = context.modules[codes[0]].tensors["weight"]
        if stored.dtype in ("F8_E4M3", "U8"):
            weight = context.unquantized[plain[0]]
            message = f"{weight.dtype}, but {codes[0]} of the same {layer.name} is {stored.dtype}"
            yield Spot(str(weight.file), weight.name, message)


@rule(
    "trtllm-mixed-parts",
    severity="error",
    summary="TensorRT-LLM builds a layer in another format than a part of it has",
    text="""Of q, k and v the entry of q decides, of gate and up that of gate, and of all experts of
    a layer the first entry that names one of them. What the others have is loaded into that format,
    and stops at the first shape that differs, if one does.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "unknown"},
    evidence=(_LAYERWISE,),
)
def trtllm_mixed_parts(context: Context) -> Iterator[Spot]:
    for build in builds(context, walks=True) if context.assignment.is_mixed else ():
        built = declared_as(build.algo)
        for part in build.layer.parts if built else ():
            module = context.quantized.get(part)
            if module and module.declared and module.declared is not built:
                message = f"{module.declared.name}, but built as {build.algo}: {build.reason}"
                yield Spot(module.file, module.weight_name, message)
                break


@rule(
    "trtllm-weight-missing",
    severity="error",
    summary="TensorRT-LLM stops at a layer that lacks a weight beside its scale, or one part",
    text="""Of a layer of which anything is stored, the weight has to be there: the loader asserts
    it, and of fused layers for each part. Only of a layer of which nothing is stored does 1.3 keep
    the memory as it is. Parts are asked for in model types with known names.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=("documented: _torch/modules/linear.py:load_weights_fused_qkv_helper (assert)",),
)
def trtllm_weight_missing(context: Context) -> Iterator[Spot]:
    for name, module in context.modules.items():
        if "weight" not in module.tensors and "weight_scale" in module.tensors:
            message = "missing; TensorRT-LLM asserts that it is there"
            yield Spot(module.file, module.weight_name, message)
        parent, dot, leaf = name.rpartition(".")
        if context.model_type not in KNOWN or leaf not in ("k_proj", "v_proj", "gate_proj"):
            continue
        parts = FUSED["gate_up_proj" if leaf == "gate_proj" else "qkv_proj"]
        for part in parts:
            if f"{parent}{dot}{part}" not in context.modules:
                message = f"missing; {name} of the same layer is there"
                yield Spot(module.file, f"{parent}{dot}{part}.weight", message)
