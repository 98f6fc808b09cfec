"""Where the time went: `--timings`, the table of `-v`, the lines of a log, `--fresh`."""

import json
import shutil
from pathlib import Path

import pytest

from qconvert.cli_timings import bottleneck, timing_lines, with_planning
from qconvert.pipeline import Progress
from qconvert.progress import progress_lines
from qschema.plan import Tool
from qschema.timings import Stage, StageTime, Timings

from .conversion import CHECKPOINTS, digests
from .test_cli import qconvert

LLAMA = CHECKPOINTS / "llama"


def timings(wall_s: float = 2.0, workers: int = 4, **seconds: float) -> Timings:
    """Return the timings of a run that read, and reused, a gigabyte."""
    stages: list[Stage] = ["plan", "read", "encode", "digest", "write", "sync", "wait"]
    return Timings(
        tool=Tool(version="0.1.0"),
        plan_sha256="0" * 64,
        device="cpu (native)",
        workers=workers,
        memory_budget=1 << 30,
        wall_s=wall_s,
        stages=[
            StageTime(stage=name, seconds=seconds[name], nbytes=10**9 if name == "read" else 0)
            for name in stages
            if name in seconds
        ],
        source_nbytes=3 * 10**9,
        output_nbytes=10**9,
        reused_nbytes=10**9,
        peak_rss_nbytes=48 << 20,
    )


def test_the_table_has_seconds_shares_and_rates() -> None:
    """4 workers, 2 s: 8 s of workers' time; the 1 GB that was taken over is nobody's speed."""
    lines = list(timing_lines(timings(read=4.0, encode=1.0, wait=0.5)))

    assert lines == [
        "stage         busy    share    GB/s",
        "read        4.00 s   50.0 %    0.25",
        "encode      1.00 s   12.5 %       -",
        "wait        0.50 s    6.2 %       -",
        "all         2.00 s             1.00  4 workers on cpu (native), 48.0 MiB of memory",
        "bottleneck: read, 50 % of the time; the source's disk sets the pace",
    ]


@pytest.mark.parametrize(
    ("seconds", "stage"),
    [
        ({"read": 1.0, "encode": 3.0}, "encode"),
        ({"digest": 3.0, "write": 2.9}, "digest"),
        ({"sync": 3.0, "wait": 2.0}, "sync"),
        # one second in which no worker works is worth four of one worker's
        ({"plan": 1.0, "encode": 3.9}, "plan"),
        ({"plan": 1.0, "encode": 4.1}, "encode"),
    ],
)
def test_the_bottleneck_is_what_takes_most_of_the_run(
    seconds: dict[str, float], stage: str
) -> None:
    worst = bottleneck(timings(**seconds))

    assert worst is not None
    assert worst.stage == stage


def test_a_run_without_time_has_no_bottleneck() -> None:
    lines = list(timing_lines(timings(wall_s=0.0, read=0.0)))

    assert bottleneck(timings(wall_s=0.0, read=0.0)) is None
    assert not [line for line in lines if line.startswith("bottleneck")]


