"""The list of modules left alone: what it has to be, from what is stored.

Right means two things at once: by shell wildcards over the checkpoint's names (what ModelOpt
means), and by vLLM's own matching of its fused names, the strictest that is known.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate

from qschema.architectures import experts_of
from qvalidate.assignment import Assignment
from qvalidate.context import LM_HEAD, Context
from qvalidate.rules.vllm_matching import is_plain, layers, listed_entry, match

_WILD = frozenset("*?[")


def corrected(context: Context, patterns: Sequence[str], assignment: Assignment) -> list[str]:
    """Return `patterns` without those that reach a quantized module, with what they fail to name.

    What matches nothing stays: it may be meant for an engine's own names. In a mixed checkpoint
    only what vLLM would take for quantized has to be named.
    """
    bad = reaching(context, patterns)
    kept = [pattern for pattern in dict.fromkeys(patterns) if pattern not in bad]
    if assignment.is_mixed:
        return [*kept, *_taken_for_quantized(context, kept, assignment)]
    names = _matcher(kept)
    kept += _short(
        context,
        # SGLang 0.5.23 asks for the name of all experts together
        [name for name in context.unquantized if not names(_ancestors(_owner(context, name)))],
    )
    for layer in layers(context.unquantized).values():
        if match(layer.name, tuple(kept)).state == "no" and not is_plain(
            layer.name, context.model_type
        ):
            kept += _short(context, [part for part in layer.parts if part not in kept])
    is_headless = context.is_tied and LM_HEAD not in context.modules
    if is_headless and match(LM_HEAD, tuple(kept)).state != "excluded":
        kept.append(LM_HEAD)
    return kept


def reaching(context: Context, patterns: Iterable[str]) -> set[str]:
    """Return the patterns that exclude a quantized module, by themselves or under vLLM."""
    taken = {name for module in context.quantized for name in _ancestors(module)}
    pure = [
        layer
        for layer in layers([*context.quantized, *context.unquantized]).values()
        if all(part in context.quantized for part in layer.parts)
    ]
    return {
        pattern
        for pattern in patterns
        if _matcher([pattern])(taken)
        or any(match(layer.name, (pattern,)).state != "no" for layer in pure)
    }


def _matcher(patterns: Sequence[str]) -> Callable[[Iterable[str]], bool]:
    """Return what says whether one of `patterns` matches one of the names given to it."""
    exact = {pattern for pattern in patterns if not _WILD & set(pattern)}
    wild = "|".join(translate(pattern) for pattern in patterns if pattern not in exact)
    expression = re.compile(wild) if wild else None

    def matches(names: Iterable[str]) -> bool:
        return any(
            name in exact or (expression is not None and expression.match(name) is not None)
            for name in names
        )

    return matches


def _ancestors(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _short(context: Context, names: Iterable[str]) -> list[str]:
    """Return `names`, with one pattern for all experts of a layer where none is quantized."""
    owners = {name: _owner(context, name) for name in names}
    return sorted({name if owner == name else f"{owner}*" for name, owner in owners.items()})


def _owner(context: Context, name: str) -> str:
    """Return the name of all experts that `name` is one of, or `name` where one is quantized."""
    parent, dot, _ = name.rpartition(".experts.")
    experts = experts_of(name)
    if not experts and not dot:
        return name
    above = experts[0] if experts else f"{parent}.experts"
    return name if any(other.startswith(above) for other in context.quantized) else above


def _taken_for_quantized(
    context: Context, kept: Sequence[str], assignment: Assignment
) -> list[str]:
    """Return the names of unquantized modules that vLLM takes for those of another's entry."""
    listed = {name: declared.name for name, declared in assignment.layers.items() if declared}
    found: list[str] = []
    for layer in layers(context.unquantized).values():
        parts = [part for part in layer.parts if part not in context.quantized]
        is_taken = listed_entry(layer.name, listed) is not None
        if is_taken and match(layer.name, tuple(kept)).state == "no":
            found += _short(context, parts)
    return found
