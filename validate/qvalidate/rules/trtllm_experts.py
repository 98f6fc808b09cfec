"""What TensorRT-LLM does with routed experts: one method for all of a layer, its own names."""

from collections.abc import Iterator
from math import isclose

from qschema.architectures import KNOWN, fused_siblings
from qvalidate.context import Context, Module, positive_int
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.trtllm_matching import Layer, layers
from qvalidate.rules.trtllm_support import (
    BOTH,
    ENGINE,
    STACKED_EXPERTS,
    V12,
    V13,
    Support,
    support_of,
)

_MOE = "documented: _torch/modules/fused_moe/quantization.py"
_TABLE = "documented: _torch/modules/fused_moe/fused_moe_cutlass.py:_QUANT_SUPPORT_TABLE"
_NUMBERS = ("num_local_experts", "n_routed_experts", "num_experts")
_TRIPLES = (frozenset({"w1", "w2", "w3"}), frozenset({"gate_proj", "up_proj", "down_proj"}))
_RELATIVE, _ABSOLUTE = 1e-5, 1e-8


def experts(context: Context) -> Iterator[tuple[Layer, tuple[Module, ...], Support]]:
    """Yield the experts of each layer that are stored one by one, in a supported format."""
    for layer in layers(context.quantized).values():
        first = context.quantized[layer.parts[0]]
        support = support_of(first)
        if layer.kind == "experts" and support is not None and not first.is_stack:
            yield layer, tuple(context.quantized[part] for part in layer.parts), support


@rule(
    "trtllm-experts-unsupported",
    severity="error",
    summary="TensorRT-LLM has no method for experts in this format",
    text="""FP8_PER_CHANNEL_PER_TOKEN and W4A16_AWQ are for dense layers only, W4A8_NVFP4_FP8 needs
    moe_backend TRTLLM. Keep the experts in another format, or unquantized and excluded.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(_TABLE,),
)
def trtllm_experts_unsupported(context: Context) -> Iterator[Spot]:
    for layer, modules, support in experts(context):
        if support.experts is not None and modules[0].declared is not None:
            message = f"{modules[0].declared.name} in {layer.name}: {support.experts}"
            yield Spot(modules[0].file, modules[0].weight_name, message)


@rule(
    "trtllm-experts-weight-missing",
    severity="error",
    summary="TensorRT-LLM stops at a layer of experts that lacks a weight of one of them",
    text="""The loader asks for the weights of as many experts as config.json says, of each for all
    of what the others have, and asserts that they are there. What all lack is found in model types
    with known names.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_MOE}:load_expert_w2_weight (assert w2_weight is not None)",),
)
def trtllm_experts_weight_missing(context: Context) -> Iterator[Spot]:
    wanted = positive_int(context.checkpoint.config, *_NUMBERS)
    for layer in layers([*context.quantized, *context.unquantized]).values():
        found = [part.removeprefix(f"{layer.name}.").partition(".") for part in layer.parts]
        if layer.kind != "experts" or not all(leaf for _, _, leaf in found):
            continue
        experts_of_leaf: dict[str, set[str]] = {}
        for expert, _, leaf in found:
            experts_of_leaf.setdefault(leaf, set()).add(expert)
        triple = next((names for names in _TRIPLES if names & experts_of_leaf.keys()), frozenset())
        for leaf in triple if context.model_type in KNOWN else ():
            experts_of_leaf.setdefault(leaf, set())
        count = wanted or max(map(len, experts_of_leaf.values()))
        for leaf, there in sorted(experts_of_leaf.items()):
            lacking = next((str(number) for number in range(count) if str(number) not in there), "")
            if lacking:
                file = str(context.modules[layer.parts[0]].tensors["weight"].file)
                where = f"{layer.name}.{lacking}.{leaf}.weight"
                yield Spot(file, where, f"missing; {len(there)} of {count} experts have it")


