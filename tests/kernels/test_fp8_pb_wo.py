"""FP8_PB_WO: the same tables for every implementation, ml_dtypes as the oracle."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qkernels import fp8_pb_wo as kernels
from qkernels.errors import KernelError


@pytest.fixture
def quantize(implementation, device):
    function = getattr(kernels, f"quantize_{implementation}")
    return lambda w: function(w.to(device))


@pytest.fixture
def dequantize(implementation, device):
    function = getattr(kernels, f"dequantize_{implementation}")

    def run(tensors, **kwargs):
        return function({name: tensor.to(device) for name, tensor in tensors.items()}, **kwargs)

    return run


@pytest.fixture
def oracle(e4m3_bytes, scale_of):
    """Block by block in numpy."""

    def encode(w):
        n, k = w.shape
        w_f32 = w.float().numpy()
        codes = np.zeros((n, k), np.uint8)
        scale = np.zeros((-(-n // 128), 1, -(-k // 128), 1), np.float32)
        for r in range(0, n, 128):
            for c in range(0, k, 128):
                block = w_f32[r : r + 128, c : c + 128]
                scale[r // 128, 0, c // 128, 0] = scale_of(block, w.dtype)
                codes[r : r + 128, c : c + 128] = e4m3_bytes(block, scale[r // 128, 0, c // 128, 0])
        return {
            "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
            "weight_scale": torch.from_numpy(scale),
        }

    return encode


def test_quantize_matches_the_oracle(quantize, oracle, weight, same_bits):
    actual, expected = quantize(weight), oracle(weight)

    assert list(actual) == ["weight", "weight_scale"]
    same_bits(actual["weight"], expected["weight"])
    same_bits(actual["weight_scale"], expected["weight_scale"])


def test_ties_go_to_the_even_code(quantize, tie_table, same_bits):
    w, codes = tie_table

    actual = quantize(w)

    same_bits(actual["weight_scale"], torch.ones(1, 1, 1, 1))
    same_bits(actual["weight"].view(torch.uint8), codes)


def test_every_16_bit_pattern(quantize, oracle, all_patterns, same_bits):
    actual, expected = quantize(all_patterns), oracle(all_patterns)

    same_bits(actual["weight"], expected["weight"])
    same_bits(actual["weight_scale"], expected["weight_scale"])


@pytest.mark.usefixtures("poisoned_memory")
def test_every_byte_is_written(quantize, dequantize, oracle, normal_weight, same_bits):
    expected = oracle(normal_weight)

    actual = quantize(normal_weight)

    same_bits(actual["weight"], expected["weight"])
    same_bits(actual["weight_scale"], expected["weight_scale"])
    same_bits(dequantize(actual), kernels.dequantize_torch(expected))


def test_slices_at_block_rows_give_the_same_bytes(quantize, normal_weight, same_bits):
    whole = quantize(normal_weight)
    parts = [quantize(normal_weight[start:stop]) for start, stop in ((0, 128), (128, 257))]

    codes = torch.cat([part["weight"].view(torch.uint8) for part in parts])
    same_bits(codes, whole["weight"].view(torch.uint8))
    same_bits(torch.cat([part["weight_scale"] for part in parts]), whole["weight_scale"])


def test_one_block_keeps_a_4d_scale(quantize):
    assert quantize(torch.ones(128, 128))["weight_scale"].shape == (1, 1, 1, 1)


def test_zero_weight_has_scale_one_and_zero_codes(quantize):
    """0 / 448 would be a scale of 0 and codes of NaN."""
    actual = quantize(torch.zeros(130, 130, dtype=torch.bfloat16))

    assert actual["weight_scale"].flatten().tolist() == [1.0] * 4
    assert actual["weight"].view(torch.uint8).max().item() == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [(torch.nan, 0x7F), (torch.inf, 0x7E), (0.0, 0x00)],
)
def test_special_numbers_do_not_touch_the_scale(quantize, dtype, number, code):
    w = torch.full((130, 130), 0.5, dtype=dtype)
    w[1:3, 2] = number
    sign_bytes = w.view(torch.uint8)[:, 3 * dtype.itemsize - 1]
    sign_bytes[1] &= 0x7F
    sign_bytes[2] |= 0x80

    actual = quantize(w)

    assert set(actual["weight_scale"].flatten().tolist()) == {(torch.tensor(0.5) / 448).item()}
    assert actual["weight"].view(torch.uint8)[1:3, 2].tolist() == [code, code | 0x80]


def test_dequantize_every_code(dequantize, dtype, same_bits):
    """256 codes under scales from subnormal to infinite, against ml_dtypes' numbers and casts."""
    scales = np.array(
        [1.0, 0.00123, 3e-41, 2.0**-127, 2.0**-140, 1e30, 3e38, 300.0, np.inf], np.float32
    )
    codes = np.zeros((128, 128 * len(scales)), np.uint8)
    codes[:2] = np.tile(np.arange(256, dtype=np.uint8).reshape(2, 128), len(scales))
    scale_columns = np.repeat(scales, 128)
    with np.errstate(all="ignore"):
        product = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_columns
        names = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
        rounded = product.astype(names.get(dtype, np.float32))
    bits = torch.from_numpy(rounded.view(np.int32 if rounded.itemsize == 4 else np.int16))
    expected = bits.view(dtype).masked_fill(torch.from_numpy(np.isnan(product)), torch.nan)

    tensors = {
        "weight": torch.from_numpy(codes).view(torch.float8_e4m3fn),
        "weight_scale": torch.from_numpy(scales).view(1, 1, -1, 1),
    }

    # numpy warns in Triton's interpreter, of overflow and of 0 * inf
    with np.errstate(over="ignore", invalid="ignore"):
        actual = dequantize(tensors, dtype=dtype)

    same_bits(actual, expected)


