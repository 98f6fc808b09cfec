"""Where a plan is written to and read from, and where its source and statistics lie by then."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .test_cli import RUN, qconvert
from .test_cli_plans import llama_stats
from .test_plan_file import LLAMA, planned


def test_a_file_that_exists_stays_unless_forced(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text("precious")

    refused = qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", "-o", file)
    assert (refused.returncode, file.read_text()) == (1, "precious")
    assert f"{file}: exists; --force replaces it" in refused.stderr

    forced = qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", "-o", file, "--force")
    assert (forced.returncode, forced.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert json.loads(file.read_text())["document"] == "qconvert-plan"


def test_source_and_statistics_may_have_moved(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    shutil.copytree(LLAMA, tmp_path / "old" / "llama")
    stats = llama_stats(tmp_path / "old")
    words = ["--algo", "FP8", "--amax", stats]
    file = planned(tmp_path, tmp_path / "old" / "llama", *words)
    (tmp_path / "old").rename(tmp_path / "new")

    lost = qconvert("apply", file, tmp_path / "out")
    found = qconvert(
        "apply", file, tmp_path / "out", "--source", tmp_path / "new" / "llama",
        "--amax", tmp_path / "new" / "stats.json",
    )  # fmt: skip

    half = qconvert("apply", file, tmp_path / "no", "--source", tmp_path / "new" / "llama")

    assert (lost.returncode, half.returncode) == (1, 1)
    old = tmp_path.resolve() / "old"
    assert lost.stderr == (
        f"qconvert: {file}::$.where.source: plan-source: {old / 'llama'}: is no directory here; "
        "say where the source is now with --source\n"
    )
    assert half.stderr == (
        f"qconvert: {file}::$.where.statistics: plan-statistics: {old / 'stats.json'}: is no file "
        "here; say where the statistics are now with --amax\n"
    )
    assert (found.returncode, found.stderr) == (0, "")


def test_a_link_to_the_statistics_stays_one(tmp_path: Path) -> None:
    """As in a hub's cache: a folder of links, in which the vectors lie under their name."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "links").mkdir()
    llama_stats(tmp_path / "blobs").rename(tmp_path / "blobs" / "0a1b")
    (tmp_path / "links" / "stats.json").symlink_to(tmp_path / "blobs" / "0a1b")

    file = planned(tmp_path, LLAMA, "--algo", "FP8", "--amax", tmp_path / "links" / "stats.json")

    named = json.loads(file.read_text())["where"]["statistics"]
    assert named == str(tmp_path.resolve() / "links" / "stats.json")


def test_a_place_that_json_cannot_name_is_refused(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(LLAMA, source)

    done = qconvert("plan", source, "--algo", "FP8_PB_WO")

    assert done.returncode == 1
    assert "caf\\xe9: a plan can't name a path that is not UTF-8" in done.stderr


def test_a_plan_comes_through_a_pipe_too(tmp_path: Path) -> None:
    file = planned(tmp_path)
    for number, name in enumerate(("-", "/dev/stdin")):
        out = tmp_path / str(number)
        with subprocess.Popen(["cat", file], stdout=subprocess.PIPE) as cat:
            command = [*RUN, "apply", name, str(out)]
            done = subprocess.run(command, stdin=cat.stdout, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert (out / "config.json").exists()


def test_a_bad_plan_from_a_pipe_is_that_of_standard_input(tmp_path: Path) -> None:
    done = subprocess.run(
        [*RUN, "apply", "-", str(tmp_path / "out")],
        input=b"[]",
        capture_output=True,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr.startswith(b"qconvert: standard input::$.document: plan-document: ")


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "p.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)

    done = qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", "-o", link, "--force")

    assert (done.returncode, done.stderr) == (0, "")
    assert link.readlink() == target
    assert json.loads(target.read_text())["document"] == "qconvert-plan"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link.json"]
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["p.json"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as cat:
        done = qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", "-o", pipe, "--force")
        written, _ = cat.communicate(timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(written)["document"] == "qconvert-plan"
    assert pipe.is_fifo()


def test_a_device_that_takes_nothing_is_named() -> None:
    done = qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", "-o", "/dev/full", "--force")

    assert (done.returncode, done.stderr) == (1, "qconvert: /dev/full: No space left on device\n")


def test_a_plan_within_its_source_is_refused(tmp_path: Path) -> None:
    """It would be a file of the source that the plan does not list."""
    source = tmp_path / "in"
    shutil.copytree(LLAMA, source)
    (tmp_path / "link").symlink_to(source)

    for file in (source / "p.json", tmp_path / "link" / "p.json"):
        done = qconvert("plan", source, "--algo", "FP8_PB_WO", "-o", file)
        assert done.returncode == 1
        assert f"{file}: lies in {source}, whose files the plan lists" in done.stderr
    assert not (source / "p.json").exists()


@pytest.mark.parametrize("more", [["--force"], []])
def test_a_place_that_can_hold_no_plan_is_named(tmp_path: Path, more: list[str]) -> None:
    for file, message in (
        (tmp_path, f"{tmp_path}: is a directory; expected the name of a file"),
        (tmp_path / "no" / "p.json", f"the directory {tmp_path / 'no'} does not exist"),
    ):
        done = qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", "-o", file, *more)
        assert done.returncode == 1
        assert message in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_directory_is_no_plan(tmp_path: Path) -> None:
    done = qconvert("apply", tmp_path, tmp_path / "out")

    assert done.returncode == 1
    assert f"{tmp_path}: plan-missing: is a directory; expected a plan's file" in done.stderr
