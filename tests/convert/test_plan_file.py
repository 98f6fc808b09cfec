"""`qconvert plan` and `qconvert apply`: the same bytes as in one step, and no stale plan."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qschema import __version__
from qschema.plan import Plan
from qschema.strict import Json

from .conversion import CHECKPOINTS, amax_of, digests, measured, report_in
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
        (SINGLE, ["--algo", "MXFP8", "--drop", "model.layers.0.mlp", "--leave", "*.jinja"]),
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
    assert ("--drop" in words) == any(
        entry.action == "drop" for entry in report_in(tmp_path / "two").tensors
    )
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


def test_a_device_that_is_not_here_leaves_the_mark_of_disk() -> None:
    words = ["plan", LLAMA, "--algo", "FP8_PB_WO", "-v", "--device"]
    here, there = (qconvert(*words, device) for device in ("cpu", "cuda:99"))

    assert there.returncode == 0
    note, needs = there.stderr.splitlines()
    assert note.startswith("note: no estimate of memory: --device cuda:99")
    assert re.fullmatch(r"a run needs 17\.\d MiB of disk at most", needs)
    assert json.loads(there.stdout)["high_water"] == {
        "device": "cuda:99",
        "workers": None,
        "memory_budget": 1 << 30,
        "disk_nbytes": json.loads(here.stdout)["high_water"]["disk_nbytes"],
        "host_nbytes": None,
        "gpu_nbytes": None,
    }


def by_name(document: Json) -> Json:
    """Return `document` with the keys of all its objects in another order than it had."""
    if isinstance(document, dict):
        return {key: by_name(document[key]) for key in sorted(document, reverse=True)}
    return [by_name(value) for value in document] if isinstance(document, list) else document


def test_a_plan_that_was_only_reformatted_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the order of keys, as that of quantized_layers, decides bytes of the output."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "rules: [{match: '*.self_attn.*', algo: MXFP8}, {match: '*', algo: FP8_PB_WO}]\n"
    )
    file = planned(tmp_path, LLAMA, "--recipe", recipe)
    text = file.read_text()
    file.write_text(json.dumps(by_name(json.loads(text))))

    one = qconvert(LLAMA, "one", "--recipe", recipe)
    two = qconvert("apply", file, "two")

    layers = [json.loads(found)["quantized_layers"] for found in (text, file.read_text())]
    assert list(layers[0]) != list(layers[1])
    assert (one.returncode, two.returncode, two.stderr) == (0, 0, one.stderr)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["recipe"].update(allow_nonfinite=True),
        lambda plan: plan["recipe"].update(digest="sha256"),
        lambda plan: plan["recipe"].update(fail_if=["sqnr<1"]),
        lambda plan: plan.update(plan_sha256="0" * 64),
        lambda plan: plan.pop("plan_sha256"),
    ],
    ids=["nonfinite", "digest", "gate", "other-digest", "no-digest"],
)
def test_an_edit_that_changes_no_tensor_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Json]], object]
) -> None:
    file = edited(planned(tmp_path), change)

    done = qconvert("apply", file, tmp_path / "out")

    assert done.returncode == 1
    assert done.stderr.startswith(f"qconvert: {file}::$.plan_sha256: plan-edited: is ")
    assert "edited after it was made; plan again with the recipe you want\n" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_said_of_a_machine_may_be_edited(tmp_path: Path) -> None:
    file = edited(planned(tmp_path), lambda plan: plan.update(high_water=None))

    assert qconvert("apply", file, tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda plan: plan["where"].update(source=""), "$.where.source: string-pattern-mismatch"),
        (lambda plan: plan["where"].update(source="in"), "$.where.source: string-pattern-mismatch"),
        (
            lambda plan: plan["where"].update(statistics="/a\0b"),
            "$.where.statistics: string-pattern-mismatch",
        ),
        (
            lambda plan: plan["units"][0]["steps"][0].update(reason="\ud800"),
            "$.units[0].steps[0].reason: json-surrogate: a value holds half a character",
        ),
        (
            lambda plan: plan["where"].update(source="/\udfff"),
            "$.where.source: json-surrogate: a value holds half a character",
        ),
    ],
)
def test_text_that_names_nothing_is_one_finding(
    tmp_path: Path, change: Callable[[dict[str, Json]], object], finding: str
) -> None:
    file = edited(planned(tmp_path), change)

    done = qconvert("apply", file, tmp_path / "out")

    assert done.returncode == 1
    assert done.stderr.startswith(f"qconvert: {file}::{finding}")
    assert done.stderr.count("\n") == 1


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
