"""Where the time of a conversion went: what `qconvert --timings FILE` writes.

It is never part of a checkpoint, whose bytes say nothing of the machine that made them.
"""

from typing import Literal, TypeAlias

from pydantic import Field

from qschema.plan import Tool
from qschema.strict import Strict

Stage: TypeAlias = Literal[
    "plan", "start", "read", "encode", "digest", "write", "sync", "wait", "finish"
]


class StageTime(Strict):
    """Seconds that all workers together were busy with a stage, and the bytes it handled."""

    stage: Stage
    seconds: float = Field(ge=0)
    nbytes: int = Field(ge=0)


class Timings(Strict):
    """One run, from the opened checkpoint to the renamed directory."""

    document: Literal["qconvert-timings"] = "qconvert-timings"
    version: Literal[1] = 1
    tool: Tool
    plan_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    # as --device resolved: "cpu (native)", "cuda:0"
    device: str
    workers: int = Field(ge=1)
    memory_budget: int = Field(ge=0)
    wall_s: float = Field(ge=0)
    stages: list[StageTime]
    source_nbytes: int = Field(ge=0)
    output_nbytes: int = Field(ge=0)
    # source bytes whose results were taken over from an interrupted run
    reused_nbytes: int = Field(ge=0)
    peak_rss_nbytes: int = Field(ge=0)
