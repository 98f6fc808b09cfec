"""A stand-in for TensorRT-LLM's LLM class, which returns raw logits of a padded vocabulary."""

import json
import sys
from pathlib import Path

from qvalidate.engines import EngineOutcome, EngineRequest, get
from qvalidate.engines.outcome import Level

PACKAGE = """
import dataclasses, json, math
from pathlib import Path
from types import SimpleNamespace
import numpy as np

__version__ = "0.0-fake"

@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    end_id: int = None
    pad_id: int = None
    max_tokens: int = 32
    top_k: int = None
    logprobs: int = None
    return_context_logits: bool = False
    ignore_eos: bool = False

class Logits:
    def __init__(self, values):
        self.values = values
    def float(self):
        return self
    def cpu(self):
        return self
    def numpy(self):
        return np.asarray(self.values, "f4")

class LLM:
    def __init__(self, *, model, skip_tokenizer_init, kv_cache_config):
        assert skip_tokenizer_init
        assert not kv_cache_config.enable_block_reuse
        self.config = json.loads((Path(model) / "config.json").read_text())
        if self.config["kind"] == "refused":
            raise ValueError("QuantConfig has no field quantized_layers")
        if self.config["kind"] == "no-kernel":
            raise NotImplementedError("NVFP4 is not supported on SM90")

    def generate(self, inputs, params, use_tqdm):
        kind, factor, vocab = (self.config[key] for key in ("kind", "factor", "vocab_size"))
        assert params.end_id is not None and params.ignore_eos and params.top_k == 1
        count = len(inputs["prompt_token_ids"])
        # not normalized, and two columns wider than the vocabulary
        row = [factor * math.sin(1 + i) + 5 for i in range(vocab)] + [99.0, 99.0]
        row = [math.nan] * len(row) if kind == "nan" else row
        chosen = SimpleNamespace(logprob=row[1] - 9, rank=1)
        entries = [row[1] - 9 if kind == "numbers" else {1: chosen, 2: None}] * params.max_tokens
        output = SimpleNamespace(token_ids=[1] * params.max_tokens, logprobs=entries)
        is_given = params.return_context_logits and kind != "no-logits"
        logits = Logits([row] * count) if is_given else None
        return SimpleNamespace(outputs=[output], context_logits=logits)
"""

LLM_ARGS = """
class TorchLlmArgs:
    model_fields = {"model": None, "skip_tokenizer_init": None, "kv_cache_config": None}
"""

LLMAPI = """
class KvCacheConfig:
    def __init__(self, **values):
        self.__dict__.update(values)
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
    return get("tensorrt-llm").run(request)


def install(folder: Path) -> None:
    """Write the packages `tensorrt_llm` and `torch` below `folder`."""
    no_gpu = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    for name, text in {
        "torch/__init__": f"__version__ = '0.0-fake'\n{no_gpu}",
        "tensorrt_llm/__init__": PACKAGE,
        "tensorrt_llm/llmapi/__init__": LLMAPI,
        "tensorrt_llm/llmapi/llm_args": LLM_ARGS,
    }.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
