"""The level `evaluate`: tasks of lm-evaluation-harness, and how much the checkpoint loses on them.

The harness runs in the engine's interpreter, once for the source and once for the checkpoint, as a
command (`python -m lm_eval`); it brings its own tasks and data, and none of them is ours.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field

from qschema.strict import DocumentError, Finding, Strict, load_json
from qvalidate.context import positive_int
from qvalidate.engines.interpreter import environment
from qvalidate.engines.process import end_group, sigterm_as_exit

EvalVerdict: TypeAlias = Literal["passed", "failed", "not-run"]
# what the harness calls the engines; transformers is there for a machine that has no engine
_MODELS: Mapping[str, str] = {"vllm": "vllm", "sglang": "sglang", "transformers": "hf"}
_ARGUMENTS: Mapping[str, str] = {
    "vllm": "enforce_eager=True,max_model_len={longest}",
    "sglang": "disable_cuda_graph=True",
    "transformers": "dtype=auto",
}
# tokens that a task may need; a model that was made for fewer gets no more, which vLLM refuses
_LONGEST = 4096
# in the order of preference, where a task has several
_METRICS = ("exact_match", "acc_norm", "acc", "mc2", "f1", "pass@1", "pass_at_1")

EVALUATE: Mapping[str, str] = {
    "eval-drop": "on a task the checkpoint does worse than the source by more than --max-drop",
    "eval-failed": "lm-evaluation-harness did not finish, or measured what can't be compared; "
    "nothing is known about those tasks",
    "eval-missing": "lm-evaluation-harness is not installed for that interpreter; nothing was run "
    "(exit 2)",
}


class EvalRequest(Strict):
    """Tasks for a checkpoint and its source, in one engine."""

    engine: str
    checkpoint: Path
    reference: Path
    tasks: list[str] = Field(min_length=1)
    # a folder with task files of the user's own
    task_folder: Path | None = None
    python: str | None = None
    # examples of each task; None is all
    limit: int | None = Field(default=None, ge=1)
    # of a metric between 0 and 1
    max_drop: float = Field(default=0.02, ge=0, le=1)
    # for each of the two runs
    timeout_s: float = Field(default=86400.0, gt=0, allow_inf_nan=False)


class TaskScore(Strict):
    """One task's metric on both sides; a drop is positive where the checkpoint is worse."""

    task: str
    metric: str
    reference: float
    candidate: float
    drop: float
    # of the candidate's metric, as the harness estimates it
    stderr: float | None = None


class EvalOutcome(Strict):
    """What the tasks say."""

    verdict: EvalVerdict
    engine: str
    limit: int | None
    scores: list[TaskScore] = Field(default_factory=list)
    message: str = ""
    findings: list[Finding] = Field(default_factory=list)


class _HarnessError(Exception):
    """The harness did not give results; `is_missing` if there is none."""

    def __init__(self, message: str, *, is_missing: bool = False) -> None:
        self.is_missing = is_missing
        super().__init__(message)


def evaluate(request: EvalRequest) -> EvalOutcome:
    """Return the scores of both checkpoints; trouble with the harness is never an exception."""
    try:
        if request.engine not in _MODELS:
            raise _HarnessError(
                f"lm-evaluation-harness has no {request.engine}; it has {', '.join(_MODELS)}",
                is_missing=True,
            )
        with sigterm_as_exit():
            reference = _run(request, request.reference)
            candidate = _run(request, request.checkpoint)
        scores = list(_scores(reference, candidate))
        if not scores:
            raise _HarnessError("the results have no metric that both runs know")
    except _HarnessError as error:
        rule = "eval-missing" if error.is_missing else "eval-failed"
        return EvalOutcome(
            verdict="not-run" if error.is_missing else "failed",
            engine=request.engine,
            limit=request.limit,
            message=str(error),
            findings=[_finding(request, rule, str(error))],
        )
    findings = [
        _finding(
            request,
            "eval-drop",
            f"{score.task} {score.metric}: {score.candidate:.4f}, the source has "
            f"{score.reference:.4f}; at most {request.max_drop:g} less is allowed",
        )
        for score in scores
        # not `>`: a NaN is no pass
        if not score.drop <= request.max_drop
    ]
    if unjudged := _unjudged(reference, candidate, scores):
        known = ", ".join(_METRICS)
        message = f"{', '.join(unjudged)}: no metric in both runs that is known here ({known})"
        findings.append(_finding(request, "eval-failed", message))
    return EvalOutcome(
        verdict="failed" if findings else "passed",
        engine=request.engine,
        limit=request.limit,
        scores=scores,
        findings=findings,
    )


