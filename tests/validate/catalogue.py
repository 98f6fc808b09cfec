"""What a planted fault is: a function that breaks one thing in a right checkpoint.

It works on a `Draft` and is declared with the rule that must find it and the place that the finding
must name. `engine` says that the rule is an engine's. The faults are in the `*_faults` modules.
"""

from collections.abc import Callable
from dataclasses import dataclass

from checkpoints import Draft

from qvalidate.targets import ONE_GPU, Deployment

PB_WO = "FP8_PB_WO"
PC_PT = "FP8_PER_CHANNEL_PER_TOKEN"
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
V = "model.layers.0.self_attn.v_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
GATE = "model.layers.0.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Fault:
    """One planted fault and what must be said about it."""

    plant: Callable[[Draft], None]
    rule: str
    where: str
    model: str = "llama"
    algo: str = PB_WO
    severity: str = "error"
    engine: bool = False
    deployment: Deployment = ONE_GPU

    @property
    def name(self) -> str:
        return self.plant.__name__


FAULTS: list[Fault] = []


def fault(
    rule: str,
    where: str,
    *,
    model: str = "llama",
    algo: str = PB_WO,
    severity: str = "error",
    engine: bool = False,
    deployment: Deployment = ONE_GPU,
) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    """Put the decorated function into the catalogue."""

    def declare(plant: Callable[[Draft], None]) -> Callable[[Draft], None]:
        FAULTS.append(Fault(plant, rule, where, model, algo, severity, engine, deployment))
        return plant

    return declare
