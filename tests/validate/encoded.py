"""Checkpoints with real numbers, made by the kernels alone: nothing here is the converter's."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from checkpoints import Tensor, bytes_of, draft, f32

from qkernels import kernels_for
from qschema.architectures import fused_siblings
from qschema.formats import Format
from qschema.safetensors import Stored

Smooth = Callable[[str, torch.Tensor], torch.Tensor]
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def converted(model: str, algo: str | Mapping[str, str], out: Path) -> Path:
    """Write the fixture `model` in the format `algo` and return where; input scales are 0.25."""
    return draft(model, algo, encode=encode).write(out)


def encode(
    declared: Format,
    stored: Stored,
    tensors: Mapping[str, Stored],
    smooth: Smooth = lambda module, w_NK: w_NK,
) -> Mapping[str, Tensor]:
    """Return the quantized tensors of one weight; siblings share the scale of the largest.

    smooth: module, weight -> what is quantized of it.
    """
    module = stored.name.removesuffix(".weight")
    codec, w_NK = kernels_for(declared.codec), smooth(module, weight(stored))
    scale = None
    if codec.global_scale is not None:
        siblings = [
            smooth(name, weight(tensors[f"{name}.weight"]))
            for name in fused_siblings(module)
            if f"{name}.weight" in tensors
        ]
        largest = max(siblings, key=lambda sibling: float(codec.amax_torch(sibling)))
        scale = codec.quantize(largest)[codec.global_scale.suffix]
    made = codec.quantize(w_NK, global_scale=scale)
    outputs = declared.outputs(rows=w_NK.shape[0], columns=w_NK.shape[1])
    return {
        suffix: (dtype, shape, raw(made[suffix]) if suffix in made else f32(0.25))
        for suffix, (dtype, shape) in outputs.items()
    }


def weight(stored: Stored) -> torch.Tensor:
    """Return a source tensor."""
    data = bytearray(bytes_of(stored))
    return torch.frombuffer(data, dtype=_DTYPES[stored.dtype]).view(stored.shape)


def raw(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor."""
    found: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return found
