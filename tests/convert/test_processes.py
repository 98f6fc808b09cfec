"""Several processes: the same bytes, one error, and none that lives on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qconvert import processes
from qconvert.backends import Device, resolve
from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qconvert.processes import shares, split
from qschema.checkpoint import open_checkpoint
from qschema.formats import find

from .conversion import CHECKPOINTS, Make, digests, made_up, recipe, report_in, run, wide

UP = "model.layers.0.mlp.up_proj.weight"


def two(algo: str) -> Device:
    """Return the CPU, in two processes, however little there is to do."""
    device = resolve("cpu", codecs=[find(algo).codec])
    return replace(device, processes=("cpu", "cpu"), process_nbytes=0)


def children() -> Iterator[int]:
    """Yield the processes that this one started and that run."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            yield int(path.parent.name)


@pytest.mark.parametrize("algo", ["FP8_PB_WO", "NVFP4", "W4A8_AWQ"])
@pytest.mark.parametrize("model", ["llama", "mixtral", "qwen3"])
def test_the_same_directory(tmp_path: Path, model: str, algo: str) -> None:
    """Three and four shards; one shard, which one process takes."""
    run(CHECKPOINTS / model, tmp_path / "threads", algo=algo)
    run(CHECKPOINTS / model, tmp_path / "processes", algo=algo, device=two(algo))

    assert digests(tmp_path / "processes") == digests(tmp_path / "threads")
    assert not list(children())


def test_smoothing_and_the_kv_cache_go_along(tmp_path: Path) -> None:
    """Vectors are read where they are used; constants lie in one of the shards."""
    checkpoint = open_checkpoint(CHECKPOINTS / "llama")
    statistics = made_up(checkpoint, tmp_path)
    for name, device in (("threads", None), ("processes", two("FP8"))):
        run(
            CHECKPOINTS / "llama",
            tmp_path / name,
            algo="FP8",
            statistics=statistics,
            device=device,
            exclude=["model.layers.0.*"],
        )

    assert digests(tmp_path / "processes") == digests(tmp_path / "threads")


def test_a_shard_is_in_one_share_with_all_that_shares_a_scale() -> None:
    checkpoint = open_checkpoint(CHECKPOINTS / "mixtral")
    plan = make_plan(checkpoint, recipe(algo="W4A16_NVFP4"))

    found = shares(plan, 3)

    assert sorted(place for share in found for place in share) == list(range(len(plan.units)))
    files = [
        {step.source.file for place in share for step in plan.units[place].steps} for share in found
    ]
    assert sum(map(len, files)) == len(set().union(*files))


@pytest.mark.parametrize(
    ("sizes", "workers", "least", "expected"),
    [
        pytest.param([4, 4, 4, 4], 16, 4, [4, 4, 4, 4], id="even"),
        pytest.param([4, 4, 4, 3], 16, 4, [8, 4, 4], id="one has too little"),
        pytest.param([16, 4, 4, 4], 16, 4, [9, 3, 2, 2], id="threads go where the bytes are"),
        pytest.param([40, 1], 16, 2, [16], id="one shard has nearly all"),
        pytest.param([4, 4, 4, 4], 2, 0, [1, 1], id="fewer workers than processes"),
        pytest.param([4], 3, 0, [3], id="one shard"),
    ],
)
def test_processes_for_what_pays(
    make: Make, sizes: list[int], workers: int, least: int, expected: list[int]
) -> None:
    """All threads that were asked for have a process, and no process has less than it costs."""
    unit = 128 * 4
    shards = {
        f"{number}.safetensors": {
            f"model.layers.{number}.mlp.down_proj.weight": torch.ones(size, 128)
        }
        for number, size in enumerate(sizes)
    }
    plan = make_plan(open_checkpoint(make(shards=shards)), recipe(algo="FP8_PB_WO"))
    device = replace(two("FP8_PB_WO"), processes=("cpu",) * 4, process_nbytes=least * unit)

    found = split(plan, device=device, workers=workers)

    assert [threads for _, threads in found] == expected
    assert sorted(place for places, _ in found for place in places) == list(range(len(sizes)))


@pytest.mark.parametrize(("cores", "number"), [(2, 0), (7, 0), (8, 2), (16, 4), (33, 8)])
def test_cores_share_an_interpreter_by_four(
    monkeypatch: pytest.MonkeyPatch, cores: int, number: int
) -> None:
    monkeypatch.setattr("qconvert.backends._num_cores", lambda: cores)

    assert len(resolve("cpu", codecs=["FP8_PB_WO"]).processes) == number


def test_an_error_of_one_process_is_that_of_the_run(tmp_path: Path, make: Make) -> None:
    damaged = wide()
    damaged[UP][3, 5] = torch.nan
    source = make(shards={"a.safetensors": damaged, "b.safetensors": {"x.weight": torch.ones(4)}})

    with pytest.raises(ConvertError, match=r"up_proj.weight: 1 of 700000 elements are NaN or Inf"):
        run(source, tmp_path / "out", device=two("FP8_PB_WO"))

    assert not (tmp_path / "out").exists()
    assert not list(children())


def test_a_source_that_vanishes_names_the_file(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(shards={"a.safetensors": wide(), "b.safetensors": {"x.weight": torch.ones(4)}})
    real = processes.shares

    def removed(*args: object) -> object:
        (source / "a.safetensors").unlink()
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("qconvert.processes.shares", removed)

    with pytest.raises(ConvertError, match=r"a.safetensors: No such file or directory"):
        run(source, tmp_path / "out", device=two("FP8_PB_WO"))


def test_a_process_that_is_killed_is_an_error_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CHECKPOINTS / "llama"
    run(source, tmp_path / "whole")
    real = processes._Child.receive

    def killed(child: processes._Child) -> object:
        message = real(child)
        child.process.kill()
        return message

    with monkeypatch.context() as patch:
        patch.setattr(processes._Child, "receive", killed)
        with pytest.raises(ConvertError, match=r"a worker process ended with signal SIGKILL"):
            run(source, tmp_path / "out", device=two("FP8_PB_WO"))

    assert not list(children())
    run(source, tmp_path / "out", device=two("FP8_PB_WO"))
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert report_in(tmp_path / "out").tensors


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from qconvert import pipeline, processes
from tests_conversion import run, two
real = processes._Child.start.__func__
def start(cls, places, lock):
    child = real(cls, places, lock)
    print(child.process.pid, flush=True)
    return child
processes._Child.start = classmethod(start)
run(Path(sys.argv[1]), Path(sys.argv[2]), device=two("FP8_PB_WO"))
"""


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """Else they would go on writing where the next run is at work."""
    script = SCRIPT.replace(
        "tests_conversion import run, two", "convert.test_processes import two, run"
    )
    tests = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(CHECKPOINTS / "llama"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    found = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert not [pid for pid in found if Path(f"/proc/{pid}").exists()]
    run(CHECKPOINTS / "llama", tmp_path / "out")
    run(CHECKPOINTS / "llama", tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
