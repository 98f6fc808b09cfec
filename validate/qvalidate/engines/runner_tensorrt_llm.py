"""Runs inside TensorRT-LLM's interpreter: load, generate, give all prompt log-probabilities.

The standard library, TensorRT-LLM and what it brings, and the helper that is copied beside it.
Written from its source, never run: what is cited was read in NVIDIA/TensorRT-LLM, one commit each.
TensorRT-LLM may start processes that import this file again: nothing may happen on import.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvalidate.engines import runner_base as base
else:
    import runner_base as base


class TensorrtLlm:
    """TensorRT-LLM's LLM class on the PyTorch backend, which takes unified checkpoints as is."""

    def start(self) -> dict[str, str]:
        import tensorrt_llm

        # a folder called tensorrt_llm on the path also imports
        if not hasattr(tensorrt_llm, "LLM"):
            raise ImportError("the module tensorrt_llm found here is not the engine")
        import torch

        self.module: Any = tensorrt_llm
        return {
            "version": tensorrt_llm.__version__,
            "torch": torch.__version__,
            "device": base.device_name(torch, is_cpu=not torch.cuda.is_available()),
        }

    def load(self, job: base.Job) -> int:
        from tensorrt_llm.llmapi import KvCacheConfig

        wanted = {
            "skip_tokenizer_init": True,
            "max_batch_size": 1,
            "max_seq_len": 128,
            "max_num_tokens": 256,
            # without reuse: a cached prompt token has no logits
            "kv_cache_config": KvCacheConfig(
                max_tokens=512, free_gpu_memory_fraction=0.1, enable_block_reuse=False
            ),
            "cuda_graph_config": None,
            "disable_overlap_scheduler": True,
            "enable_autotuner": False,
        }
        self.llm = self.module.LLM(model=job["checkpoint"], **known(wanted))
        self.vocab = vocabulary(Path(job["checkpoint"]))
        return self.vocab

    def kernels(self) -> list[str]:
        return []

    def answer(self, prompt: list[int], job: base.Job) -> base.Answer:
        is_compared = job["level"] == "compare"
        wanted = {
            "max_tokens": job["num_tokens"],
            # greedy in every version; temperature 0 is not (sampling_params.py @000a01de)
            "top_k": 1,
            "ignore_eos": True,
            # a tokenizer is asked for what is left out (llmapi/llm.py @00966934)
            "end_id": 0,
            "pad_id": 0,
            "detokenize": False,
            "logprobs": 1,
            # prompt_logprobs is a topk of these (executor/base_worker.py), logits are all of them
            "return_context_logits": is_compared,
        }
        fields = inspect.signature(self.module.SamplingParams).parameters
        params = self.module.SamplingParams(**{k: v for k, v in wanted.items() if k in fields})
        result = self.llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        output = result.outputs[0]
        tokens = [int(token) for token in output.token_ids]
        is_finite = all(map(math.isfinite, chosen(output.logprobs or [], tokens)))
        logits = result.context_logits if is_compared else None
        if is_compared and logits is None:
            raise RuntimeError("the engine gave no context logits, though they were asked for")
        return base.Answer(tokens, is_finite, positions(logits, self.vocab))

    def serve(self, job: base.Job) -> None:
        options = Path("serve.yaml")
        # JSON is YAML
        wanted = {"cuda_graph_config": None, "enable_autotuner": False}
        options.write_text(json.dumps(known(wanted)))
        base.run_module(
            # what the program trtllm-serve runs (commands/serve.py @00209af1)
            "tensorrt_llm.commands.serve",
            "serve",
            job["checkpoint"],
            "--host=127.0.0.1",
            f"--port={job['port']}",
            "--backend=pytorch",
            "--max_batch_size=4",
            "--max_seq_len=128",
            "--max_num_tokens=256",
            "--kv_cache_free_gpu_memory_fraction=0.1",
            f"--extra_llm_api_options={options}",
        )


def known(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what this version's LLM() takes, of what is wanted; it refuses all else."""
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    return {name: value for name, value in wanted.items() if name in TorchLlmArgs.model_fields}


def vocabulary(checkpoint: Path) -> int:
    """Return config.json's vocab_size: the LLM class has no name for it that all versions share."""
    config = json.loads((checkpoint / "config.json").read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if size is None:
        raise RuntimeError("config.json has no vocab_size")
    return int(size)


def chosen(logprobs: list[Any], tokens: list[int]) -> Iterator[float]:
    """Yield the log-probability of each token: a number, or an entry of a dict per position."""
    for entry, token in zip(logprobs, tokens, strict=True):
        found: Any = entry[token] if isinstance(entry, dict) else entry
        yield found.logprob if hasattr(found, "logprob") else found


def positions(logits: Any, vocab: int) -> Iterator[base.Position]:
    """Yield the log-softmax of every row but the last, which is of the first token generated.

    `logits` is [prompt tokens, vocabulary or more]: an engine may pad the vocabulary.
    """
    import numpy as np

    if logits is None:
        return
    ids = range(vocab)
    for row in logits.float().cpu().numpy()[:-1, :vocab].astype("f8"):
        shifted = row - row.max()
        yield base.Position(ids[: len(row)], shifted - np.log(np.exp(shifted).sum()))


if __name__ == "__main__":
    base.main(TensorrtLlm())