@rule(
    "trtllm-experts-scale-missing",
    severity="error",
    summary="TensorRT-LLM stops at an expert without this tensor",
    text="""In the NVFP4 formats weight_scale, weight_scale_2 and input_scale of w1, w2 and w3 of
    every expert are looked up, in W4A8_AWQ pre_quant_scale too: KeyError. An expert that
    calibration never saw has no input_scale.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_MOE}:NVFP4FusedMoEMethod, WInt4AFP8FusedMoEMethod", "documented: issue 6530"),
)
def trtllm_experts_scale_missing(context: Context) -> Iterator[Spot]:
    for layer, modules, support in experts(context):
        for suffix in support.experts_needed:
            yield from _lacking(layer, modules, suffix, "the loader looks it up (KeyError)")


@rule(
    "trtllm-experts-scale-unloaded",
    severity="error",
    summary="TensorRT-LLM 1.3 computes experts with a scale that was never loaded",
    text="""Of FP8 experts the loader takes the scales that are there. The input scales of all
    experts are reduced to the largest, and one that is missing takes part in it as uninitialised
    memory.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "wrong"},
    evidence=(f"{_MOE}:load_activation_scales_fp8_qdq, FP8QDQFusedMoEMethod.load_quant_scales",),
)
@rule(
    "trtllm-experts-scale-unloaded-12",
    severity="error",
    summary="TensorRT-LLM 1.2 stops at a missing scale of an expert, or never loads it",
    text="""As trtllm-experts-scale-unloaded. An older loader looked the scales up and stopped, a
    newer one does not; which of them 1.2.1 has is not known.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "unknown"},
    evidence=(f"{_MOE}:load_activation_scales_fp8_qdq (two versions)",),
)
def trtllm_experts_scale_unloaded(context: Context) -> Iterator[Spot]:
    for layer, modules, support in experts(context):
        for suffix in support.experts_unloaded:
            yield from _lacking(layer, modules, suffix, "TensorRT-LLM does not ask for it")


@rule(
    "trtllm-experts-block-scale",
    severity="error",
    summary="TensorRT-LLM 1.3 reads the block scales of experts as weight_scale_inv only",
    text="""For experts in FP8_BLOCK_SCALES the loader asks for weight_scale_inv, DeepSeek's name.
    ModelOpt writes weight_scale, which is passed over without a message, and the scales stay
    uninitialised memory. Dense layers are read under both names.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "wrong"},
    evidence=(f"{_MOE}:DeepSeekFP8BlockScalesFusedMoEMethod (weight_scale_inv, if it is there)",),
)
@rule(
    "trtllm-experts-block-scale-12",
    severity="error",
    summary="TensorRT-LLM 1.2 reads the block scales of experts as weight_scale_inv only",
    text="""As trtllm-experts-block-scale. Older loaders looked weight_scale_inv up and stopped, a
    newer one does not; which of them 1.2.1 has is not known.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "unknown"},
    evidence=(f"{_MOE}:DeepSeekFP8BlockScalesFusedMoEMethod (weight_scale_inv; three versions)",),
)
def trtllm_experts_block_scale(context: Context) -> Iterator[Spot]:
    for layer, modules, _ in experts(context):
        declared = modules[0].declared
        if declared is not None and declared.name == "FP8_PB_WO":
            lacking = [module for module in modules if "weight_scale_inv" not in module.tensors]
            if lacking:
                message = (
                    f"missing in {len(lacking)} modules of {layer.name}; no other name is read"
                )
                yield Spot(lacking[0].file, lacking[0].tensor_name("weight_scale_inv"), message)


@rule(
    "trtllm-experts-input-scales",
    severity="error",
    summary="TensorRT-LLM asserts that an expert's gate and up have the same input_scale",
    text="""w1 and w3 of an NVFP4 expert see the same input, and their input_scale has to be the
    same, within torch.allclose.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_MOE}:NVFP4FusedMoEMethod (w1 and w3 input_scale)",),
)
def trtllm_experts_input_scales(context: Context) -> Iterator[Spot]:
    yield from _unequal(context, "input_scale")


@rule(
    "trtllm-experts-weight-scales",
    severity="error",
    summary="an expert's gate and up have different scales, of which TensorRT-LLM takes the larger",
    text="""w1 and w3 of an NVFP4 expert share weight_scale_2. Where they differ, older versions
    stopped, and newer ones warn and take the larger for both, so that one of them comes out
    multiplied with the ratio.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "unknown"},
    evidence=(f"{_MOE}:NVFP4FusedMoEMethod (w1 and w3 weight_scale_2)", "documented: issue 6569"),
)
def trtllm_experts_weight_scales(context: Context) -> Iterator[Spot]:
    yield from _unequal(context, "weight_scale_2")


@rule(
    "trtllm-stacked-experts",
    severity="error",
    summary="quantized experts stacked in one tensor, in a model that is loaded expert by expert",
    text="""TensorRT-LLM reads experts as gate_up_proj and down_proj of a layer in the loaders of
    Llama 4 and gpt-oss only. Elsewhere it asks for the names of single experts.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_MOE}:MoEWeightLoadingMode.FUSED_GATE_UP_PROJ",),
)
def trtllm_stacked_experts(context: Context) -> Iterator[Spot]:
    for module in context.quantized.values():
        if module.is_stack and context.model_type not in STACKED_EXPERTS:
            message = f"the loader of {context.model_type} takes experts one by one"
            yield Spot(module.file, module.name, message)


def _lacking(layer: Layer, modules: tuple[Module, ...], suffix: str, why: str) -> Iterator[Spot]:
    """Yield the first module without the tensor: hundreds of experts mostly lack the same."""
    found = [module for module in modules if suffix not in module.tensors]
    if found:
        message = f"missing in {len(found)} modules of {layer.name}; {why}"
        yield Spot(found[0].file, found[0].tensor_name(suffix), message)


def _unequal(context: Context, suffix: str) -> Iterator[Spot]:
    for _, modules, support in experts(context):
        is_asserted = suffix in support.experts_needed and support.scale_dtype == "F8_E4M3"
        for module in modules if is_asserted else ():
            first = fused_siblings(module.name)[0]
            own = context.numbers.get(f"{module.name}.{suffix}")
            other = context.numbers.get(f"{first}.{suffix}")
            if own is None or other is None:
                continue
            if not isclose(own, other, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
                message = f"{own:.9g}, {first}.{suffix} is {other:.9g}"
                yield Spot(module.file, f"{module.name}.{suffix}", message)
