"""What a real engine is asked about a checkpoint, and its answers, in the order of the levels."""

from collections.abc import Iterator
from dataclasses import dataclass

from qschema.strict import Finding
from qvalidate.dry import DryOutcome, DryRequest, dry_run
from qvalidate.engines import Engine, EngineOutcome, EngineRequest, Thresholds
from qvalidate.engines.serve import ServeOutcome, ServeRequest, serve_check
from qvalidate.evaluate import EvalOutcome, EvalRequest, evaluate
from qvalidate.result import RunLevel


@dataclass(frozen=True)
class Ask:
    """An engine and what it is asked; None is not asked.

    `stands_in`: where the machine has no kernel for the format, plain ones take their place.
    """

    engine: Engine
    dry: DryRequest | None = None
    request: EngineRequest | None = None
    serve: ServeRequest | None = None
    tasks: EvalRequest | None = None
    stands_in: bool = False

    @property
    def level(self) -> RunLevel:
        """The furthest level that is asked for."""
        if self.tasks is not None:
            return "evaluate"
        if self.request is not None:
            return self.request.level
        return "dry" if self.dry is not None else "rules"


@dataclass(frozen=True)
class Answer:
    """What came of an `Ask`."""

    dry: DryOutcome | None = None
    observed: EngineOutcome | None = None
    served: ServeOutcome | None = None
    evaluated: EvalOutcome | None = None

    @property
    def version(self) -> str | None:
        """The engine's version, None where it did not get as far as telling."""
        parts = (self.observed, self.dry, self.served)
        return next((part.version for part in parts if part and part.version), None)

    def findings(self) -> Iterator[Finding]:
        """Yield the findings of all that was asked."""
        for part in (self.dry, self.observed, self.served, self.evaluated):
            if part is not None:
                yield from part.findings


def answer(ask: Ask, *, limits: Thresholds, limits_of_plain: Thresholds) -> Answer:
    """Return what the engine says. Trouble with it is part of the answer, never an exception.

    `limits_of_plain` hold where plain kernels, which quantize the inputs too, stood in.
    """
    return Answer(
        dry=dry_run(ask.dry) if ask.dry else None,
        observed=_observed(ask, limits, limits_of_plain),
        served=serve_check(ask.serve) if ask.serve else None,
        evaluated=evaluate(ask.tasks) if ask.tasks else None,
    )


def _observed(ask: Ask, limits: Thresholds, of_plain: Thresholds) -> EngineOutcome | None:
    if ask.request is None:
        return None
    plain = ask.request.kernels == "reference"
    request = ask.request.model_copy(update={"thresholds": of_plain if plain else limits})
    observed = ask.engine.run(request)
    if observed.verdict != "no-kernel" or plain or not ask.stands_in:
        return observed
    again = {"kernels": "reference", "thresholds": of_plain}
    return ask.engine.run(request.model_copy(update=again))