def test_dequantize_any_shape(dequantize, weight, same_bits):
    tensors = kernels.quantize_torch(weight)
    expected = kernels.dequantize_torch(tensors, dtype=weight.dtype)

    same_bits(dequantize(tensors, dtype=weight.dtype), expected)


def test_dequantize_non_contiguous(dequantize, normal_weight, same_bits):
    tensors = kernels.quantize_torch(normal_weight)
    strided = {
        "weight": tensors["weight"].T.contiguous().T,
        "weight_scale": tensors["weight_scale"].transpose(0, 2).contiguous().transpose(0, 2),
    }

    same_bits(dequantize(strided), kernels.dequantize_torch(tensors))


def test_error_is_at_most_half_a_step(quantize, dequantize, normal_weight):
    tensors = {name: tensor.cpu() for name, tensor in quantize(normal_weight).items()}
    actual = dequantize(tensors, dtype=torch.float32).cpu().double()
    scale = tensors["weight_scale"].double().expand(-1, 128, -1, 128).reshape(384, 384)[:257, :300]
    quotient = normal_weight.double() / scale
    step = torch.exp2(quotient.abs().log2().floor().clamp(min=-6) - 3)

    # the scale, the quotient and the product are rounded to f32
    bound = scale * step / 2 + 2.0**-22 * normal_weight.double().abs()
    assert ((actual - normal_weight.double()).abs() <= bound).all()


def test_dispatch_without_the_library(monkeypatch, normal_weight, same_bits):
    expected = kernels.quantize_torch(normal_weight)
    for value in ("0", "1"):
        monkeypatch.setenv("QKERNELS_NATIVE", value)
        actual = kernels.quantize(normal_weight)

        same_bits(actual["weight"], expected["weight"])
        same_bits(kernels.dequantize(actual), kernels.dequantize_torch(expected))


@pytest.mark.parametrize("w", [torch.ones(()), torch.ones(3), torch.ones(2, 3, 4)])
def test_other_rank_is_an_error(quantize, w):
    with pytest.raises(KernelError, match=r"expected a weight of shape \(N, K\), got shape"):
        quantize(w)


def test_other_dtype_is_an_error(quantize, dequantize):
    with pytest.raises(KernelError, match=r"got torch\.float64"):
        quantize(torch.ones(2, 2, dtype=torch.float64))
    with pytest.raises(KernelError, match=r"got torch\.int8"):
        dequantize(kernels.quantize_torch(torch.ones(2, 2)), dtype=torch.int8)


def test_other_scale_shape_is_an_error(dequantize):
    tensors = kernels.quantize_torch(torch.ones(130, 130))
    squeezed = {**tensors, "weight_scale": tensors["weight_scale"].squeeze()}
    with pytest.raises(KernelError, match=r"shape \(2, 1, 2, 1\), got .* shape \(2, 2\)"):
        dequantize(squeezed)
    with pytest.raises(KernelError, match=r"expected the tensors \['weight', 'weight_scale'\]"):
        dequantize({"weight": tensors["weight"]})
