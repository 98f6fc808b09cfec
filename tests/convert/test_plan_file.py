"""`qconvert plan` and `qconvert apply`: the same bytes as in one step, and no stale plan."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qschema import __version__
from qschema.plan import Plan
from qschema.strict import Json

from .conversion import CHECKPOINTS, amax_of, digests, measured
from .test_cli import qconvert
from .test_cli_plans import llama_stats

LLAMA = CHECKPOINTS / "llama"
SINGLE = CHECKPOINTS / "qwen3"


def planned(folder: Path, source: Path = LLAMA, *words: object) -> Path:
    """Return the file of a plan that the command wrote; without `words` of blocks."""
    file = folder / "p.json"
    done = qconvert("plan", source, "-o", file, *(words or ("--algo", "FP8_PB_WO")))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return file


def edited(file: Path, change: Callable[[dict[str, Json]], object]) -> Path:
    """Return `file` after a change of its JSON."""
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (LLAMA, ["--algo", "FP8_PB_WO", "--exclude", "model.layers.0"]),
        (SINGLE, ["--algo", "MXFP8", "--drop", "model.layers.1", "--leave", "*.jinja"]),
        (LLAMA, ["--algo", "NVFP4", "--amax", "stats.json", "--kv-cache", "FP8"]),
    ],
    ids=["shards", "one-file", "statistics"],
)
def test_two_steps_give_the_bytes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    llama_stats(tmp_path)

    one = qconvert(source, "one", *words)
    planned(tmp_path, source, *words)
    # neither the place nor the machine of the second step are those of the first
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    two = qconvert("apply", "../p.json", "../two", "--workers", "1", "--memory-budget", "32MiB")

    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert one.stderr == two.stderr
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_plan_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    file = planned(tmp_path)
    on_stdout = [
        qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", *more).stdout for more in ([], ["-o", "-"])
    ]
    dry_run = qconvert(
        LLAMA, tmp_path / "out", "--algo", "FP8_PB_WO", "--dry-run", "--format", "json"
    )

    assert {*on_stdout, dry_run.stdout} == {file.read_text()}


def test_a_digest_is_that_of_every_machine(tmp_path: Path) -> None:
    """Two copies of a source, two budgets: other places, other marks, one digest."""
    shutil.copytree(LLAMA, tmp_path / "copy")
    words = ["--algo", "FP8_PB_WO", "--memory-budget", "32MiB", "--workers", "1"]
    here = Plan.parse(json.loads(planned(tmp_path).read_text()), file="here")
    there = Plan.parse(
        json.loads(planned(tmp_path, tmp_path / "copy", *words, "--force").read_text()),
        file="there",
    )

    assert here.where != there.where
    assert here.high_water != there.high_water
    assert here.sha256() == there.sha256()


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


def test_asked_a_plan_says_what_a_run_takes_and_what_comes_next(tmp_path: Path) -> None:
    file = tmp_path / "p.json"

    done = qconvert(
        "plan", LLAMA, "--algo", "FP8_PB_WO", "-o", file, "-v", "--device", "cpu", "--workers", "2"
    )

    needs, further = done.stderr.splitlines()
    marks = json.loads(file.read_text())["high_water"]
    assert (marks["workers"], marks["gpu_nbytes"]) == (2, 0)
    assert needs.startswith("a run needs 17.5 MiB of disk, ")
    assert "with 2 workers on cpu (" in needs
    assert further == f"{file}: 21 steps; convert with: qconvert apply {file} OUT_DIR"


def test_a_device_that_is_not_here_leaves_out_the_marks(tmp_path: Path) -> None:
    done = qconvert("plan", LLAMA, "--algo", "FP8_PB_WO", "--device", "cuda:99")

    assert done.returncode == 0
    assert done.stderr.startswith("note: no estimate of disk and memory: --device cuda:99")
    assert json.loads(done.stdout)["high_water"] is None


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

    assert lost.returncode == 1
    assert f"{tmp_path / 'old' / 'llama'}: checkpoint-missing: does not exist" in lost.stderr
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


def edit_place(document: dict[str, Json]) -> None:
    document["units"][3]["steps"][0]["outputs"][0]["offset"] += 8


def edit_recipe(document: dict[str, Json]) -> None:
    document["recipe"]["exclude"] = ["model.layers.0"]


STALE = [
    (lambda plan: plan["tool"].update(version="0.0.9"), "$.tool.version: plan-tool: was made by q"),
    (
        lambda plan: plan.update(document="qconvert-report"),
        "$.document: plan-document: expected 'q",
    ),
    (lambda plan: plan.update(out_dir="x"), "$.out_dir: extra-forbidden: unknown key"),
    (lambda plan: plan["units"][2].pop("steps"), "$.units[2].steps: missing: required key"),
    (
        lambda plan: plan["source"].update(digest="0" * 64),
        "$.source.digest: plan-source: expected t",
    ),
    (
        lambda plan: plan.update(vectors="0" * 64),
        "$.vectors: plan-vectors: expected the vectors 00",
    ),
    (
        lambda plan: plan.update(where=None),
        "$.where: plan-source: names no source; say where it is",
    ),
    (
        lambda plan: plan["units"].pop(),
        "$.units[20]: plan-differs: is nothing here, planning again",
    ),
    (edit_place, "$.units[3].steps[0].outputs[0].offset: plan-differs: is "),
    # the recipe decides, so what follows from it is what differs
    (edit_recipe, "$.exclude_modules["),
]


@pytest.mark.parametrize(("change", "message"), STALE)
def test_a_plan_that_does_not_hold_is_refused_by_json_path(
    tmp_path: Path, change: Callable[[dict[str, Json]], object], message: str
) -> None:
    file = edited(planned(tmp_path), change)

    done = qconvert("apply", file, tmp_path / "out")

    assert done.returncode == 1
    assert done.stderr.startswith(f"qconvert: {file}::{message}")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "plan-missing: no such file; make it with: qconvert plan"),
        ("{", "$: json-syntax: not JSON"),
        ("[]", "$.document: plan-document: expected 'qconvert-plan', found None"),
    ],
)
def test_what_is_no_plan_is_said_to_be_none(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "p.json"
    if text is not None:
        file.write_text(text)

    done = qconvert("apply", file, tmp_path / "out")

    assert done.returncode == 1
    assert message in done.stderr


def test_another_source_is_refused_with_both_digests(tmp_path: Path) -> None:
    file = planned(tmp_path)

    done = qconvert("apply", file, tmp_path / "out", "--source", SINGLE)

    digest = json.loads(file.read_text())["source"]["digest"][:16]
    assert done.returncode == 1
    assert f"expected the source {digest}..., found " in done.stderr
    assert f"in {SINGLE}: its shards have other names, sizes or headers" in done.stderr
    assert "--source, or plan again" in done.stderr


def test_a_side_file_that_has_changed_is_named(tmp_path: Path) -> None:
    source = tmp_path / "in"
    shutil.copytree(LLAMA, source)
    file = planned(tmp_path, source)
    (source / "tokenizer.json").write_text("{}")

    done = qconvert("apply", file, tmp_path / "out")

    assert done.returncode == 1
    assert ".nbytes: plan-differs: is 22" in done.stderr
    assert "planning again makes it 2: the plan was edited, or files of the source" in done.stderr


def test_other_statistics_are_refused(tmp_path: Path) -> None:
    inputs = {f"model.layers.{layer}.mlp.down_proj": amax_of("x") for layer in (0, 1)}
    vectors = {f"{name}.pre_quant_scale": torch.full((384,), 2.0) for name in inputs}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [{match: '*.down_proj', algo: NVFP4_AWQ}]\n")
    measured(tmp_path, inputs=inputs, vectors=vectors)
    words = ["--recipe", recipe, "--amax", tmp_path / "stats.json"]
    file = planned(tmp_path, LLAMA, *words)

    measured(tmp_path, inputs=dict.fromkeys(inputs, 3.0), vectors=vectors)
    number = qconvert("apply", file, tmp_path / "out")
    measured(tmp_path, inputs=inputs, vectors={name: scale * 2 for name, scale in vectors.items()})
    vector = qconvert("apply", file, tmp_path / "out")
    measured(tmp_path, inputs=inputs, vectors=vectors)
    same = qconvert("apply", file, tmp_path / "out")

    assert (number.returncode, vector.returncode, same.returncode) == (1, 1, 0)
    assert ".input_amax: plan-differs: is " in number.stderr
    assert "planning again makes it 3.0: " in number.stderr
    assert "$.vectors: plan-vectors: expected the vectors " in vector.stderr
    assert "pass the right statistics with --amax" in vector.stderr


def test_the_version_in_a_plan_is_this_one(tmp_path: Path) -> None:
    assert json.loads(planned(tmp_path).read_text())["tool"]["version"] == __version__


def test_help_of_each_command_has_an_example_and_its_options() -> None:
    plan, apply = (" ".join(qconvert(name, "--help").stdout.split()) for name in ("plan", "apply"))

    assert "Usage: qconvert plan [OPTIONS] IN_DIR" in plan
    assert "Usage: qconvert apply [OPTIONS] PLAN OUT_DIR" in apply
    for option in ("--algo", "--recipe", "--drop", "--on-indivisible", "--fail-if", "--force"):
        assert option in plan
        assert option not in apply
    for option in ("--source", "--amax", "--fresh", "--timings", "--device", "--verbose"):
        assert option in apply
    assert "Example: qconvert plan " in plan
    assert "Example: qconvert apply " in apply
