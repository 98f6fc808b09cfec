"""Which engines are asked, in which interpreter and how far, from what the user said.

It looks whether an engine is installed, and starts nothing.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qvalidate.engines import EngineRequest, Level, UnknownEngineError, get
from qvalidate.result import RunLevel
from qvalidate.targets import Target
from qvalidate.validation import Ask


class ChoiceError(ValueError):
    """What does not go together; the text is for the user."""


def choose(
    targets: Sequence[Target],
    *,
    checkpoint: Path,
    reference: Path | None,
    pythons: Sequence[str],
    level: RunLevel | None,
    timeout_s: float,
) -> tuple[list[Ask], list[str]]:
    """Return the engines to ask, and a line about each of `targets` that is not.

    Without a `level` those that are not installed are left out; with one they are asked, and it is
    for them to say that they are not there. Raises ChoiceError.
    """
    interpreters = _interpreters(pythons, [target.engine for target in targets])
    if level == "compare" and reference is None:
        raise ChoiceError("--level compare needs the source: --reference DIR")
    if not targets and level not in (None, "rules"):
        raise ChoiceError(f"--level {level} needs an engine: --engine vllm")
    if level == "rules":
        return [], []
    asks: list[Ask] = []
    remarks: list[str] = []
    for target in targets:
        python = interpreters.get(target.engine)
        try:
            engine = get(target.engine)
        except UnknownEngineError as error:
            raise ChoiceError(str(error)) from None
        if level is None and python is None and find_spec(engine.module) is None:
            remarks.append(
                f"{target.engine} is not installed here and was not asked, the rules alone say "
                f"this; --python {target.engine}=PATH names its interpreter"
            )
            continue
        request = EngineRequest(
            checkpoint=checkpoint,
            reference=reference if _level(level, reference) == "compare" else None,
            python=python,
            level=_level(level, reference),
            timeout_s=timeout_s,
        )
        asks.append(Ask(engine, request))
    return asks, remarks


def _level(level: RunLevel | None, reference: Path | None) -> Level:
    if level is None:
        return "generate" if reference is None else "compare"
    assert level != "rules"
    return level


def _interpreters(pythons: Sequence[str], engines: Sequence[str]) -> dict[str, str]:
    """Return engine -> interpreter of `PATH`, for the only engine, and of `ENGINE=PATH`."""
    found: dict[str, str] = {}
    for given in pythons:
        engine, separator, path = given.partition("=")
        if not separator or engine not in engines:
            if len(engines) != 1:
                raise ChoiceError(
                    f"--python {given}: of which engine? Expected ENGINE=PATH, with one of "
                    f"{', '.join(engines) or 'those in --engine'}"
                )
            engine, path = engines[0], given
        if engine in found:
            raise ChoiceError(f"--python: {engine} has two: {found[engine]} and {path}")
        found[engine] = path
    return found
