"""Whether an engine's OpenAI-compatible server answers for a checkpoint; nothing of it is left.

The server is started by the engine's runner, in a process group of its own and on a free port of
127.0.0.1; it is asked, then ended: SIGTERM first, SIGKILL after a few seconds.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from qschema.strict import DocumentError, Finding, Json, Strict, load_json
from qvalidate.engines import get
from qvalidate.engines.adapter import RunnerEngine
from qvalidate.engines.diagnosis import Diagnosis, diagnose
from qvalidate.engines.interpreter import NoInterpreterError
from qvalidate.engines.openai_api import ApiError, Server
from qvalidate.engines.outcome import Verdict
from qvalidate.engines.process import Run, RunnerProcess, RunnerState, sigterm_as_exit, started
from qvalidate.engines.runner_base import free_port

_POLL_S = 0.25
_HEALTH_S = 5.0
_REQUEST_S = 60.0


class ServeRequest(Strict):
    """One checkpoint for one engine's server."""

    engine: str
    checkpoint: Path
    # the engine's interpreter; None is the one that runs this
    python: str | None = None
    # for the start and all answers together
    timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)


class ServeOutcome(Strict):
    """What came of it: `passed` if the server got ready and no finding is an error.

    `no-kernel` says something about the machine, `not-run` about the installation.
    """

    engine: str
    version: str | None = None
    device: str | None = None
    verdict: Verdict
    # seconds from the start to the first answer of /health
    ready_s: float | None = None
    # the answers' texts
    completion: str | None = None
    chat: str | None = None
    # why chat was not asked; empty if it was
    chat_skipped: str = ""
    wall_s: float = 0.0
    findings: list[Finding] = Field(default_factory=list)


def serve_check(request: ServeRequest) -> ServeOutcome:
    """Return what the engine's server did with the checkpoint; trouble is never an exception.

    Findings are of the rules `serve-not-ready`, `serve-models`, `serve-completions`, `serve-chat`,
    and `engine-missing` where there is no engine. Raises UnknownEngineError.
    """
    engine = get(request.engine)
    if not isinstance(engine, RunnerEngine):
        raise TypeError(f"{request.engine} has no runner")
    begun = time.monotonic()
    with (
        sigterm_as_exit(),
        tempfile.TemporaryDirectory(prefix=f"qvalidate-serve-{engine.name}-") as folder,
    ):
        outcome = _Check(engine, request, Path(folder)).outcome()
    return outcome.model_copy(update={"wall_s": round(time.monotonic() - begun, 2)})


class _Check:
    """One check under way."""

    def __init__(self, engine: RunnerEngine, request: ServeRequest, folder: Path) -> None:
        self.engine = engine
        self.request = request
        self.folder = folder
        self.deadline = time.monotonic() + request.timeout_s
        self.findings: list[Finding] = []
        self.ready_s: float | None = None
        self.completion: str | None = None
        self.chat: str | None = None
        self.chat_skipped = _no_chat(request.checkpoint)

    def outcome(self) -> ServeOutcome:
        port = free_port()
        job: dict[str, Json] = {
            "checkpoint": os.path.abspath(self.request.checkpoint),
            "level": "serve",
            "port": port,
        }
        begun = time.monotonic()
        has_ended = False
        try:
            command = self.engine.command(self.request.python)
            with started(command, job, folder=self.folder / "serve") as runner:
                is_ready = self._wait(runner, Server(port))
                if is_ready:
                    self.ready_s = round(time.monotonic() - begun, 2)
                    self._ask(Server(port))
                    has_ended = bool(self.findings) and runner.has_ended(within_s=_POLL_S)
        except NoInterpreterError as error:
            return self._not_run(str(error))
        except OSError as error:
            return self._not_run(f"can't start {command.python}: {error.strerror}")
        run = runner.outcome(timed_out=not is_ready and self._left_s() <= 0)
        if not is_ready:
            return self._not_ready(run)
        if has_ended:
            self._add_last_words(run)
        return self._result("failed" if self.findings else "passed", run.state)

    def _not_ready(self, run: Run) -> ServeOutcome:
        diagnosis = self._diagnose(run)
        if diagnosis.rule == "engine-missing":
            return self._not_run(f"{diagnosis.message}; {self.engine.install}")
        self._find("serve-not-ready", diagnosis.message, where=diagnosis.tensor)
        is_machine = diagnosis.rule == "engine-no-kernel"
        return self._result("no-kernel" if is_machine else "failed", run.state)

    def _add_last_words(self, run: Run) -> None:
        """Say in the first finding that the server then ended, and why."""
        first = self.findings[0]
        loaded = replace(run, state=run.state.model_copy(update={"reached": "load"}))
        message = f"{first.message}; then the server ended: {self._diagnose(loaded).message}"
        self.findings[0] = first.model_copy(update={"message": message})

    def _diagnose(self, run: Run) -> Diagnosis:
        found = diagnose(
            run, level="generate", no_kernel=self.engine.no_kernel, timeout_s=self.request.timeout_s
        )
        # None is a run that generated: a server's never says so
        return found or Diagnosis("engine-crashed", "the server ended")

    def _wait(self, runner: RunnerProcess, server: Server) -> bool:
        """Return whether the server got ready before it ended or the time was over."""
        while self._left_s() > 0:
            if server.is_ready(timeout_s=min(_HEALTH_S, self._left_s())):
                return True
            if runner.has_ended(within_s=min(_POLL_S, max(self._left_s(), 0.0))):
                return False
        return False

    def _ask(self, server: Server) -> None:
        model = ""
        with self._checked("serve-models"):
            model = server.model(timeout_s=self._request_s())
        if not model:
            return
        with self._checked("serve-completions"):
            self.completion = server.complete(model, timeout_s=self._request_s())
        if not self.chat_skipped:
            with self._checked("serve-chat"):
                self.chat = server.chat(model, timeout_s=self._request_s())

    @contextlib.contextmanager
    def _checked(
        self, rule: Literal["serve-models", "serve-completions", "serve-chat"]
    ) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            self._find(rule, str(error))

    def _left_s(self) -> float:
        return self.deadline - time.monotonic()

    def _request_s(self) -> float:
        # a request that begins late still gets a moment
        return max(1.0, min(_REQUEST_S, self._left_s()))

    def _find(self, rule: str, message: str, *, where: str = "") -> None:
        file = str(self.request.checkpoint)
        self.findings.append(Finding(file=file, where=where, rule=rule, message=message))

    def _not_run(self, sentence: str) -> ServeOutcome:
        self._find("engine-missing", sentence)
        return self._result("not-run", RunnerState())

    def _result(self, verdict: Verdict, state: RunnerState) -> ServeOutcome:
        return ServeOutcome(
            engine=self.engine.name,
            version=state.version,
            device=state.device,
            verdict=verdict,
            ready_s=self.ready_s,
            completion=self.completion,
            chat=self.chat,
            chat_skipped=self.chat_skipped,
            findings=self.findings,
        )


def _no_chat(checkpoint: Path) -> str:
    """Return why the checkpoint can't chat: no template where engines look for one; or nothing."""
    if any((checkpoint / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return ""
    try:
        config = load_json(checkpoint / "tokenizer_config.json")
    except (DocumentError, OSError):
        config = None
    if isinstance(config, dict) and config.get("chat_template"):
        return ""
    return "the checkpoint has no chat template"
