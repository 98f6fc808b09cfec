"""The e4m3 arithmetic of the references against ml_dtypes' conversion of the quotient."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qkernels import _e4m3

from . import oracle


def encode(w, scale):
    negative = torch.from_numpy(np.signbit(w))
    codes = _e4m3.encode(torch.from_numpy(w), torch.from_numpy(scale), negative=negative)
    return codes.view(torch.uint8).numpy()


def quotients():
    """Every 2003rd f32 from 0 to 1000, 60 neighbours of each tie, every f16; of both signs."""
    dense = np.arange(0, np.float32(1000.0).view(np.int32), 2003, dtype=np.int32)
    value = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = np.append((value[1:] + value[:-1]) / 2, np.float32(464.0))
    ties = middles.astype(np.float32).view(np.int32)[:, None] + np.arange(-30, 31)
    bits = np.concatenate([dense, ties.astype(np.int32).ravel()]).view(np.float32)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    return np.concatenate([bits, -bits, half[~np.isnan(half)]])


def test_codes_of_dense_quotients():
    """ml_dtypes makes NaN of what is above 464, which is 448 here."""
    w = quotients()

    actual = encode(w, np.ones((), np.float32))

    expected = np.clip(w, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("exponent", [-149, -135, -100, 0, 100])
def test_codes_of_a_rounded_quotient(exponent):
    """Divided in f32, subnormal scales too; then rounded once."""
    generator = np.random.default_rng(0)
    scale = np.ldexp(generator.uniform(1, 8, 100_000), exponent).astype(np.float32)
    w = (generator.uniform(-500, 500, len(scale)) * scale).astype(np.float32)

    np.testing.assert_array_equal(encode(w, scale), oracle.encode("e4m3", w, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sign_bits_of_every_upper_half(dtype):
    """Both zeros, infinities and NaN of both signs."""
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    w = (
        patterns.int().bitwise_left_shift(16).view(dtype)
        if dtype.itemsize == 4
        else patterns.view(dtype)
    )

    assert torch.equal(_e4m3.sign_bits(w), patterns < 0)


def test_a_quotient_beyond_f32_is_the_largest_code():
    w, scale = np.array([1e30, -1e30], np.float32), np.array(1e-30, np.float32)

    assert encode(w, scale).tolist() == [0x7E, 0xFE]
