"""Real engines as judges of a checkpoint: each in its own process, under its own interpreter."""

from importlib import import_module
from typing import Protocol

from qvalidate.engines.outcome import (
    FOUR_BITS,
    Comparison,
    EngineOutcome,
    EngineRequest,
    Kernels,
    Level,
    Thresholds,
)

__all__ = [
    "ENGINES",
    "FOUR_BITS",
    "Comparison",
    "Engine",
    "EngineOutcome",
    "EngineRequest",
    "Kernels",
    "Level",
    "Thresholds",
    "UnknownEngineError",
    "get",
]

# each is a module here that defines `ENGINE`, a dash in its name being an underscore there
ENGINES = ("vllm", "sglang", "tensorrt-llm")


class Engine(Protocol):
    """Something that can load a checkpoint and generate from it."""

    @property
    def name(self) -> str:
        """The name that `--engine` takes."""

    @property
    def module(self) -> str:
        """What an interpreter that has the engine can import."""

    def run(self, request: EngineRequest) -> EngineOutcome:
        """Return what came of it; trouble with engine or checkpoint is never an exception."""


class UnknownEngineError(ValueError):
    """An engine's name that no adapter has."""


def get(name: str) -> Engine:
    """Return the adapter of the engine called `name`.

    Raises UnknownEngineError, which lists what exists.
    """
    if name not in ENGINES:
        raise UnknownEngineError(f"unknown engine {name!r}; there is {', '.join(ENGINES)}")
    engine: Engine = import_module(f"{__name__}.{name.replace('-', '_')}").ENGINE
    return engine
