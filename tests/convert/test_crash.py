"""Killed at any instant, run again, same bytes: SIGKILL before or in the middle of any call."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qschema.checkpoint import open_checkpoint

from .conversion import CHECKPOINTS, WRITABLE, Make, digests, made_up, randn

# three shards; one file
LAYOUTS = ("llama", "qwen3")
# per format and layout: 14 x 2 x 3 kills
NUM_KILLS = 3


class Crasher:
    """Conversions in forked processes, which may be killed."""

    def __init__(self) -> None:
        script = Path(__file__).parent / "crashing.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def run(self, source: Path, output: Path, **command: object) -> tuple[int, int]:
        """Return exit code (negative: signal) and number of calls of one conversion."""
        defaults = {"workers": 2, "budget": 1 << 20, "kill_at": 0, "torn": False, "fresh": False}
        found = {"source": str(source), "output": str(output), **defaults, **command}
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(found), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return answer["code"], answer["count"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=10)


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    """Return the process that forks."""
    found = Crasher()
    yield found
    found.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algo", WRITABLE)
def test_killed_at_random_calls_and_run_again(
    tmp_path: Path, crasher: Crasher, algo: str, layout: str
) -> None:
    source = CHECKPOINTS / layout
    made_up(open_checkpoint(source), tmp_path)
    asked = {"algo": algo, "statistics": str(tmp_path / "made_up.json")}
    code, num_calls = crasher.run(source, tmp_path / "whole", **asked)
    assert code == 0
    expected = digests(tmp_path / "whole")
    numbers = random.Random(f"{algo} {layout}")

    for turn in range(NUM_KILLS):
        output = tmp_path / f"out{turn}"
        # each run goes on from the one before; two workers take calls in no fixed order
        for kill in range(1 + turn):
            kill_at = numbers.randint(1, num_calls)
            code, _ = crasher.run(source, output, **asked, kill_at=kill_at, torn=kill % 2 == 0)
            # one that goes on may end in fewer calls than the number drawn
            assert code == -signal.SIGKILL or (kill and code == 0)
            if output.exists():
                assert set(digests_of_files(output)) == set(expected), "half of it is visible"

        code, _ = crasher.run(source, output, **asked)

        assert code == 0
        assert digests(output) == expected
        assert not output.with_name(f"{output.name}.partial").exists()


def test_killed_before_every_single_call(tmp_path: Path, crasher: Crasher, make: Make) -> None:
    """Two shards, tensors in several slices, kept ones, two passes, a side file."""
    first = {"model.layers.0.mlp.up_proj.weight": randn(300, 512, seed=1)}
    second = {"model.norm.weight": randn(512, seed=2), "model.empty": torch.zeros(0, 4)}
    source = make(shards={"a.safetensors": first, "b.safetensors": second})
    (source / "notes.txt").write_text("x")
    asked = {"algo": "W4A16_NVFP4", "workers": 1, "budget": 1 << 17, "statistics": None}
    _, num_calls = crasher.run(source, tmp_path / "whole", **asked)
    expected = digests(tmp_path / "whole")
    assert num_calls > 50
    for kill_at in range(1, num_calls + 1):
        output = tmp_path / f"out{kill_at}"
        code, _ = crasher.run(source, output, **asked, kill_at=kill_at)
        assert code == -signal.SIGKILL
        if output.exists():
            assert set(digests_of_files(output)) == set(expected), f"call {kill_at}"

        code, _ = crasher.run(source, output, **asked)

        assert code == 0, f"call {kill_at}"
        assert digests(output) == expected, f"call {kill_at}"


def test_killed_from_outside_as_a_scheduler_does(tmp_path: Path) -> None:
    """The command itself, SIGKILL at ten moments of its life."""
    source, output = CHECKPOINTS / "llama", tmp_path / "out"
    command = [sys.executable, "-m", "qconvert", str(source), str(output), "--algo", "MXFP8", "-q"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    begin = time.perf_counter()
    whole = [str(tmp_path / "whole") if part == str(output) else part for part in command]
    subprocess.run(whole, env=env, check=True, capture_output=True)
    duration = time.perf_counter() - begin
    numbers = random.Random(7)
    for _ in range(10):
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        time.sleep(duration * numbers.uniform(0.5, 1.0))
        process.kill()
        process.wait()

    subprocess.run(command, env=env, check=True, capture_output=True)

    assert digests(output) == digests(tmp_path / "whole")


def digests_of_files(output: Path) -> list[str]:
    """Return the names of the files of a visible output, the tool's own books left out."""
    return [path.name for path in output.iterdir() if path.name != ".qconvert"]
