"""Dequantizing: every codec by every implementation gives the oracle's numbers."""

import numpy as np
import pytest
import torch

from . import oracle, weights

SCALES = np.array(
    [1.0, 0.00123, 3e-41, 2.0**-127, 2.0**-140, 1e30, 3e38, 300.0, np.inf, np.nan], np.float32
)
BYTES = np.arange(256, dtype=np.uint8)


def stacked(parts):
    """A batch of tensors, e4m3 as e4m3."""
    return {
        suffix: torch.stack([part[suffix].view(torch.uint8) for part in parts]).view(tensor.dtype)
        if tensor.dtype == torch.float8_e4m3fn
        else torch.stack([part[suffix] for part in parts])
        for suffix, tensor in parts[0].items()
    }


def every_byte(n):
    """All 256 bytes in each of n rows."""
    return np.tile(BYTES, (n, 1))


def every_code_and_scale(name):
    """Matrices whose tensors hold every byte of codes under every scale of a table.

    The table has all 256 bytes where scales are bytes. A matrix for each global scale.
    """
    form = oracle.FORMATS[name]
    k = 512 if form.element == "e2m1" else 256
    if form.scale == "weight":
        matrices = [{form.suffix: np.array(scale)} for scale in SCALES]
        return [{"weight": every_byte(2), **matrix} for matrix in matrices]
    if form.scale == "square":
        codes = np.zeros((128, 128 * len(SCALES)), np.uint8)
        codes[:2] = np.tile(BYTES.reshape(2, 128), len(SCALES))
        return [{"weight": codes, "weight_scale": SCALES.reshape(1, 1, -1, 1)}]
    if form.scale == "row":
        codes = every_byte(len(SCALES))
        codes = codes.view(np.int8) if form.element == "int8" else codes
        return [{"weight": codes, "weight_scale": SCALES}]
    if form.scale == "f32":
        # the two rows of a byte have scales of their own
        columns = np.stack([SCALES, SCALES[::-1]], 1)
        return [{"weight": every_byte(len(SCALES)), "weight_scale": columns.repeat(2, 0)}]
    scale = BYTES[:, None].repeat(k // form.group, 1)
    if form.scale == "e8m0":
        return [{"weight": every_byte(256), "weight_scale": scale}]
    return [
        {"weight": every_byte(256), "weight_scale": scale, form.suffix: np.array(whole)}
        for whole in (SCALES if name == "NVFP4" else SCALES[1:3])
    ]


def typed(codec, arrays):
    """As tensors of the dtypes that the codec has."""
    tensors = oracle.to_torch(arrays)
    for suffix, (dtype, _) in codec.shapes(0, 0).items():
        tensors[suffix] = tensors[suffix].view(dtype)
    return tensors


def test_every_code_under_every_scale(codec, dequantize, dtype, same_bits):
    """Scales from subnormal to infinite; all e4m3 and e8m0 scales, NaN among them."""
    matrices = every_code_and_scale(codec.name)

    actual = dequantize(stacked([typed(codec, matrix) for matrix in matrices]), dtype=dtype)

    expected = [oracle.dequantize(codec.name, matrix, dtype) for matrix in matrices]
    same_bits(actual, torch.stack(expected))


def test_dequantize_any_shape(codec, dequantize, shaped_weight, same_bits):
    arrays = oracle.quantize(codec.name, oracle.to_numpy(shaped_weight))
    expected = oracle.dequantize(codec.name, arrays, shaped_weight.dtype)

    same_bits(dequantize(oracle.to_torch(arrays), dtype=shaped_weight.dtype), expected)


@pytest.mark.parametrize("shape", [(3, 128, 256), (3, 130, 136), (1, 5, 130)])
def test_a_batch_is_its_matrices(codec, dequantize, same_bits, shape):
    w = weights.normal(weights.fitting(codec, shape), torch.bfloat16)
    w *= torch.tensor([1.0, 0.0, -300.0])[: len(w), None, None]
    parts = [oracle.quantize(codec.name, oracle.to_numpy(matrix)) for matrix in w]
    expected = [oracle.dequantize(codec.name, part, torch.float16) for part in parts]

    actual = dequantize(stacked([oracle.to_torch(part) for part in parts]), dtype=torch.float16)

    same_bits(actual, torch.stack(expected))


def as_bytes(tensor):
    """e4m3 as bytes, which torch can join."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def spread(tensor):
    """The same numbers, a stride of 2 in the last dimension and in none the usual one."""
    raw = as_bytes(tensor)
    return torch.stack([raw, raw], -1)[..., 0].view(tensor.dtype)


def part(tensor):
    """The same numbers within a tensor with more columns."""
    raw = as_bytes(tensor)
    return torch.cat([raw, raw], -1)[..., : raw.shape[-1]].view(tensor.dtype)


def column_major(tensor):
    """The same numbers, the first dimension innermost."""
    return as_bytes(tensor).transpose(0, -1).contiguous().transpose(0, -1).view(tensor.dtype)


@pytest.mark.parametrize("laid_out", [spread, part, column_major])
@pytest.mark.parametrize("shape", [(20, 130), (1, 130), (20, 1), (2, 20, 130)], ids=str)
def test_tensors_of_any_strides(codec, dequantize, same_bits, laid_out, shape):
    w = weights.normal(weights.fitting(codec, shape), torch.bfloat16)
    tensors = codec.quantize_torch(w)

    actual = dequantize(
        {suffix: laid_out(tensor) if tensor.ndim else tensor for suffix, tensor in tensors.items()}
    )

    same_bits(actual, codec.dequantize_torch(tensors))


def test_every_byte_is_written_of_every_dtype(codec, dequantize, dtype, same_bits, poisoned_memory):
    arrays = oracle.quantize(codec.name, oracle.to_numpy(weights.make("normal", codec, dtype)))

    actual = dequantize(oracle.to_torch(arrays), dtype=dtype)

    same_bits(actual, oracle.dequantize(codec.name, arrays, dtype))
