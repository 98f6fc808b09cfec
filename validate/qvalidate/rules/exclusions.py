"""The list of excluded modules names what is unquantized and nothing else.

Here the list means what ModelOpt means by it: shell wildcards over the checkpoint's own names. What
an engine makes of the same list is the business of that engine's rules.
"""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule


@rule(
    "excluded-but-quantized",
    severity="error",
    summary="a module in the list of exclusions is stored quantized",
    text="""The engine builds a plain layer for an excluded module and then meets codes and a
    scale. Most models of vLLM stop at the scale's name; some ignore it, and read the codes as
    weights without scale. Either the module should not be listed, or it should have been left
    alone.""",
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0 modelopt.py:191-226 (the list), run with its own loader",),
)
def excluded_but_quantized(context: Context) -> Iterator[Spot]:
    for module in context.quantized.values():
        pattern = context.excluded_by(module.name)
        if pattern is not None and context.obeyed is not None:
            weight = module.tensors["weight"]
            message = f"stored as {weight.dtype}, but excluded by {pattern!r}"
            yield Spot(module.file, weight.name, message)


@rule(
    "unquantized-not-excluded",
    severity="error",
    summary="an unquantized Linear is not in the list of exclusions",
    text="""The engine builds a quantized layer for every Linear that the list does not name.
    vLLM then casts the 16-bit weight to E4M3 by value and leaves the scale uninitialised: no
    message, and text that looks fluent and is wrong. Routers of mixtures of experts are the
    usual victims.""",
    effects={"vllm": "wrong"},
    evidence=(
        "vLLM 0.33.0, run with its own loader: an MoE router cast to E4M3, KL 0.068, no NaN",
    ),
)
def unquantized_not_excluded(context: Context) -> Iterator[Spot]:
    if context.obeyed is None or context.obeyed.is_mixed or not context.quantized:
        return
    for module, weight in context.unquantized.items():
        if context.excluded_by(module) is None:
            key = context.obeyed.where(context.obeyed.exclude_key)
            message = (
                f"{weight.dtype} {list(weight.shape)} and not in {key} ({context.obeyed.algo})"
            )
            yield Spot(str(weight.file), weight.name, message)
