"""What the runners share: the job, the report, the prompts, the words of an exception.

Runs inside an engine's interpreter, copied beside the runner: the standard library and numpy
(Python 3.10+), nothing of qvalidate. The job is one JSON line on stdin, which then stays open for
as long as the result is wanted:

    checkpoint, level      what to do: load, generate, compare or serve
    prompts                token ids, or null to take fixed ones
    num_tokens             greedy tokens per prompt
    kernels                native, or reference where the runner has a stand-in for missing ones
    logprobs               for compare: file to write, little-endian float32 [positions, vocabulary]
    port                   for serve: where on 127.0.0.1
    state                  file to report to, replaced as a whole after each stage
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import faulthandler
import json
import os
import re
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps until the sun comes up.",
    "In 1969, two people walked on the Moon while a third one waited in orbit around it.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Question: what is the capital of France? Answer: the capital of France is Paris.",
    "She bought 12 apples for $3.50, gave away five of them, and kept the other seven.",
    "Water boils at 100 degrees Celsius at sea level, but at a lower temperature on a mountain.",
)
MAX_PROMPT = 32
# an engine's own process leaves its exception here, beside the state
CHILD_ERROR = "child_error.json"

Job = dict[str, Any]


class Position(NamedTuple):
    """The distribution after one prompt token: ids in any order, and their log-probabilities."""

    ids: Sequence[int]
    logprobs: Sequence[float]


class Answer(NamedTuple):
    """What an engine made of one prompt."""

    tokens: list[int]
    # no NaN or Inf among the log-probabilities of `tokens`
    is_finite: bool
    # one for each prompt token but the first, which nothing predicts; empty unless compared
    positions: Iterable[Position]


class Session(Protocol):
    """One engine at work, in the order in which the methods are called."""

    def start(self) -> dict[str, str]:
        """Import the engine; return version, torch and device."""

    def load(self, job: Job) -> int:
        """Load the checkpoint; return the size of the vocabulary."""

    def kernels(self) -> list[str]:
        """Return the operations that a stand-in carries out in the engine's place."""

    def answer(self, prompt: list[int], job: Job) -> Answer:
        """Return the greedy continuation, and the prompt's distributions if level is compare."""

    def serve(self, job: Job) -> None:
        """Be the engine's OpenAI server on the job's port; returns when the server ends."""


class State:
    """The report: a dict in a file that is whole at any instant."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.values: dict[str, Any] = {"reached": "start"}

    def update(self, **values: object) -> None:
        self.values.update(values)
        write_whole(self.file, self.values)


def write_whole(file: Path, values: dict[str, Any]) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(values))
    os.replace(new, file)


def die_with_parent() -> None:
    """End the whole process group when stdin ends, that is when the parent is gone."""
    while os.read(0, 1 << 16):
        pass
    os.killpg(0, signal.SIGKILL)


def device_name(torch: Any, *, is_cpu: bool) -> str:
    if not is_cpu:
        return str(torch.cuda.get_device_name(0))
    name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"CPU: {name[1]}" if name else "CPU"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_module(module: str, *arguments: str) -> None:
    """Do what `python -m module` does, in this process, whose stdin ends with the parent."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def open_tokenizer(checkpoint: str, notes: list[str]) -> Any:
    file = Path(checkpoint) / "tokenizer.json"
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file)) if file.is_file() else None
    # tokenizers raises bare Exception
    except Exception as error:
        notes.append(f"tokenizer.json can't be used: {error}")
        return None


def fixed_prompts(tokenizer: Any, vocab: int, notes: list[str]) -> list[list[int]]:
    """Return token ids of the sentences, else of a fixed linear congruential generator."""
    if tokenizer is not None:
        prompts = [tokenizer.encode(text).ids[:MAX_PROMPT] for text in SENTENCES]
        largest = max(max(ids, default=0) for ids in prompts)
        if largest < vocab and min(map(len, prompts)) > 1:
            return prompts
        notes.append(f"tokenizer.json gives ids up to {largest}, the vocabulary has {vocab}")
    state, ids = 1, []
    for _ in range(24 * len(SENTENCES)):
        state = (1103515245 * state + 12345) % (1 << 31)
        ids.append((state >> 8) % vocab)
    return [ids[start : start + 24] for start in range(0, len(ids), 24)]


