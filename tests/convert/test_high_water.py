"""What a plan says of disk and memory holds when it is carried out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qconvert.backends import Device, resolve
from qconvert.backends.native import NativeBackend
from qconvert.convert import convert, needed_nbytes
from qconvert.high_water import high_water, needs
from qconvert.planner import make_plan
from qconvert.statistics import Statistics
from qschema.checkpoint import open_checkpoint

from .conversion import CHECKPOINTS, Make, recipe, wide
from .test_cli import qconvert

LLAMA = CHECKPOINTS / "llama"
MIB = 1 << 20


def without_buffers(steps: int) -> int:
    """Return the estimate for interpreter, libraries, plan and report on the CPU."""
    return (64 << 20) + steps * (12 << 10)


@pytest.mark.parametrize(("workers", "budget"), [(1, 64 * MIB), (3, 64 * MIB), (2, MIB)])
@pytest.mark.parametrize("algo", ["FP8_PB_WO", "W4A16_NVFP4"])
def test_buffers_are_counted_to_the_byte(
    tmp_path: Path, make: Make, algo: str, workers: int, budget: int
) -> None:
    """Both where a slice that suits the device fits into the share and where it has to shrink."""
    checkpoint = open_checkpoint(make(wide(2048, 640)))
    plan = make_plan(checkpoint, recipe(algo=algo))
    allocated: list[int] = []

    class Recorded(NativeBackend):
        def allocate(self, nbytes: int) -> memoryview:
            allocated.append(nbytes)
            return super().allocate(nbytes)

    device = replace(resolve("cpu", codecs=[]), name="cpu (native)", make=lambda slot: Recorded())
    marks = high_water(plan, device=device, workers=workers, budget=budget)
    convert(
        checkpoint,
        plan,
        tmp_path / "out",
        statistics=Statistics(),
        device=device,
        workers=workers,
        budget=budget,
        watch=lambda progress: None,
    )

    assert len(allocated) == workers
    assert marks.host_nbytes - without_buffers(len(plan.steps)) == sum(allocated) <= budget


def test_the_process_stays_below_its_mark(tmp_path: Path) -> None:
    out, timings = tmp_path / "out", tmp_path / "timings.json"
    words = ["--algo", "FP8_PB_WO", "--device", "cpu", "--workers", "2"]
    marks = json.loads(qconvert("plan", LLAMA, *words).stdout)["high_water"]

    qconvert(LLAMA, out, *words, "--timings", timings)

    assert marks["host_nbytes"] / 3 < json.loads(timings.read_text())["peak_rss_nbytes"]
    assert json.loads(timings.read_text())["peak_rss_nbytes"] < marks["host_nbytes"]
    size = sum(file.stat().st_size for file in out.iterdir())
    assert marks["disk_nbytes"] - 17 * MIB <= size < marks["disk_nbytes"]


def test_the_disk_mark_is_what_a_run_asks_for() -> None:
    plan = make_plan(open_checkpoint(LLAMA), recipe())

    marks = high_water(plan, device=resolve("cpu", codecs=[]), workers=1, budget=64 * MIB)

    assert marks.disk_nbytes == needed_nbytes(plan)


def test_several_gpus_have_a_part_of_the_workers_each(make: Make) -> None:
    plan = make_plan(open_checkpoint(make(wide(2048, 640))), recipe())

    def gpu(names: str, workers: int) -> int:
        device = Device(
            names,
            workers,
            lambda slot: NativeBackend(),
            device_factor=2.0,
            num_gpus=len(names.split(",")),
        )
        return high_water(plan, device=device, workers=workers, budget=64 * MIB).gpu_nbytes

    context = 1 << 30
    one = gpu("cuda:0", 1) - context
    assert one > 0
    assert gpu("cuda:0", 4) - context == 4 * one
    assert gpu("cuda:0,cuda:1", 4) - context == 2 * one
    assert gpu("cuda:0,cuda:1", 5) - context == 3 * one


def test_words_name_a_gpu_only_if_there_is_one() -> None:
    plan = make_plan(open_checkpoint(LLAMA), recipe())
    cpu = high_water(plan, device=resolve("cpu", codecs=[]), workers=2, budget=64 * MIB)
    gpu = cpu.model_copy(update={"device": "cuda:0", "gpu_nbytes": 3 << 30})

    assert "GPU" not in needs(cpu)
    assert "3.0 GiB of each GPU: at most, with 2 workers on cuda:0" in needs(gpu)


def test_a_budget_that_is_too_small_leaves_the_mark_of_disk() -> None:
    done = qconvert(
        "plan", LLAMA, "--algo", "FP8_PB_WO", "--memory-budget", "64KiB", "--workers", "2"
    )

    assert done.returncode == 0
    assert done.stderr.startswith("note: no estimate of memory: a memory budget of 64.0 K")
    marks = json.loads(done.stdout)["high_water"]
    assert marks["disk_nbytes"] == needed_nbytes(make_plan(open_checkpoint(LLAMA), recipe()))
    assert (marks["workers"], marks["host_nbytes"], marks["gpu_nbytes"]) == (2, None, None)
