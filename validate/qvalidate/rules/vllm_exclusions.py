"""What vLLM makes of the list of exclusions, where that differs from what the list says.

vLLM matches its own, fused names, exactly, then by plain substring, then by wildcard.
"""

from collections.abc import Iterator

from qvalidate.context import LM_HEAD, Context
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.vllm_matching import is_plain, layers, match
from qvalidate.rules.vllm_support import VERSIONS

_SOURCE = "vLLM 0.33.0 modelopt.py:191-226, utils/quant_utils.py is_layer_skipped"


@rule(
    "vllm-exclusion-overreach",
    severity="error",
    summary="under vLLM's matching, a pattern excludes a quantized layer that it was not meant for",
    text="""vLLM takes a pattern for excluding a layer if it is any part of the layer's name:
    "model.layers.1" also excludes layers 10 to 19, "mlp.gate" excludes mlp.gate_up_proj,
    "head" excludes lm_head. The name of one expert excludes all experts of its layer. The
    layer is then built unquantized and meets codes and scales; most models stop there, some
    read the codes as weights.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(_SOURCE, "run with its own matching"),
)
def vllm_exclusion_overreach(context: Context) -> Iterator[Spot]:
    for layer in layers(context.quantized).values():
        found = match(layer.name, context.exclude)
        meant = [part for part in layer.parts if context.excluded_by(part)]
        if found.state == "excluded" and not meant:
            module = context.quantized[layer.parts[0]]
            message = f"vLLM excludes its layer {layer.name} by {found.pattern!r}, {found.how}"
            yield Spot(module.file, module.weight_name, message)


@rule(
    "vllm-exclusion-missed",
    severity="error",
    summary="under vLLM's matching, no pattern excludes an unquantized layer",
    text="""Wildcards are compared with vLLM's fused names: "*.q_proj", "*.k_proj" and
    "*.v_proj" together do not exclude qkv_proj, and "model.lm_head" does not exclude lm_head.
    vLLM then casts the weight to the quantized dtype by value and multiplies with a scale
    that was never loaded, without a message. List the parts by their full names.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "wrong"},
    evidence=(_SOURCE, "run with its own matching"),
)
def vllm_exclusion_missed(context: Context) -> Iterator[Spot]:
    if context.obeyed is None or context.obeyed.is_mixed or not context.quantized:
        return
    for layer in layers(context.unquantized).values():
        if (
            is_plain(layer.name, context.model_type)
            or match(layer.name, context.exclude).state != "no"
        ):
            continue
        # what the list does not name at all is for unquantized-not-excluded
        pattern = context.excluded_by(layer.parts[0])
        if pattern is not None:
            weight = context.unquantized[layer.parts[0]]
            message = f"{pattern!r} does not exclude it: for vLLM the layer is {layer.name}"
            yield Spot(str(weight.file), weight.name, message)


@rule(
    "vllm-partial-fusion",
    severity="error",
    summary="the list names some of the parts that vLLM fuses into one layer",
    text="""q, k and v (gate and up) become one matrix, which is quantized or is not. Where the
    list names some of the parts, vLLM stops with "Detected some but not all shards of ... are
    quantized". List all of them, or none.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(_SOURCE,),
)
def vllm_partial_fusion(context: Context) -> Iterator[Spot]:
    for layer in layers([*context.quantized, *context.unquantized]).values():
        found = match(layer.name, context.exclude)
        if found.state == "partial":
            named = [part for part in layer.parts if part in context.exclude]
            first = named[0] if named else layer.parts[0]
            stored = context.modules[first].tensors["weight"]
            message = f"excluded by {found.pattern!r}, but not every part of {layer.name} is"
            yield Spot(str(stored.file), stored.name, message)


@rule(
    "vllm-mixed-fusion",
    severity="error",
    summary="a layer that vLLM fuses is quantized in part, and the list does not tell",
    text="""q, k and v (gate and up, all experts of a layer) become one matrix, which is
    quantized or is not. Where the list names none of the parts, or all, vLLM builds one kind and
    loads the parts of the other kind into it: a 16-bit part is cast to the quantized dtype by
    value and multiplied with a scale that was never loaded, without a message.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "wrong"},
    evidence=(_SOURCE, "run with vLLM 0.32.0 on CPU: q_proj alone in bf16 loads, as garbage"),
)
def vllm_mixed_fusion(context: Context) -> Iterator[Spot]:
    for layer in layers([*context.quantized, *context.unquantized]).values():
        codes = [part for part in layer.parts if part in context.quantized]
        plain = [part for part in layer.parts if part in context.unquantized]
        if codes and plain and match(layer.name, context.exclude).state != "partial":
            weight = context.unquantized[plain[0]]
            message = f"{weight.dtype}, but {codes[0]} of the same {layer.name} is quantized"
            yield Spot(str(weight.file), weight.name, message)


@rule(
    "vllm-tied-head",
    severity="error",
    summary="lm_head is tied to the embedding and not excluded",
    text="""vLLM builds a quantized lm_head unless the list names it, also where the
    checkpoint has no lm_head of its own; its scale is then never loaded.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "wrong"},
    evidence=("vLLM 0.33.0, run with its own loader: tied embeddings and lm_head not ignored",),
)
def vllm_tied_head(context: Context) -> Iterator[Spot]:
    if context.obeyed is None or not context.quantized or not context.is_tied:
        return
    if context.obeyed.is_mixed:
        return
    if LM_HEAD in context.modules or match(LM_HEAD, context.exclude).state == "excluded":
        return
    where = context.obeyed.where(context.obeyed.exclude_key)
    yield Spot(context.obeyed.file, where, f"does not name {LM_HEAD!r}, which is tied")


@rule(
    "vllm-ignore-key",
    severity="error",
    summary="config.json lists its exclusions under a key that vLLM 0.32 does not read",
    text="""In the flat form the key is `ignore`. vLLM 0.33 falls back to `exclude_modules`
    where `ignore` is absent, 0.32 does not: it quantizes the excluded layers and casts their
    weights by value.""",
    engine="vllm",
    versions=">=0.32,<0.33",
    effects={"vllm": "wrong"},
    evidence=("vLLM 0.32.0 modelopt.py:361, vLLM 0.33.0 modelopt.py:343-362",),
)
def vllm_ignore_key(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is None or obeyed.is_nested or "exclude_modules" not in obeyed.raw:
        return
    hidden = "ignore" in obeyed.raw and obeyed.raw["ignore"] != obeyed.raw["exclude_modules"]
    if "ignore" not in obeyed.raw or hidden:
        message = "vLLM reads `ignore`" + (
            "; the two lists differ" if hidden else ", which is absent"
        )
        yield Spot(obeyed.file, obeyed.where("exclude_modules"), message)
