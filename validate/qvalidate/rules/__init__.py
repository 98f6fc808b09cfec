"""The rules, in the order of the modules that declare them. There is no other list."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from qschema.strict import Finding
from qvalidate.context import Context
from qvalidate.rules import (
    agreement,
    codes,
    dialect,
    exclusions,
    files,
    kv,
    mixed,
    modules,
    orphans,
    parallel,
    sglang_config,
    sglang_effects,
    sglang_layers,
    sglang_parallel,
    sglang_tensors,
    siblings,
    sizes,
    tensors,
    trtllm_build,
    trtllm_config,
    trtllm_deployment,
    trtllm_effects,
    trtllm_experts,
    trtllm_kv,
    trtllm_tensors,
    values,
    vllm_exclusions,
    vllm_gpu,
    vllm_layout,
    vllm_limits,
    vllm_mixed,
    vllm_scales,
)
from qvalidate.rules.registry import REGISTRY, Effect, Rule, Severity
from qvalidate.targets import Target, every_target

__all__ = ["RULES", "Effect", "Rule", "Severity", "raw", "run", "softened"]

_MODULES = (
    dialect,
    agreement,
    mixed,
    tensors,
    sizes,
    modules,
    orphans,
    values,
    codes,
    siblings,
    kv,
    exclusions,
    files,
    parallel,
    vllm_limits,
    vllm_layout,
    vllm_exclusions,
    vllm_mixed,
    vllm_scales,
    vllm_gpu,
    trtllm_config,
    trtllm_build,
    trtllm_tensors,
    trtllm_experts,
    trtllm_deployment,
    trtllm_kv,
    trtllm_effects,
    sglang_config,
    sglang_layers,
    sglang_tensors,
    sglang_parallel,
    sglang_effects,
)

# what holds however a checkpoint is spelt
_ANY_DIALECT = frozenset(module.__name__ for module in (dialect, files, parallel))

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        declared.id: declared
        for module in _MODULES
        for declared in REGISTRY.values()
        if declared.spots.__module__ == module.__name__
    }
)


def raw(context: Context, targets: Sequence[Target]) -> Iterator[Finding]:
    """Yield the findings of every rule for any engine, and of those for one of the `targets`."""
    for declared in RULES.values():
        if context.dialect is not None and declared.spots.__module__ not in _ANY_DIALECT:
            continue
        if declared.engine is None or any(map(declared.holds_for, targets)):
            yield from declared.check(context)


def softened(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield the findings as they are where nobody named an engine.

    What only one engine minds is a note then: the checkpoint may be meant for another one. The
    predictions say what each would do.
    """
    for finding in findings:
        declared = RULES.get(finding.rule)
        if declared is None or declared.engine is None or finding.severity == "note":
            yield finding
        else:
            yield finding.model_copy(update={"severity": "note"})


def run(context: Context, targets: Sequence[Target] = ()) -> Iterator[Finding]:
    """Yield what the rules say about `context`: in full for `targets`, softened without any."""
    if targets:
        yield from raw(context, targets)
    else:
        yield from softened(raw(context, every_target()))
