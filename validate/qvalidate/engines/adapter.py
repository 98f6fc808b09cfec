"""The way from a request to an outcome that all engines share: start, diagnose, compare."""

import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qschema.strict import Finding, Json
from qvalidate.compare import CompareError, compare, numpy_missing, violations
from qvalidate.engines.diagnosis import Diagnosis, diagnose
from qvalidate.engines.interpreter import NoInterpreterError, environment, find_interpreter
from qvalidate.engines.outcome import (
    Comparison,
    EngineOutcome,
    EngineRequest,
    Kernels,
    Level,
    Verdict,
)
from qvalidate.engines.process import Command, Run, RunnerState, run, sigterm_as_exit

_NUM_TOKENS = 8
_VERDICTS: dict[str, Verdict] = {"engine-no-kernel": "no-kernel", "engine-missing": "not-run"}


@dataclass(frozen=True)
class RunnerEngine:
    """An engine that is driven by a runner file beside this module."""

    name: str
    # what the interpreter must be able to import
    module: str
    # how a person gets it
    install: str
    runner: str
    # environment variables that the user's own win over
    defaults: Mapping[str, str]
    # what the engine says when this machine lacks an operation
    no_kernel: re.Pattern[str]
    # files that the runner imports
    helpers: tuple[str, ...] = ("runner_base.py",)
    # the files of stand-ins for kernels that a machine lacks
    reference_kernels: tuple[str, ...] = ()

    def command(self, python: str | None, *, kernels: Kernels = "native") -> Command:
        """Return how the runner is started, under the interpreter that the user gave or ours.

        Raises NoInterpreterError.
        """
        found = find_interpreter(python, module=self.module, install=self.install)
        stand_ins = self.reference_kernels if kernels == "reference" else ()
        here = Path(__file__).parent
        return Command(
            python=found,
            runner=here / self.runner,
            environment=environment(self.defaults, python=found),
            helpers=tuple(here / name for name in (*self.helpers, *stand_ins)),
        )

    def run(self, request: EngineRequest) -> EngineOutcome:
        """Return what the engine made of the request's checkpoint."""
        started = time.monotonic()
        with (
            sigterm_as_exit(),
            tempfile.TemporaryDirectory(prefix=f"qvalidate-{self.name}-") as folder,
        ):
            outcome = _Attempt(self, request, Path(folder)).outcome()
        return outcome.model_copy(update={"wall_s": round(time.monotonic() - started, 2)})


