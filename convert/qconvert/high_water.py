"""The most that a run takes of disk and memory, from headers, the device and the budget alone.

Buffers are counted to the byte. What the interpreter, torch and the plan take is an estimate,
measured and rounded up: 40 MiB with the native kernels, 250 MiB with torch 2.13 on the CPU, 690 MiB
with torch 2.11 on an H200 (that of the GPU itself is a guess), 8 KiB per step.
"""

from qconvert.backends import Device
from qconvert.convert import needed_nbytes
from qconvert.errors import human
from qconvert.pipeline import worker_share
from qconvert.processes import split
from qconvert.units import buffer_nbytes
from qschema.plan import HighWater, Plan, Step

# of one step: in the plan and in the one that `apply` compares it with
_STEP_NBYTES = 12 << 10
# interpreter and libraries
_RUNTIME_NBYTES = {"cpu (native)": 64 << 20, "cpu (torch)": 512 << 20, "cuda": 768 << 20}
# the driver's context and the kernels, on each GPU
_CONTEXT_NBYTES = 1 << 30


def high_water(plan: Plan, *, device: Device, workers: int, budget: int) -> HighWater:
    """Return the marks of a run of `plan` that starts from nothing.

    Raises ConvertError for a budget that is too small for so many workers.
    """
    share = worker_share(device, workers=workers, budget=budget)
    sizes = (
        buffer_nbytes(step, preferred=device.slice_nbytes, limit=share) for step in _kinds(plan)
    )
    buffer = min(share, max(sizes, default=0))
    on_each = -(-workers // device.num_gpus) if device.num_gpus else 0
    runtime = _RUNTIME_NBYTES["cuda" if device.num_gpus else device.name]
    runtime *= max(1, len(split(plan, device=device, workers=workers)))
    return HighWater(
        device=device.name,
        workers=workers,
        memory_budget=budget,
        disk_nbytes=needed_nbytes(plan),
        host_nbytes=runtime + workers * buffer + _STEP_NBYTES * len(plan.steps),
        gpu_nbytes=int(_CONTEXT_NBYTES + on_each * buffer * device.device_factor) if on_each else 0,
    )


def disk_mark(plan: Plan, *, device: str, workers: int | None, budget: int) -> HighWater:
    """Return the mark that does not depend on the device, which may not be here, nor on a budget.

    `device` is its name, `workers` None if it would have decided how many.
    """
    return HighWater(
        device=device, workers=workers, memory_budget=budget, disk_nbytes=needed_nbytes(plan)
    )


def _kinds(plan: Plan) -> list[Step]:
    """Return one step of each kind and shape: a model repeats a few of them in every layer."""
    found = {
        (step.action, step.algo, step.source.dtype, tuple(step.source.shape), step.transposed): step
        for step in plan.steps
    }
    return list(found.values())


def needs(marks: HighWater) -> str:
    """Return the marks in words."""
    if marks.host_nbytes is None:
        return f"{human(marks.disk_nbytes)} of disk at most"
    gpu = f", {human(marks.gpu_nbytes)} of each GPU" if marks.gpu_nbytes else ""
    return (
        f"{human(marks.disk_nbytes)} of disk, {human(marks.host_nbytes)} of memory{gpu}: at most, "
        f"with {marks.workers} workers on {marks.device}"
    )
