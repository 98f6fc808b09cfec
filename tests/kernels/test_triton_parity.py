"""The Triton kernels against the torch references, where sizes and addresses differ.

Every kind of weight, both against the oracle: test_codecs.py, test_dequantize.py.
"""

import numpy as np
import pytest
import torch

from . import weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """Numpy, of Triton's interpreter, warns of overflow."""
    with np.errstate(all="ignore"):
        yield


def check(codec, w, same_bits, same_tensors):
    """Quantizes w and dequantizes the result to the dtype of w, both ways."""
    w = w.to(DEVICE)
    expected = codec.quantize_torch(w)

    actual = codec.quantize_triton(w)

    same_tensors(actual, expected)
    decoded = codec.dequantize_triton(expected, dtype=w.dtype)
    same_bits(decoded, codec.dequantize_torch(expected, dtype=w.dtype))


# 128 rows end with a block of 128 x 128 and one launch does all; 130 rows end within one
@pytest.mark.parametrize("shape", [(3, 128, 256), (2, 130, 160), (4, 2, 128)])
@pytest.mark.parametrize("dtype", ["bf16", "f32"], indirect=True)
def test_batches(codec, dtype, shape, same_bits, same_tensors):
    w = weights.normal(weights.fitting(codec, shape), dtype)
    w[1:2] = 0.0
    w[2:3, 0, 0] = torch.nan

    check(codec, w, same_bits, same_tensors)


def test_weights_and_codes_at_odd_addresses(codec, dtype, same_bits, same_tensors):
    """Contiguous, but not where a 4-byte word may begin."""
    shape = weights.fitting(codec, (6, 130))
    whole = torch.zeros(shape[0] * shape[1] + 1, dtype=dtype, device=DEVICE)
    w = whole[1:].view(shape).copy_(weights.normal(shape, dtype))
    expected = codec.quantize_torch(w)
    moved = {}
    for name, tensor in expected.items():
        raw = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:]
        moved[name] = raw.view(tensor.shape).copy_(tensor)

    check(codec, w, same_bits, same_tensors)
    same_bits(codec.dequantize_triton(moved), codec.dequantize_torch(expected))
