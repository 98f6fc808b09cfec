"""A stand-in for SGLang 0.5.17: a scheduler in a process of its own, as config.json says."""

import json
import sys
from pathlib import Path

from qvalidate.engines import EngineOutcome, EngineRequest, get
from qvalidate.engines.outcome import Level

PACKAGE = """
from sglang.srt.entrypoints.engine import Engine
__version__ = "0.0-fake"
"""

SERVER_ARGS = """
import dataclasses

@dataclasses.dataclass
class ServerArgs:
    model_path: str
    skip_tokenizer_init: bool = False
    context_length: int = 0
    nccl_port: int = 0
"""

# a record of another kind, with one argument less
SERVER_STRUCT = """
class ServerArgs:
    __struct_fields__ = ("model_path", "skip_tokenizer_init", "context_length")
    def __init__(self, **values):
        assert set(values) <= set(self.__struct_fields__), values
        self.__dict__.update(values)
"""

SCHEDULER = """
import json, os, signal
from pathlib import Path
from sglang.utils import get_exception_traceback

class Weight:
    shape = (4, 1)

def load_weights(name, loaded_weight):
    assert loaded_weight.shape == (4,)

def work(server_args, pipe):
    kind = json.loads((Path(server_args.model_path) / "config.json").read_text())["kind"]
    if kind == "scale-rank":
        load_weights("model.layers.0.o_proj.weight_scale", Weight())
    if kind == "refused":
        raise ValueError("ModelOptFp8Config only supports static FP8 quantization in SGLang.")
    if kind == "no-kernel":
        raise ValueError("The quantization method is not supported for the current GPU.")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    pipe.send("ready")
    # ends with an exception of its own when the parent is gone
    while pipe.recv():
        if kind == "crash-late":
            raise RuntimeError("expected scalar type Float but found BFloat16")

def run_scheduler_process(server_args, port, pipe):
    parent = os.getppid()
    try:
        work(server_args, pipe)
    except Exception:
        print("Scheduler hit an exception:", get_exception_traceback())
        os.kill(parent, signal.SIGQUIT)
"""

ENGINE = """
import json, math, multiprocessing, os, signal
from pathlib import Path
from types import SimpleNamespace
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.server_args import ServerArgs

def die(number, frame):
    os.kill(os.getpid(), signal.SIGKILL)

class Engine:
    run_scheduler_process_func = staticmethod(run_scheduler_process)

    def __init__(self, **values):
        args = ServerArgs(**values)
        assert args.skip_tokenizer_init and args.context_length == 128
        signal.signal(signal.SIGQUIT, die)
        self.config = json.loads((Path(args.model_path) / "config.json").read_text())
        vocab = SimpleNamespace(vocab_size=self.config["vocab_size"])
        self.tokenizer_manager = SimpleNamespace(model_config=vocab)
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        process = context.Process(target=self.run_scheduler_process_func, args=(args, 1, end))
        process.daemon = True
        process.start()
        end.close()
        try:
            self.pipe.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f"Rank 0 scheduler died during initialization (exit code: {process.exitcode})."
            )

    def generate(self, *, input_ids, sampling_params, return_logprob, logprob_start_len,
                 token_ids_logprob):
        self.pipe.send(input_ids)
        if self.config["kind"] == "crash-late":
            signal.pause()
        vocab, kind = self.config["vocab_size"], self.config["kind"]
        row = [math.sin(1 + i) * self.config["factor"] for i in range(vocab)]
        norm = math.log(sum(map(math.exp, row)))
        row = [math.nan if kind == "nan" else value - norm for value in row]
        count = sampling_params["max_new_tokens"]
        about = {"output_token_logprobs": [(row[1], 1, None)] * count}
        if token_ids_logprob is not None:
            assert logprob_start_len == 0
            ids = token_ids_logprob[:-1] if kind == "short" else token_ids_logprob
            entries = [(row[i], i, None) for i in ids]
            about["input_token_ids_logprobs"] = [None] + [entries] * (len(input_ids) - 1)
        return {"output_ids": [1] * count, "meta_info": about}
"""

UTILS = """
import traceback

def get_exception_traceback():
    return traceback.format_exc()
"""


def checkpoint(folder: Path, *, kind: str = "good", factor: float = 1.0) -> Path:
    folder.mkdir()
    config = {"kind": kind, "factor": factor, "vocab_size": 11}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(
    candidate: Path, *, level: Level = "generate", reference: Path | None = None
) -> EngineOutcome:
    request = EngineRequest(
        checkpoint=candidate, reference=reference, python=sys.executable, level=level, timeout_s=60
    )
    return get("sglang").run(request)


def install(folder: Path, *, server_args: str = SERVER_ARGS) -> None:
    """Write the packages `sglang` and `torch` below `folder`."""
    no_gpu = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    for name, text in {
        "torch/__init__": f"__version__ = '0.0-fake'\n{no_gpu}",
        "sglang/__init__": PACKAGE,
        "sglang/utils": UTILS,
        "sglang/srt/__init__": "",
        "sglang/srt/server_args": server_args,
        "sglang/srt/entrypoints/__init__": "",
        "sglang/srt/entrypoints/engine": ENGINE,
        "sglang/srt/managers/__init__": "",
        "sglang/srt/managers/scheduler": SCHEDULER,
    }.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
