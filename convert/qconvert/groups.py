"""Which weights must agree: siblings that engines load as one, and the experts of a layer."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from qconvert.decide import Decision
from qconvert.errors import ConvertError, some
from qschema.architectures import experts_of, fused_siblings
from qschema.formats.declare import Sharing

Group = tuple[str, ...]


def sharing_key(module: str, shared: Sharing) -> Group:
    """Return what is equal for modules that must have one value of a tensor shared like that."""
    if shared == "siblings" or (shared == "experts" and experts_of(module)):
        return fused_siblings(module)
    return (module,)


def input_key(module: str, shared: Sharing) -> Group:
    """The same for an input scale: all experts of a layer share that of a projection."""
    group = sharing_key(module, shared)
    expert = experts_of(module)
    if expert is None:
        return group
    leaves = [found[1] for name in group if (found := experts_of(name))]
    return tuple(f"{expert[0]}.*.{leaf}" for leaf in leaves)


def keep_together(decisions: list[Decision]) -> list[Decision]:
    """Return the decisions, with all of a group kept where one can't have its format.

    Engines refuse fused siblings, and experts of a layer, of which only some are quantized.
    """
    blocked: dict[Group, Decision] = {}
    for decision in decisions:
        if decision.obstacle:
            for group in _together(decision):
                blocked.setdefault(group, decision)
    if not blocked:
        return decisions

    def settle(decision: Decision) -> Decision:
        for group in _together(decision):
            if decision.declared and group in blocked:
                other = blocked[group]
                reason = f"kept with {other.module}: {other.reason}"
                return replace(decision, declared=None, reason=reason)
        return decision

    return _whole(settle(decision) for decision in decisions)


def split_groups(decisions: Iterable[Decision]) -> tuple[list[str], list[str]]:
    """Return the groups in which formats differ, and those of which only some are quantized."""
    formats: dict[Group, dict[str, str | None]] = defaultdict(dict)
    for decision in decisions:
        if len(decision.tensor.shape) >= 2 and not decision.dropped:
            for group in _together(decision):
                formats[group][decision.module] = (
                    decision.declared.name if decision.declared else None
                )
    differing: list[str] = []
    partial: list[str] = []
    for found in formats.values():
        if len(set(found.values())) > 1:
            listed = " + ".join(f"{module} {algo or 'kept'}" for module, algo in found.items())
            wanted = partial if None in found.values() else differing
            wanted.append(listed if len(found) <= 4 else _by_format(found))
    return sorted(differing), sorted(partial)


def torn_groups(decisions: Iterable[Decision]) -> list[str]:
    """Return the groups of which some members are dropped and others are not."""
    members: dict[Group, dict[str, bool]] = defaultdict(dict)
    for decision in decisions:
        if len(decision.tensor.shape) >= 2:
            for group in _together(decision):
                members[group][decision.module] = decision.dropped
    return sorted(
        f"{some([module for module, dropped in found.items() if dropped])} of "
        f"{' + '.join(found) if len(found) <= 4 else f'{len(found)} like {next(iter(found))}'}"
        for found in members.values()
        if len(set(found.values())) > 1
    )


def check_mixed(decisions: Iterable[Decision]) -> None:
    """Raise ConvertError where a mixed recipe splits what engines load as one."""
    differing, partial = split_groups(decisions)
    if differing or partial:
        raise ConvertError(
            f"the recipe gives several formats to what engines load as one: "
            f"{some([*differing, *partial])}; let its rules match all of them alike"
        )


def _together(decision: Decision) -> Iterable[Group]:
    """Yield the groups of a module that must be alike."""
    module, parent = decision.module, decision.module.rpartition(".")[0]
    expert = experts_of(module)
    if expert is not None:
        yield (expert[0],)
    elif len(decision.tensor.shape) == 3 and parent.endswith("experts"):
        yield (parent,)
    elif len(group := fused_siblings(module)) > 1:
        yield group


def _whole(decisions: Iterable[Decision]) -> list[Decision]:
    """Return the decisions, with one for all matrices of a tensor that is kept."""
    found: dict[tuple[str, str], Decision] = {}
    for decision in decisions:
        if decision.declared is None and decision.matrix is not None and decision.matrix.part:
            decision = replace(decision, module=decision.tensor.name, matrix=None)
        found.setdefault((decision.tensor.name, decision.module), decision)
    return list(found.values())


def _by_format(found: Mapping[str, str | None]) -> str:
    names: dict[str | None, list[str]] = defaultdict(list)
    for module, algo in found.items():
        names[algo].append(module)
    return " + ".join(
        f"{len(modules)} like {modules[0]} {algo or 'kept'}" for algo, modules in names.items()
    )
