"""What a rule is, and how one is declared: a decorator on a function that yields what it saw."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from qschema.strict import Finding
from qvalidate.context import Context
from qvalidate.targets import Target

Severity: TypeAlias = Literal["error", "warning", "note"]
# what an engine does with such a checkpoint: stops with an error, computes something else without
# one, or either, depending on the model
Effect: TypeAlias = Literal["refuses", "wrong", "unknown"]


class Spot(NamedTuple):
    """One place that breaks a rule; `severity` overrides the rule's."""

    file: str
    where: str
    message: str
    severity: Severity | None = None


@dataclass(frozen=True)
class Rule:
    """One rule. `engine` is set where it holds for that engine only, in the versions `versions`."""

    id: str
    severity: Severity
    summary: str
    text: str
    spots: Callable[[Context], Iterator[Spot]]
    engine: str | None = None
    versions: str | None = None
    effects: Mapping[str, Effect] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()

    def holds_for(self, target: Target) -> bool:
        """Return whether the rule is about any engine, or about one of the target's versions."""
        if self.engine is None:
            return True
        return self.engine == target.engine and target.meets(self.versions)

    def effect(self, target: Target) -> Effect | None:
        """Return what the target does with what breaks the rule, None if that is not known."""
        if not self.holds_for(target):
            return None
        found = [
            other.effect
            for other in ELSEWHERE.get(self.id, ())
            if other.engine == target.engine and target.meets(other.versions)
        ]
        own = self.effects.get(target.engine)
        return own if own is not None or not found else found[0]

    def check(self, context: Context) -> Iterator[Finding]:
        """Yield a finding for each place that breaks the rule."""
        for file, where, message, severity in self.spots(context):
            yield Finding(
                file=file,
                where=where,
                rule=self.id,
                message=message,
                severity=severity or self.severity,
            )


@dataclass(frozen=True)
class Elsewhere:
    """What one engine does with what breaks a rule that holds for any; it is in its own modules."""

    engine: str
    versions: str | None
    effect: Effect
    evidence: tuple[str, ...]


REGISTRY: dict[str, Rule] = {}
# id of a rule -> what engines do that were studied after it was declared
ELSEWHERE: dict[str, list[Elsewhere]] = {}

Spots: TypeAlias = Callable[[Context], Iterator[Spot]]


def rule(
    rule_id: str,
    *,
    severity: Severity,
    summary: str,
    text: str,
    effects: Mapping[str, Effect] | None = None,
    engine: str | None = None,
    versions: str | None = None,
    evidence: tuple[str, ...] = (),
) -> Callable[[Spots], Spots]:
    """Declare the decorated function as the rule `rule_id`."""

    def declare(spots: Spots) -> Spots:
        assert rule_id not in REGISTRY, rule_id
        REGISTRY[rule_id] = Rule(
            id=rule_id,
            severity=severity,
            summary=summary,
            text=" ".join(text.split()),
            spots=spots,
            engine=engine,
            versions=versions,
            effects=effects or {},
            evidence=evidence,
        )
        return spots

    return declare


def effect_of(
    rule_id: str,
    effect: Effect,
    *,
    engine: str,
    versions: str | None = None,
    evidence: tuple[str, ...],
) -> None:
    """Declare what `engine` does with a checkpoint that breaks `rule_id`, a rule for any engine."""
    assert REGISTRY[rule_id].engine is None, rule_id
    ELSEWHERE.setdefault(rule_id, []).append(Elsewhere(engine, versions, effect, evidence))


def some(names: list[str]) -> str:
    """Return the first five of `names`, and how many there are if that is more."""
    shown = ", ".join(names[:5])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 5 else shown
