"""Where a worker's time goes: a lap clock, so that every instant belongs to exactly one stage."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter

from qschema.timings import Stage, StageTime

# in the order in which a slice meets them
STAGES: tuple[Stage, ...] = (
    "plan",
    "start",
    "read",
    "encode",
    "digest",
    "write",
    "sync",
    "wait",
)


@dataclass
class Clock:
    """Seconds and bytes per stage of one thread; time between two laps belongs to the later."""

    seconds: Counter[Stage] = field(default_factory=Counter)
    nbytes: Counter[Stage] = field(default_factory=Counter)
    _last: float = field(default_factory=perf_counter)

    def lap(self, stage: Stage, nbytes: int = 0) -> None:
        """Book the time since the last lap, and `nbytes` handled in it, to `stage`."""
        now = perf_counter()
        self.seconds[stage] += now - self._last  # type: ignore[assignment]
        self.nbytes[stage] += nbytes
        self._last = now


def total(clocks: Iterable[Clock]) -> list[StageTime]:
    """Return the sums of all clocks, one entry per stage."""
    found = list(clocks)
    return [
        StageTime(
            stage=stage,
            seconds=round(sum(float(clock.seconds[stage]) for clock in found), 6),
            nbytes=sum(clock.nbytes[stage] for clock in found),
        )
        for stage in STAGES
    ]
