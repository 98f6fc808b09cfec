"""Shared by the tests of interrupted conversions: ending one early, seeing what is converted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qconvert import units
from qconvert.backends import resolve
from qconvert.convert import Outcome, convert
from qconvert.planner import make_plan
from qconvert.statistics import Statistics
from qschema.checkpoint import open_checkpoint
from qschema.plan import Unit
from qschema.recipe import Recipe

from .conversion import recipe

BUDGET = 2 << 20
Stop = Callable[[int], "contextmanager[None]"]


class StopError(Exception):
    """Stands for whatever ends a run early."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], "contextmanager[None]"]:
    """Return a context in which a conversion ends with StopError after so many units."""

    @contextmanager
    def stopping(count: int) -> Iterator[None]:
        real, done = units.UnitWorker.convert, []

        def counted(self: units.UnitWorker, unit: Unit) -> object:
            if len(done) == count:
                raise StopError
            done.append(unit)
            return real(self, unit)

        with monkeypatch.context() as patch:
            patch.setattr(units.UnitWorker, "convert", counted)
            with pytest.raises(StopError):
                yield

    return stopping


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the tensors that are converted from now on, as they are."""
    names: list[str] = []
    real = units.UnitWorker.convert

    def noted(self: units.UnitWorker, unit: Unit) -> object:
        names.extend(step.source.name for step in unit.steps)
        return real(self, unit)

    monkeypatch.setattr(units.UnitWorker, "convert", noted)
    return names


def go(source: Path, output: Path, asked: Recipe | None = None, *, fresh: bool = False) -> Outcome:
    """Convert, and return what came of it."""
    checkpoint = open_checkpoint(source)
    return convert(
        checkpoint,
        make_plan(checkpoint, asked or recipe()),
        output,
        statistics=Statistics(),
        device=resolve("cpu", codecs=["fp8_pb_wo", "mxfp8"]),
        workers=1,
        budget=BUDGET,
        watch=lambda progress: None,
        fresh=fresh,
    )