def rows(positions: Iterable[Position], vocab: int) -> Iterator[bytes]:
    """Yield each position's float32 [vocab] row; anything but the whole vocabulary is an error."""
    import numpy as np

    for position in positions:
        num_found = len(set(position.ids))
        if num_found != vocab:
            raise RuntimeError(f"the engine gave {num_found} of {vocab} log-probabilities")
        row = np.empty(vocab, "<f4")
        row[position.ids] = position.logprobs
        yield row.tobytes()


def describe(error: BaseException) -> dict[str, Any]:
    """Return the exception, its causes, its place, and what was being loaded."""
    causes: list[str] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(causes) < 8:
        causes.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    last = traceback.extract_tb(error.__traceback__)[-1]
    return {
        "type": type(error).__name__,
        "text": str(error),
        "place": f"{Path(last.filename).name}:{last.lineno} in {last.name}: {last.line}",
        "causes": causes,
        **loading(error),
    }


def loading(error: BaseException) -> dict[str, str]:
    """Return the tensor and the shapes that the engine's loader had in hand, from its frames.

    The names are those of vLLM's loaders, which SGLang's were made from.
    """
    path: list[str] = []
    name, found, expected = "", "", ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values: dict[str, Any] = frame.f_locals
        base = values.get("base_prefix")
        if base == "":
            # a loader inside a loader counts from its own root
            path.append("")
        if isinstance(base, str) and path:
            path[-1] = values.get("prefix") or base
        shape = getattr(values.get("loaded_weight"), "shape", None)
        if shape is not None:
            found = f"{list(shape)}"
            leaf = values.get("name")
            parts = [*path, leaf] if isinstance(leaf, str) else path
            name = values.get("qual_name") or name or ".".join(filter(None, parts))
            into = getattr(values.get("param_data", values.get("param")), "shape", None)
            expected = expected if into is None else f" into {list(into)}"
    return {"tensor": name, "shapes": found + expected}


def run(session: Session, job: Job, state: State) -> None:
    state.update(**{"reached": "import", **session.start()})
    if job["level"] == "serve":
        session.serve(job)
        return
    vocab = session.load(job)
    state.update(reached="load", vocab=vocab, kernels=session.kernels())
    if job["level"] == "load":
        return
    notes: list[str] = []
    tokenizer = open_tokenizer(job["checkpoint"], notes)
    prompts = job["prompts"] or fixed_prompts(tokenizer, vocab, notes)
    tokens, num_nonfinite = list[list[int]](), 0
    with open(job["logprobs"] or os.devnull, "wb") as file:
        for prompt in prompts:
            answer = session.answer(prompt, job)
            tokens.append(answer.tokens)
            num_nonfinite += not answer.is_finite
            file.writelines(rows(answer.positions, vocab))
    state.update(
        reached="generate",
        kernels=session.kernels(),
        prompts=prompts,
        tokens=tokens,
        texts=None if tokenizer is None else [tokenizer.decode(ids) for ids in tokens],
        num_nonfinite=num_nonfinite,
        notes=notes,
    )


def main(session: Session) -> None:
    faulthandler.enable()
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=die_with_parent, daemon=True).start()
    state = State(job["state"])
    is_clean = True
    try:
        run(session, job, state)
    # SystemExit too: an engine that leaves by itself has failed
    except BaseException as error:
        traceback.print_exc()
        # an engine that lost its own process says only that
        if not Path(CHILD_ERROR).exists():
            state.update(error=describe(error))
        is_clean = False
    # past the destructors: some engines hang or crash there, after all is said
    sys.stdout.flush()
    os._exit(0 if is_clean else 1)