class _Attempt:
    """One request under way; everything that the engine writes goes into `folder`."""

    def __init__(self, engine: RunnerEngine, request: EngineRequest, folder: Path) -> None:
        self.engine = engine
        self.request = request
        self.folder = folder
        self.findings: list[Finding] = []

    def outcome(self) -> EngineOutcome:
        if self.request.level == "compare" and (sentence := numpy_missing()):
            return self._not_run(sentence)
        if self.request.kernels == "reference" and not self.engine.reference_kernels:
            return self._not_run(f"there are no reference kernels for {self.engine.name}")
        try:
            candidate = self._run("candidate", self.request.checkpoint, prompts=None)
        except NoInterpreterError as error:
            return self._not_run(str(error))
        diagnosis = self._diagnose(candidate)
        if diagnosis is not None:
            return self._failed(candidate, diagnosis)
        reached = _level(candidate.state)
        self._judge_tokens(candidate.state)
        comparison = None
        if self.request.level == "compare" and self.request.reference is not None:
            comparison = self._compare(candidate.state, self.request.reference)
            reached = reached if comparison is None else "compare"
        is_clean = all(finding.severity != "error" for finding in self.findings)
        return self._outcome(
            candidate.state,
            verdict="passed" if is_clean and reached == self.request.level else "failed",
            reached=reached,
            comparison=comparison,
        )

    def _run(self, role: str, checkpoint: Path, *, prompts: list[list[int]] | None) -> Run:
        command = self.engine.command(self.request.python, kernels=self.request.kernels)
        given: Json = None if prompts is None else [list(ids) for ids in prompts]
        job: dict[str, Json] = {
            "checkpoint": os.path.abspath(checkpoint),
            "level": self.request.level,
            "prompts": given,
            "num_tokens": _NUM_TOKENS,
            "kernels": self.request.kernels,
            "logprobs": str(self._logprobs(role)) if self.request.level == "compare" else None,
        }
        try:
            return run(
                command.python,
                command.runner,
                job,
                folder=self.folder / role,
                environment=command.environment,
                timeout_s=self.request.timeout_s,
                helpers=command.helpers,
            )
        except OSError as error:
            raise NoInterpreterError(f"can't start {command.python}: {error.strerror}") from None

    def _logprobs(self, role: str) -> Path:
        return self.folder / f"{role}.f32"

    def _diagnose(self, run: Run) -> Diagnosis | None:
        return diagnose(
            run,
            level=self.request.level,
            no_kernel=self.engine.no_kernel,
            timeout_s=self.request.timeout_s,
        )

    def _judge_tokens(self, state: RunnerState) -> None:
        for note in state.notes:
            self._find(self.request.checkpoint, "engine-tokenizer", note, severity="warning")
        if state.num_nonfinite:
            message = (
                "NaN or Inf in the log-probabilities of what was generated from "
                f"{state.num_nonfinite} of {len(state.prompts)} prompts"
            )
            self._find(self.request.checkpoint, "generate-nonfinite", message)

    def _compare(self, candidate: RunnerState, reference: Path) -> Comparison | None:
        """Return the comparison, None with a finding if there is nothing to compare."""
        other = self._run("reference", reference, prompts=candidate.prompts)
        diagnosis = self._diagnose(other)
        if diagnosis is not None:
            message = f"nothing could be compared: {diagnosis.rule}: {diagnosis.message}"
            self._find(reference, "compare-reference", message, where=diagnosis.tensor)
            return None
        try:
            if candidate.vocab is None or candidate.vocab != other.state.vocab:
                message = f"{candidate.vocab} tokens, the reference's {other.state.vocab}"
                raise CompareError("compare-vocabulary", f"the vocabulary has {message}")
            comparison = compare(
                self._logprobs("reference"),
                self._logprobs("candidate"),
                vocab=candidate.vocab,
                targets=[token for ids in candidate.prompts for token in ids[1:]],
            )
        except CompareError as error:
            is_its = error.rule == "compare-reference"
            self._find(reference if is_its else self.request.checkpoint, error.rule, str(error))
            return None
        for rule, message in violations(comparison, self.request.thresholds):
            self._find(self.request.checkpoint, rule, message)
        return comparison

    def _find(
        self,
        file: Path,
        rule: str,
        message: str,
        *,
        where: str = "",
        severity: Literal["error", "warning"] = "error",
    ) -> None:
        self.findings.append(
            Finding(file=str(file), where=where, rule=rule, message=message, severity=severity)
        )

    def _not_run(self, sentence: str) -> EngineOutcome:
        self._find(self.request.checkpoint, "engine-missing", sentence)
        return self._outcome(RunnerState(), verdict="not-run", message=sentence)

    def _failed(self, run: Run, diagnosis: Diagnosis) -> EngineOutcome:
        message = diagnosis.message
        if diagnosis.rule == "engine-missing":
            message += f"; {self.engine.install}, or name another interpreter with --python"
        self._find(
            self.request.checkpoint,
            diagnosis.rule,
            message,
            where=diagnosis.tensor,
        )
        return self._outcome(
            run.state,
            verdict=_VERDICTS.get(diagnosis.rule, "failed"),
            reached=_level(run.state),
            message=message,
        )

    def _outcome(
        self,
        state: RunnerState,
        *,
        verdict: Verdict,
        reached: Level | None = None,
        message: str = "",
        comparison: Comparison | None = None,
    ) -> EngineOutcome:
        return EngineOutcome(
            engine=self.engine.name,
            version=state.version,
            torch=state.torch,
            device=state.device,
            kernels=state.kernels,
            level=self.request.level,
            verdict=verdict,
            reached=reached,
            message=message,
            prompts=state.prompts,
            tokens=state.tokens,
            texts=state.texts,
            comparison=comparison,
            findings=self.findings,
        )


def _level(state: RunnerState) -> Level | None:
    """Return the level that a runner in this state has shown, None before the load."""
    return state.reached if state.reached in ("load", "generate") else None
