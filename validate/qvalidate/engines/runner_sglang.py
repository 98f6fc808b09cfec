"""Runs inside SGLang's interpreter: load a checkpoint, generate, give all prompt log-probabilities.

The standard library, SGLang and what SGLang brings, and the helper that is copied beside it. SGLang
works in processes of its own, which import this file again: nothing may happen on import.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvalidate.engines import runner_base as base
else:
    import runner_base as base


class Sglang:
    """SGLang's offline Engine."""

    def start(self) -> dict[str, str]:
        import sglang

        # a folder called sglang on the path also imports
        if not hasattr(sglang, "Engine"):
            raise ImportError("the module sglang found here is not the engine")
        import torch
        from sglang.srt.server_args import ServerArgs

        self.server_args: Any = ServerArgs
        self.is_cpu = not torch.cuda.is_available()
        return {
            "version": sglang.__version__,
            "torch": torch.__version__,
            "device": base.device_name(torch, is_cpu=self.is_cpu),
        }

    def load(self, job: base.Job) -> int:
        from sglang.srt.entrypoints.engine import Engine

        # a class attribute for exactly this, in 0.5.17 and in 0.5.23 (entrypoints/engine.py)
        Engine.run_scheduler_process_func = staticmethod(scheduler_process)
        wanted = {
            **self.arguments(job["checkpoint"]),
            "skip_tokenizer_init": True,
            "port": base.free_port(),
            "log_level": "error",
        }
        self.engine = Engine(**self.known(wanted))
        vocab: int = self.engine.tokenizer_manager.model_config.vocab_size
        self.ids = list(range(vocab))
        return vocab

    def kernels(self) -> list[str]:
        return []

    def answer(self, prompt: list[int], job: base.Job) -> base.Answer:
        is_compared = job["level"] == "compare"
        result = self.engine.generate(
            input_ids=prompt,
            sampling_params={
                "max_new_tokens": job["num_tokens"],
                "temperature": 0,
                "ignore_eos": True,
            },
            return_logprob=True,
            logprob_start_len=0 if is_compared else -1,
            # log_softmax over the vocabulary, read at these ids (layers/logprob_processor.py)
            token_ids_logprob=self.ids if is_compared else None,
        )
        about = result["meta_info"]
        chosen = about["output_token_logprobs"]
        return base.Answer(
            [int(token) for token in result["output_ids"]],
            all(math.isfinite(logprob) for logprob, *_ in chosen),
            positions(about.get("input_token_ids_logprobs") or []),
        )

    def serve(self, job: base.Job) -> None:
        wanted = {
            **self.arguments(job["checkpoint"]),
            "host": "127.0.0.1",
            "port": job["port"],
            "served_model_name": "checkpoint",
        }
        base.run_module("sglang.launch_server", *flags(self.known(wanted)))

    def arguments(self, checkpoint: str) -> dict[str, Any]:
        """Return what is wanted of any start: a small engine that compiles little."""
        wanted: dict[str, Any] = {
            "model_path": checkpoint,
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": True,
            "skip_server_warmup": True,
            "mem_fraction_static": 0.4,
            "max_total_tokens": 4096,
            "max_running_requests": 4,
            "context_length": 128,
            "random_seed": 0,
            "nccl_port": base.free_port(),
        }
        if self.is_cpu:
            return {**wanted, "device": "cpu", "attention_backend": "torch_native"}
        return {**wanted, "attention_backend": "triton"}

    def known(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Return what this version's ServerArgs has, of what is wanted.

        A dataclass in 0.5.17, a msgspec struct in 0.5.23.
        """
        fields = getattr(self.server_args, "__dataclass_fields__", None)
        names = set(fields if fields is not None else self.server_args.__struct_fields__)
        return {name: value for name, value in wanted.items() if name in names}


def scheduler_process(*arguments: Any, **keywords: Any) -> None:
    """Be SGLang's scheduler process, and leave its exception where it can be found.

    The scheduler only logs what went wrong, and has its parent killed.
    """
    from sglang.srt.managers import scheduler

    words = scheduler.get_exception_traceback

    def recorded() -> str:
        error = sys.exc_info()[1]
        if error is not None:
            base.write_whole(Path(base.CHILD_ERROR), base.describe(error))
        return str(words())

    scheduler.get_exception_traceback = recorded
    scheduler.run_scheduler_process(*arguments, **keywords)


def flags(wanted: dict[str, Any]) -> list[str]:
    """Return the arguments as the server's command line takes them."""
    words: list[str] = []
    for name, value in wanted.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def positions(logprobs: list[Any]) -> Iterator[base.Position]:
    """Yield the distributions; each is (log-probability, id, text) per id, the first is None."""
    for entries in logprobs[1:]:
        yield base.Position([entry[1] for entry in entries], [entry[0] for entry in entries])


if __name__ == "__main__":
    base.main(Sglang())
