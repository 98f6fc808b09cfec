"""A stand-in for vLLM: a tiny package that behaves as its checkpoint's config.json says."""

import json
import os
import select
import sys
from pathlib import Path

from qvalidate.engines import EngineOutcome, EngineRequest, get
from qvalidate.engines.outcome import Level

FAKE_VLLM = '''
import dataclasses, json, math, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.0-fake"
PYDANTIC = """1 validation error for ModelConfig
  Value error, ModelOpt currently only supports: ['FP8'] quantizations [type=value_error, \\
input_value=ArgsKwargs((), {'model': 'x'}), input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2/v/value_error"""

@dataclasses.dataclass
class EngineArgs:
    model: str
    max_logprobs: int = 20

class SamplingParams:
    flat_logprobs: bool
    def __init__(self, **values):
        self.__dict__.update(values)

class Weight:
    shape = (4, 1)

def child():
    sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", sleeper]).pid

def load_weights(name, loaded_weight):
    assert loaded_weight.shape == (4,)

class LLM:
    def __init__(self, model, max_logprobs):
        self.config = json.loads((Path(model) / "config.json").read_text())
        self.kind = self.config["kind"]
        LLM.made = True
        assert os.getcwd() == os.path.dirname(os.path.abspath(sys.argv[0]))
        self.llm_engine = SimpleNamespace(model_config=self)
        if self.kind == "noise":
            os.write(1, b"\\xff\\x00{\\"reached\\": 1}\\n" * 10000)
        if self.kind == "chatty":
            for _ in range(64):
                os.write(1, b"x" * (1 << 20))
            held = [Path(entry.path) for entry in os.scandir(".") if entry.is_file()]
            size = sum(file.stat().st_size for file in held)
            raise ValueError(f"{size >> 20} MiB of files")
        if self.kind == "refused":
            raise ValueError(PYDANTIC)
        if self.kind == "scale-rank":
            load_weights("model.layers.0.o_proj.weight_scale", Weight())
        if self.kind == "no-kernel":
            raise ValueError("Failed to find a kernel that can implement the layer.")
        if self.kind == "child-failed":
            print("(EngineCore pid=7) ERROR 11-21 11:03:12 [core.py:133] KeyError: 'w2_bias'")
            print("trailing line")
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        if self.kind == "out-of-memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.kind == "exit":
            print("RuntimeError: last words")
            os._exit(3)
        if self.kind == "signal":
            os.kill(os.getpid(), signal.SIGABRT)
        if self.kind == "done":
            os._exit(0)
        if self.kind == "leave":
            sys.exit("no")
        if self.kind in ("hang", "orphan"):
            pid = child()
            (Path(model) / "pid").write_text(str(pid))
        if self.kind == "hang":
            time.sleep(600)

    def get_vocab_size(self):
        return self.config["vocab_size"]

    def generate(self, prompts, params, use_tqdm):
        if self.kind == "crash-late":
            raise RuntimeError("expected scalar type Float but found BFloat16")
        ids = prompts[0]["prompt_token_ids"]
        vocab = self.config["vocab_size"]
        row = [math.sin(1 + i) * self.config["factor"] for i in range(vocab)]
        norm = math.log(sum(map(math.exp, row)))
        row = [math.nan if self.kind == "nan" else value - norm for value in row]
        count = len(ids) - 1
        width = vocab - 1 if self.kind == "short" else vocab
        logprobs = Flat(count, list(range(width)), row[:width]) if params.prompt_logprobs else None
        output = SimpleNamespace(token_ids=[1] * params.max_tokens, cumulative_logprob=row[1])
        return [SimpleNamespace(outputs=[output], prompt_logprobs=logprobs)]

class Flat:
    def __init__(self, count, ids, row):
        self.start_indices = [0] + [len(ids) * i for i in range(count)]
        self.end_indices = [0] + [len(ids) * (i + 1) for i in range(count)]
        self.token_ids = ids * count
        self.logprobs = row * count
    def __len__(self):
        return len(self.start_indices)
'''


def checkpoint(folder: Path, *, kind: str = "good", factor: float = 1.0, vocab: int = 11) -> Path:
    folder.mkdir()
    config = {"kind": kind, "factor": factor, "vocab_size": vocab}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(
    candidate: Path,
    *,
    level: Level = "generate",
    reference: Path | None = None,
    timeout_s: float = 60.0,
) -> EngineOutcome:
    request = EngineRequest(
        checkpoint=candidate,
        reference=reference,
        python=sys.executable,
        level=level,
        timeout_s=timeout_s,
    )
    return get("vllm").run(request)


def is_gone(pid: int) -> bool:
    """Whether the process ends within ten seconds; one that is dead but not reaped is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 10)[0])
    finally:
        os.close(handle)


def install(folder: Path) -> None:
    """Write the packages `vllm` and `torch` below `folder`."""
    for package, files in {
        "vllm": {
            "__init__": FAKE_VLLM,
            "platforms": "class current_platform:\n    device_type = 'cpu'\n",
        },
        "torch": {"__init__": "__version__ = '0.0-fake'\n"},
    }.items():
        package_folder = folder / package
        package_folder.mkdir(parents=True)
        for name, text in files.items():
            (package_folder / f"{name}.py").write_text(text)
