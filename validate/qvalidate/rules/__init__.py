"""The rules, in the order of the modules that declare them. There is no other list."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from qschema.strict import Finding
from qvalidate.context import Context
from qvalidate.rules import (
    agreement,
    exclusions,
    files,
    kv,
    mixed,
    modules,
    orphans,
    siblings,
    sizes,
    tensors,
    values,
    vllm_exclusions,
    vllm_layout,
    vllm_limits,
    vllm_mixed,
    vllm_scales,
)
from qvalidate.rules.registry import REGISTRY, Effect, Rule, Severity

__all__ = ["RULES", "Effect", "Rule", "Severity", "run"]

_MODULES = (
    agreement,
    mixed,
    tensors,
    sizes,
    modules,
    orphans,
    values,
    siblings,
    kv,
    exclusions,
    files,
    vllm_limits,
    vllm_layout,
    vllm_exclusions,
    vllm_mixed,
    vllm_scales,
)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        declared.id: declared
        for module in _MODULES
        for declared in REGISTRY.values()
        if declared.spots.__module__ == module.__name__
    }
)


def run(context: Context, *, engine: str | None) -> Iterator[Finding]:
    """Yield the findings of every rule that applies.

    A rule of an engine holds in full where that engine is named. Where none is, what an engine
    would refuse is a note, and what it would get wrong in silence a warning: the checkpoint may be
    meant for another engine, but its owner should know.
    """
    for declared in RULES.values():
        if declared.engine is None or declared.engine == engine:
            yield from declared.check(context)
        elif engine is None:
            severity: Severity = "warning" if "wrong" in declared.effects.values() else "note"
            for finding in declared.check(context):
                softened = severity if finding.severity == "error" else finding.severity
                yield finding.model_copy(update={"severity": softened})
