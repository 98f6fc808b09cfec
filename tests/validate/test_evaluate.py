"""The evaluate level with a stand-in for lm-evaluation-harness, and once with the real one."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from qvalidate.evaluate import EvalOutcome, EvalRequest, evaluate

# answers `python -m lm_eval ...` with numbers from a file in the checkpoint's folder
STAND_IN = """#!{python}
import json, re, sys
from pathlib import Path
argv = sys.argv[1:]
assert argv[:2] == ["-m", "lm_eval"], argv
value = lambda name: argv[argv.index(name) + 1]
checkpoint = Path(re.search("pretrained=([^,]+)", value("--model_args"))[1])
said = json.loads((checkpoint / "scores.json").read_text())
if "context" in said:
    assert f"max_model_len={{said.pop('context')}}" in value("--model_args"), argv
if "error" in said:
    sys.exit(said["error"])
folder = Path(value("--output_path")) / "model"
folder.mkdir()
(folder / "results_1.json").write_text(json.dumps({{"results": said, "argv": argv}}))
"""


@pytest.fixture
def python(tmp_path: Path) -> str:
    file = tmp_path / "python"
    file.write_text(STAND_IN.format(python=sys.executable))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def ask(tmp_path: Path, python: str, before: object, after: object, **more: object) -> EvalOutcome:
    for name, scores in (("reference", before), ("candidate", after)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    return evaluate(
        EvalRequest.model_validate(
            {
                "engine": "vllm",
                "checkpoint": tmp_path / "candidate",
                "reference": tmp_path / "reference",
                "tasks": ["mmlu", "gsm8k"],
                "python": python,
                **more,
            }
        )
    )


def score(value: float) -> dict[str, object]:
    return {"alias": "x", "acc,none": value, "acc_stderr,none": 0.01, "sample_len": 5}


@pytest.mark.parametrize(
    ("after", "verdict", "rules"),
    [(0.79, "passed", []), (0.9, "passed", []), (0.7, "failed", ["eval-drop"])],
)
def test_a_drop_is_what_is_lost_of_the_sources_score(
    tmp_path: Path, python: str, after: float, verdict: str, rules: list[str]
) -> None:
    outcome = ask(tmp_path, python, {"mmlu": score(0.8)}, {"mmlu": score(after)})

    assert (outcome.verdict, [found.rule for found in outcome.findings]) == (verdict, rules)
    (found,) = outcome.scores
    assert (found.task, found.metric, found.stderr) == ("mmlu", "acc", 0.01)
    assert found.drop == pytest.approx(0.8 - after)


def test_the_preferred_metric_of_each_task_counts(tmp_path: Path, python: str) -> None:
    both = {"gsm8k": {"acc,none": 0.1, "exact_match,strict-match": 0.5}, "mmlu": score(0.4)}
    outcome = ask(tmp_path, python, both, both)

    assert [(found.task, found.metric) for found in outcome.scores] == [
        ("gsm8k", "exact_match"),
        ("mmlu", "acc"),
    ]


def test_a_task_that_cannot_be_judged_is_no_pass(tmp_path: Path, python: str) -> None:
    both = {"mmlu": score(0.8), "ifeval": {"alias": "x", "prompt_level_strict_acc,none": 0.1}}
    outcome = ask(tmp_path, python, both, both)

    assert (outcome.verdict, [found.task for found in outcome.scores]) == ("failed", ["mmlu"])
    (finding,) = outcome.findings
    assert finding.rule == "eval-failed"
    assert finding.message.startswith("ifeval: no metric in both runs")


def test_a_task_that_one_run_lacks_is_no_pass(tmp_path: Path, python: str) -> None:
    before = {"mmlu": score(0.8), "gsm8k": score(0.5)}
    outcome = ask(tmp_path, python, before, {"mmlu": score(0.8)})

    assert [found.rule for found in outcome.findings] == ["eval-failed"]


def test_a_score_that_is_no_number_is_no_pass(tmp_path: Path, python: str) -> None:
    outcome = ask(tmp_path, python, {"mmlu": score(0.8)}, {"mmlu": score(float("nan"))})

    assert [found.rule for found in outcome.findings] == ["eval-drop"]


def test_nothing_of_a_harness_that_is_too_slow_is_left(tmp_path: Path) -> None:
    """Its engine is a process of its own."""
    child = tmp_path / "child"
    file = tmp_path / "slow"
    file.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {child}\nwait\n")
    file.chmod(0o755)
    outcome = ask(tmp_path, str(file), {}, {}, timeout_s=1.0)

    assert outcome.message == "no result in 1 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_max_drop_is_the_users(tmp_path: Path, python: str) -> None:
    outcome = ask(tmp_path, python, {"mmlu": score(0.8)}, {"mmlu": score(0.7)}, max_drop=0.2)

    assert outcome.verdict == "passed"


@pytest.mark.parametrize(("positions", "expected"), [(512, 512), (131072, 4096), (None, 4096)])
def test_a_model_gets_no_longer_prompts_than_it_was_made_for(
    tmp_path: Path, python: str, positions: int | None, expected: int
) -> None:
    for name in ("reference", "candidate"):
        (tmp_path / name).mkdir()
        config = {} if positions is None else {"max_position_embeddings": positions}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    said = {"mmlu": score(0.8), "context": expected}
    outcome = ask(tmp_path, python, said, said)

    assert outcome.verdict == "passed", outcome.message


def test_results_that_are_cut_off_are_no_exception(tmp_path: Path) -> None:
    file = tmp_path / "cut"
    file.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\n"
        "folder = Path(sys.argv[sys.argv.index('--output_path') + 1])\n"
        "(folder / 'results_1.json').write_text('{')\n"
    )
    file.chmod(0o755)
    outcome = ask(tmp_path, str(file), {}, {})

    assert outcome.message.startswith("reference: no results: ")


def test_a_harness_that_stops_says_why(tmp_path: Path, python: str) -> None:
    outcome = ask(tmp_path, python, {"mmlu": score(0.8)}, {"error": "no such task"})

    assert (outcome.verdict, outcome.message) == ("failed", "candidate: no such task")
    assert [found.rule for found in outcome.findings] == ["eval-failed"]


def test_results_without_a_metric_are_no_pass(tmp_path: Path, python: str) -> None:
    outcome = ask(tmp_path, python, {"mmlu": {"alias": "x"}}, {"mmlu": {"alias": "x"}})

    assert outcome.verdict == "failed"


@pytest.mark.parametrize("given", ["/nowhere/python", None])
def test_no_harness_is_said(tmp_path: Path, given: str | None) -> None:
    """This interpreter has none."""
    outcome = ask(tmp_path, given or sys.executable, {}, {})

    assert outcome.verdict == "not-run"
    assert [found.rule for found in outcome.findings] == ["eval-missing"]


def test_an_engine_that_the_harness_does_not_know(tmp_path: Path, python: str) -> None:
    outcome = ask(tmp_path, python, {}, {}, engine="tensorrt-llm")

    assert "has no tensorrt-llm; it has vllm, sglang, transformers" in outcome.message


@pytest.mark.skipif("QVALIDATE_LM_EVAL_PYTHON" not in os.environ, reason="no lm_eval to ask")
def test_the_real_harness_agrees_with_itself(tmp_path: Path) -> None:
    """A task of our own, on a fixture in transformers, against itself."""
    llama = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "llama"
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"The number after {n} is", "answer": n % 2} for n in range(8)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "parity.yaml").write_text(
        "task: parity\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: text\n"
        "doc_to_choice: [even, odd]\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    outcome = evaluate(
        EvalRequest(
            engine="transformers",
            checkpoint=llama,
            reference=llama,
            tasks=["parity"],
            task_folder=tmp_path / "tasks",
            python=os.environ["QVALIDATE_LM_EVAL_PYTHON"],
        )
    )

    assert outcome.verdict == "passed", outcome.message
    (found,) = outcome.scores
    assert (found.task, found.metric, found.drop) == ("parity", "acc", 0.0)
