"""Which engines are asked, in which interpreter and how far, from what the user said.

It looks whether an engine is installed, and starts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias

from qvalidate.asking import Ask
from qvalidate.dry import DryRequest
from qvalidate.engines import Engine, EngineRequest, Level, get
from qvalidate.engines.serve import ServeRequest
from qvalidate.evaluate import EvalRequest
from qvalidate.result import RunLevel
from qvalidate.targets import KNOWN, Target

# auto: the engine's own, and plain ones where this machine lacks them
Kernels: TypeAlias = Literal["auto", "native", "reference"]
# whose loader is run on headers alone; SGLang's modules import kernels that only a GPU build has
DRY_ENGINES = ("vllm",)


class ChoiceError(ValueError):
    """What does not go together; the text is for the user."""


@dataclass(frozen=True)
class Wishes:
    """What the user said about the engines. `pythons` are PATH or ENGINE=PATH."""

    checkpoint: Path
    reference: Path | None = None
    pythons: Sequence[str] = ()
    level: RunLevel | None = None
    tp: int = 1
    kernels: Kernels = "auto"
    serve: bool = False
    tasks: Sequence[str] = field(default_factory=tuple)
    task_folder: Path | None = None
    limit: int | None = None
    max_drop: float = 0.02
    timeout_s: float = 600.0


def choose(targets: Sequence[Target], wishes: Wishes) -> tuple[list[Ask], list[str]]:
    """Return the engines to ask, and a line about each of `targets` that is not.

    Without a level those that are not installed are left out; with one they are asked, and it is
    for them to say that they are not there. Raises ChoiceError.
    """
    _check(targets, wishes)
    interpreters = _interpreters(wishes.pythons, [target.engine for target in targets])
    asks: list[Ask] = []
    remarks: list[str] = []
    for target in targets if wishes.level != "rules" else ():
        engine, python = get(target.engine), interpreters.get(target.engine)
        is_wanted = wishes.level is not None or wishes.serve or wishes.tasks
        if not is_wanted and python is None and find_spec(engine.module) is None:
            remarks.append(
                f"{target.engine} is not installed here and was not asked, the rules alone say "
                f"this; --python {target.engine}=PATH names its interpreter"
            )
            continue
        asks.append(_ask(engine, python, wishes))
    return asks, remarks


def _check(targets: Sequence[Target], wishes: Wishes) -> None:
    level, reference = wishes.level, wishes.reference
    if level == "compare" and reference is None:
        raise ChoiceError("--level compare needs the source: --reference DIR")
    if wishes.tasks and reference is None:
        raise ChoiceError("--tasks needs the source to compare with: --reference DIR")
    if not targets and level not in (None, "rules"):
        raise ChoiceError(f"--level {level} needs an engine: --engine vllm")
    if not targets and (wishes.serve or wishes.tasks):
        raise ChoiceError("--serve and --tasks need an engine: --engine vllm")
    if level == "rules" and (wishes.serve or wishes.tasks):
        raise ChoiceError("--serve and --tasks start an engine, --level rules does not")
    others = [target.engine for target in targets if target.engine not in DRY_ENGINES]
    if level == "dry" and others:
        raise ChoiceError(
            f"--level dry: {', '.join(others)} has none; it is for {', '.join(DRY_ENGINES)}"
        )


def _ask(engine: Engine, python: str | None, wishes: Wishes) -> Ask:
    is_dry = engine.name in DRY_ENGINES
    return Ask(
        engine,
        dry=DryRequest(
            checkpoint=wishes.checkpoint,
            python=python,
            tp=wishes.tp,
            timeout_s=wishes.timeout_s,
        )
        if is_dry
        else None,
        request=_request(python, wishes),
        serve=ServeRequest(
            engine=engine.name,
            checkpoint=wishes.checkpoint,
            python=python,
            timeout_s=wishes.timeout_s,
        )
        if wishes.serve
        else None,
        tasks=_tasks(engine, python, wishes),
        stands_in=wishes.kernels == "auto" and engine.name == "vllm",
    )


def _request(python: str | None, wishes: Wishes) -> EngineRequest | None:
    if wishes.level == "dry":
        return None
    level: Level = "generate" if wishes.reference is None else "compare"
    if wishes.level in ("load", "generate", "compare"):
        level = wishes.level
    return EngineRequest(
        checkpoint=wishes.checkpoint,
        reference=wishes.reference if level == "compare" else None,
        python=python,
        level=level,
        kernels="reference" if wishes.kernels == "reference" else "native",
        timeout_s=wishes.timeout_s,
    )


def _tasks(engine: Engine, python: str | None, wishes: Wishes) -> EvalRequest | None:
    if not wishes.tasks or wishes.reference is None:
        return None
    return EvalRequest(
        engine=engine.name,
        checkpoint=wishes.checkpoint,
        reference=wishes.reference,
        tasks=list(wishes.tasks),
        task_folder=wishes.task_folder,
        python=python,
        limit=wishes.limit,
        max_drop=wishes.max_drop,
    )


def _interpreters(pythons: Sequence[str], engines: Sequence[str]) -> dict[str, str]:
    """Return engine -> interpreter of `PATH`, for the only engine, and of `ENGINE=PATH`."""
    found: dict[str, str] = {}
    for given in pythons:
        engine, separator, path = given.partition("=")
        if separator and engine in KNOWN and engine not in engines:
            raise ChoiceError(f"--python {given}: {engine} is not in --engine")
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