@pytest.mark.parametrize("seconds", [{"read": 1.0}, {"plan": 0.25, "read": 1.0}])
def test_opening_and_planning_are_part_of_the_run(seconds: dict[str, float]) -> None:
    found = with_planning(timings(wall_s=2.0, **seconds), 0.5)

    assert found.wall_s == 2.5
    assert [(stage.stage, stage.seconds) for stage in found.stages] == [
        ("plan", 0.5 + seconds.get("plan", 0.0)),
        ("read", 1.0),
    ]


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """A watch that is called ten times a second, in a run of 100 s at 1 MiB/s."""
    now = 0.0
    watch = progress_lines(pause=30.0, clock=lambda: now)
    for tenth in range(1000):
        now = tenth / 10
        watch(Progress(done=[tenth << 16, (tenth << 20) // 10 - (tenth << 16)], total=100 << 20))

    assert capsys.readouterr().err.splitlines() == [
        "converting: 30.0 MiB of 100.0 MiB, 1.0 MiB/s, 70 s left",
        "converting: 60.0 MiB of 100.0 MiB, 1.0 MiB/s, 40 s left",
        "converting: 90.0 MiB of 100.0 MiB, 1.0 MiB/s, 10 s left",
    ]


def test_a_run_that_stands_still_has_no_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    watch = progress_lines(pause=1.0, clock=lambda: now)
    now = 2.0
    watch(Progress(done=[0, 0], total=1 << 20))

    assert capsys.readouterr().err == "converting: 0 B of 1.0 MiB, 0 B/s\n"


def test_timings_are_written_beside_and_never_into_the_checkpoint(tmp_path: Path) -> None:
    file, words = tmp_path / "t.json", ["--algo", "W4A16_NVFP4", "--device", "cpu"]
    qconvert(LLAMA, tmp_path / "plain", *words)

    done = qconvert(LLAMA, tmp_path / "out", *words, "--workers", "2", "--timings", file)

    found = Timings.parse(json.loads(file.read_text()), file=str(file))
    report = json.loads((tmp_path / "out" / "qconvert_report.json").read_text())
    by_stage = {stage.stage: stage for stage in found.stages}
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert found.plan_sha256 == report["plan_sha256"]
    assert (found.workers, found.memory_budget, found.reused_nbytes) == (2, 1 << 30, 0)
    assert found.wall_s * 2 >= sum(stage.seconds for stage in found.stages) * 0.5
    assert by_stage["plan"].seconds > 0
    # a format with a scale of the whole weight reads it twice
    assert by_stage["read"].nbytes > found.source_nbytes


def test_what_an_earlier_run_did_is_taken_over_unless_told_otherwise(tmp_path: Path) -> None:
    """A run whose gate fails at its end has done everything but the last step."""
    out, file = tmp_path / "out", tmp_path / "t.json"
    words = [LLAMA, out, "--algo", "FP8_PB_WO", "--device", "cpu"]

    def reused(*more: str) -> tuple[int, str]:
        assert qconvert(*words, "--fail-if", "sqnr<99").returncode == 1
        done = qconvert(*words, *more, "--timings", file)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(out)
        return json.loads(file.read_text())["reused_nbytes"], done.stderr

    taken, words_of_it = reused()
    assert taken == 2492928
    assert "note: went on from an interrupted run: 2.4 MiB of the source were done" in words_of_it
    assert reused("--fresh") == (0, "")


def test_timings_are_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(LLAMA, source)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "link").symlink_to(source)
    before = digests(source)
    words = ["--algo", "FP8_PB_WO", "--timings"]

    for file in (source / "config.json", source / "t.json", tmp_path / "link" / "t.json"):
        done = qconvert(source, out, *words, file)
        assert done.returncode == 1
        assert f"--timings {file}: lies in {source}; write it elsewhere" in done.stderr
    inside = qconvert(source, out, *words, tmp_path / "out.partial" / "t.json")
    assert f"lies in {tmp_path.resolve() / 'out.partial'}" in inside.stderr
    assert digests(source) == before
    assert not out.exists()


@pytest.mark.parametrize("text", ["precious", "{}", '{"document": "qconvert-plan"}', "[]"])
def test_what_is_no_timings_is_not_overwritten(tmp_path: Path, text: str) -> None:
    file = tmp_path / "notes"
    file.write_text(text)

    done = qconvert(LLAMA, tmp_path / "out", "--algo", "FP8_PB_WO", "--timings", file)

    assert (done.returncode, file.read_text()) == (1, text)
    assert f"--timings {file}: exists and holds no timings; nothing else is" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_empty_file_is_free_for_timings(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.touch()

    assert qconvert(LLAMA, tmp_path / "out", "--algo", "MXFP8", "--timings", file).returncode == 0
    assert json.loads(file.read_text())["document"] == "qconvert-timings"


def test_timings_that_cannot_be_written_leave_a_checkpoint_that_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"

    done = qconvert(LLAMA, out, "--algo", "FP8_PB_WO", "--timings", "/dev/full")

    assert done.returncode == 1
    assert done.stderr == (
        f"qconvert: /dev/full: No space left on device; the checkpoint {out} is complete\n"
    )
    assert (out / "config.json").exists()


def test_timings_replace_those_of_an_earlier_run(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    for out, workers in (("a", "1"), ("b", "2")):
        words = ["--algo", "FP8_PB_WO", "--workers", workers, "--timings", file]
        assert qconvert(LLAMA, tmp_path / out, *words).returncode == 0

    assert json.loads(file.read_text())["workers"] == 2