def _run(request: EvalRequest, checkpoint: Path) -> Mapping[str, object]:
    """Return the harness's document of results for one checkpoint."""
    python = request.python or sys.executable
    more = _ARGUMENTS[request.engine].format(longest=_longest(checkpoint))
    arguments = f"pretrained={os.path.abspath(checkpoint)},{more}"
    with tempfile.TemporaryDirectory(prefix="qvalidate-eval-") as folder:
        argv = [python, "-m", "lm_eval", "--model", _MODELS[request.engine]]
        argv += ["--model_args", arguments, "--tasks", ",".join(request.tasks)]
        argv += ["--output_path", folder, "--seed", "0"]
        if request.limit is not None:
            argv += ["--limit", str(request.limit)]
        variables = environment({"TOKENIZERS_PARALLELISM": "false"}, python=python)
        # tasks are data sets, which the harness may have to fetch
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            variables.pop(name, None)
            variables.update({name: os.environ[name]} if name in os.environ else {})
        if request.task_folder is not None:
            argv += ["--include_path", os.path.abspath(request.task_folder)]
        try:
            returncode, log = _finished(argv, variables, folder, timeout_s=request.timeout_s)
        except subprocess.TimeoutExpired:
            raise _HarnessError(f"no result in {request.timeout_s:g} s") from None
        except OSError as error:
            raise _HarnessError(f"can't start {python}: {error}", is_missing=True) from None
        if "No module named lm_eval" in log:
            raise _HarnessError(
                f"lm_eval is not installed for {python}: pip install 'qconvert[eval]'",
                is_missing=True,
            )
        files = sorted(Path(folder).rglob("results*.json"))
        if returncode or not files:
            raise _HarnessError(f"{checkpoint.name}: {_last_line(log)}")
        try:
            document: object = json.loads(files[-1].read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _HarnessError(f"{checkpoint.name}: no results: {error}") from None
        return document if isinstance(document, dict) else {}


def _longest(checkpoint: Path) -> int:
    """Return how many tokens a prompt may have."""
    try:
        config = load_json(checkpoint / "config.json")
    except (DocumentError, OSError):
        # the engine will say what is wrong with it
        config = None
    found = None
    if isinstance(config, dict):
        found = positive_int(config, "max_position_embeddings")
    return min(found or _LONGEST, _LONGEST)


def _finished(
    argv: Sequence[str], variables: Mapping[str, str], folder: str, *, timeout_s: float
) -> tuple[int, str]:
    """Return exit status and stderr of a command; nothing of its process group is left.

    Engines start processes of their own, which outlive a harness that is killed alone.
    """
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=variables,
        cwd=folder,
        start_new_session=True,
    ) as process:
        try:
            _, log = process.communicate(timeout=timeout_s)
        finally:
            end_group(process)
    return process.returncode, log.decode(errors="replace")


def _unjudged(
    reference: Mapping[str, object], candidate: Mapping[str, object], scores: Sequence[TaskScore]
) -> list[str]:
    """Return the tasks that were measured and have no score: that is no pass."""
    before, after = _results(reference), _results(candidate)
    measured = {
        task
        for results in (before, after)
        for task, metrics in results.items()
        if any("," in key and not key.partition(",")[0].endswith("_stderr") for key in metrics)
    }
    return sorted(measured - {score.task for score in scores})


def _scores(
    reference: Mapping[str, object], candidate: Mapping[str, object]
) -> Iterator[TaskScore]:
    """Yield the score of every task by the first metric of `_METRICS` that it has."""
    before, after = _results(reference), _results(candidate)
    for task in sorted(before.keys() & after.keys()):
        key = _key(sorted(before[task].keys() & after[task].keys()))
        if key is None:
            continue
        metric, _, kind = key.partition(",")
        error = after[task].get(f"{metric}_stderr,{kind}")
        old, new = before[task][key], after[task][key]
        yield TaskScore(
            task=task, metric=metric, reference=old, candidate=new, drop=old - new, stderr=error
        )


def _results(document: Mapping[str, object]) -> Mapping[str, Mapping[str, float]]:
    """Return task -> metric,filter -> number."""
    found = document.get("results")
    tasks = found.items() if isinstance(found, dict) else ()
    return {
        task: {
            key: float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, metrics in tasks
    }


def _key(keys: Sequence[str]) -> str | None:
    for metric in _METRICS:
        for key in keys:
            if key.partition(",")[0] == metric:
                return key
    return None


def _finding(request: EvalRequest, rule: str, message: str) -> Finding:
    return Finding(file=str(request.checkpoint), where="", rule=rule, message=message)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"
