"""Checkpoints that are spelt in another dialect than ModelOpt's: named here, and not judged."""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule


@rule(
    "other-dialect",
    severity="warning",
    summary="the checkpoint is in a dialect that no rule here knows",
    text="""The rules, and the comparison of weights, know ModelOpt's names and documents. What
    config.json calls compressed-tensors, fp8, awq and so on is spelt differently, and engines read
    it by other code. Files, and how layers are divided over GPUs, are looked at all the same; for
    the rest ask an engine: `--engine vllm --reference SOURCE` loads it and compares it with its
    source, whatever its dialect.""",
    effects={"vllm": "unknown", "sglang": "unknown", "tensorrt-llm": "unknown"},
    evidence=("transformers 5.14 quantizers/auto.py AUTO_QUANTIZATION_CONFIG_MAPPING",),
)
def other_dialect(context: Context) -> Iterator[Spot]:
    if context.obeyed is not None and context.dialect is not None:
        message = f"{context.dialect} is not ModelOpt's dialect; no rule here can judge it"
        yield Spot(context.obeyed.file, context.obeyed.where("quant_method"), message)
