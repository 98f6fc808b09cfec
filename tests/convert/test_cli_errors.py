"""What the command says when it can't do what was asked: one line, a place, an exit code."""

import os
import subprocess
from pathlib import Path

import pytest

from .conversion import Make
from .test_cli import RUN, W, qconvert


def test_a_reader_that_has_seen_enough_is_no_error(llama: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*RUN, "plan", str(llama), "--algo", "FP8_PB_WO"]

    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(write)

    assert done.stderr == b""


FULL = [
    (["plan", "LLAMA", "--algo", "FP8_PB_WO"], "standard output: No space left on device"),
    (["LLAMA", "OUT", "--algo", "FP8_PB_WO", "--dry-run"], "standard output: No space left on"),
    (
        ["LLAMA", "OUT", "--algo", "FP8_PB_WO", "--format", "json"],
        "standard output: No space left on device; the checkpoint OUT is complete",
    ),
]


@pytest.mark.parametrize(("words", "message"), FULL)
def test_an_output_that_takes_nothing_is_named(
    llama: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    places = {"LLAMA": str(llama), "OUT": str(tmp_path / "out")}
    command = [*RUN, *(places.get(word, word) for word in words)]

    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith(f"qconvert: {message.replace('OUT', places['OUT'])}")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "out").exists() == ("complete" in message)


def test_a_plan_is_no_recipe(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.plan.json"
    qconvert("plan", llama, "--algo", "FP8_PB_WO", "-o", file)

    done = qconvert(llama, tmp_path / "out", "--recipe", file)

    assert done.returncode == 1
    assert done.stderr == (
        f"qconvert: {file}::$.document: recipe-document: is a plan, not a recipe; convert by it "
        f"with: qconvert apply {file} OUT_DIR\n"
    )


BAD_WORDS = [
    (["--algo", "FP8_PBWO"], 2, "unknown algorithm 'FP8_PBWO'; did you mean FP8_PB_WO?"),
    ([], 2, "give either --algo or --recipe"),
    (["--algo", "FP8_PB_WO", "--recipe", "r.yaml"], 2, "give either --algo or --recipe"),
    (["--algo", "FP8_PB_WO", "--memory-budget", "lots"], 2, "'lots' is not a size"),
    (["--algo", "FP8_PB_WO", "--device", "tpu"], 2, "'tpu' is none of auto, cpu, cuda, cuda:N"),
    (["--algo", "FP8_PB_WO", "--device", "cuda,cuda:1"], 2, "lists such as cuda:0,cuda:1"),
    (["--algo", "FP8_PB_WO", "--device", "cpu,cuda:0"], 2, "lists such as cuda:0,cuda:1"),
    (["--algo", "FP8_PB_WO", "--device", "cuda:99"], 1, "this machine shows"),
    (["--algo", "FP8_PB_WO", "-v", "-q"], 2, "give either --verbose or --quiet"),
    (["--algo", "FP8_PB_WO", "--timings", "/nowhere/t.json"], 2, "in a directory that exists"),
    (["--algo", "FP8_PB_WO", "--workers", "0"], 2, "0 is not in the range"),
    (["--algo", "FP8_PB_WO", "--drop", ""], 1, "$.drop[0]: string-too-short"),
    (["--algo", "FP8_PB_WO", "--exclude", ""], 1, "$.exclude[0]: string-too-short"),
    (["--recipe", "nowhere.yaml"], 1, "nowhere.yaml: recipe-missing: no such file"),
    (["--algo", "FP8_PB_WO", "--device", "cpu", "--memory-budget", "64KiB"], 1, "raise --memory-"),
]


@pytest.mark.parametrize(("words", "code", "message"), BAD_WORDS)
def test_a_bad_command_is_one_clear_error(
    llama: Path, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    done = qconvert(llama, tmp_path / "out", *words)

    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("rules: [{match: '*', algo: FP8_PB_WO}]\nexcludes: []", "$.excludes: extra-forbidden"),
        ("rules: [{match: '*', algo: FP8_PBWO}]", "$.rules[0].algo: unknown-algo"),
        ("rules: []", "$: no-rules"),
        ("rules: [{match: '', algo: FP8_PB_WO}]", "$.rules[0].match: string-too-short"),
        ("rules: [{match: '*', algo: FP8_PB_REAL}]", "$.rules[0].algo: read-only-algo"),
        ("rules: [{match: '*', algo: FP8_PB_WO}]\nrules: []", "$: yaml-syntax: "),
        ("rules: [", "$: yaml-syntax: "),
        ('rules: []\ndrop: ["\\ud800"]', "$.drop[0]: json-surrogate: a value holds half a char"),
        ("- 1", "$: "),
    ],
)
def test_a_bad_recipe_names_the_place(llama: Path, tmp_path: Path, text: str, finding: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)

    done = qconvert(llama, tmp_path / "out", "--recipe", recipe)

    assert done.returncode == 1
    assert f"{recipe}::{finding}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_one_clear_error(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).symlink_to(file)
    shard = source / "model-00002-of-00003.safetensors"
    shard.unlink()
    shard.mkdir()

    done = qconvert(source, tmp_path / "out", "--algo", "FP8_PB_WO")

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "model-00002-of-00003.safetensors" in done.stderr


def test_output_that_exists_is_not_touched(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")

    done = qconvert(llama, tmp_path / "out", "--algo", "FP8_PB_WO")

    assert done.returncode == 1
    assert "exists and is not empty; nothing is overwritten" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path: Path, make: Make) -> None:
    source = make({"a.q_proj.weight": W, "b\x1b[31m\nnote: fake.weight": W.clone()})

    done = qconvert(source, tmp_path / "out", "--algo", "FP8_PB_WO", "--dry-run")

    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert r"b\x1b[31m\nnote: fake.weight" in done.stdout


def test_nor_do_those_in_an_error(tmp_path: Path, make: Make) -> None:
    source = make({"b\x1b[31m\nqconvert: fake.weight": W[:, :7].contiguous()})

    done = qconvert(source, tmp_path / "out", "--algo", "MXFP8")

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert r"b\x1b[31m\nqconvert: fake.weight: MXFP8 needs columns" in done.stderr
