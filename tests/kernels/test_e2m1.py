"""The e2m1 arithmetic of the references against ml_dtypes' conversion of the quotient."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qkernels import _e2m1

from . import oracle

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0)


def quotients():
    """Every 997th f32 from 0 to 16, 200 neighbours of each tie, every f16; of both signs."""
    dense = np.arange(0, np.float32(16.0).view(np.int32), 997, dtype=np.int32)
    ties = np.array(TIES, np.float32).view(np.int32)[:, None] + np.arange(-100, 101)
    bits = np.concatenate([dense, ties.astype(np.int32).ravel()]).view(np.float32)
    half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    half = half[~np.isnan(half)]
    return np.concatenate([bits, -bits, half])


def test_codes_of_dense_quotients():
    """ml_dtypes writes code 8 for -0.0, which has code 0 here."""
    w = quotients()
    cast = np.clip(w, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)

    actual = _e2m1.encode(torch.from_numpy(w), torch.tensor(1.0)).numpy()

    np.testing.assert_array_equal(actual, np.where(w == 0, 0, cast))


@pytest.mark.parametrize("exponent", [-149, -130, -100, 0, 100])
def test_codes_of_a_rounded_quotient(exponent):
    """Divided in f32, subnormal scales too; then rounded once."""
    generator = np.random.default_rng(0)
    scale = np.ldexp(generator.uniform(1, 8, 100_000), exponent).astype(np.float32)
    w = (generator.uniform(-8, 8, len(scale)) * scale).astype(np.float32)

    actual = _e2m1.encode(torch.from_numpy(w), torch.from_numpy(scale)).numpy()

    np.testing.assert_array_equal(actual, oracle.encode("e2m1", w, scale))


@pytest.mark.parametrize(
    ("number", "code"),
    [(np.nan, 0), (-np.nan, 0), (0.0, 0), (-0.0, 0), (-1e-45, 8), (np.inf, 7), (-np.inf, 15)],
)
def test_special_numbers(number, code):
    w = torch.tensor([number]).copysign(torch.tensor([np.copysign(1.0, number)]))

    assert _e2m1.encode(w, torch.tensor(3.0)).tolist() == [code]


def test_a_quotient_beyond_f32_is_the_largest_code():
    assert _e2m1.encode(torch.tensor([1e30, -1e30]), torch.tensor(1e-30)).tolist() == [7, 15]


def test_every_byte_holds_two_numbers_the_even_column_low():
    byte = np.arange(256, dtype=np.uint8)[None]
    codes = np.stack([byte & 15, byte >> 4], 2).reshape(1, 512)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)

    actual = _e2m1.values(torch.from_numpy(byte)).numpy()

    assert actual.tobytes() == expected.tobytes()
    assert _e2m1.pack(torch.from_numpy(codes)).tolist() == byte.tolist()


def test_the_limit_is_where_a_longer_format_would_round_to_8():
    """6 plus half of the step of 2 that 8 would be away."""
    assert _e2m1.E2M1_LIMIT == (6.0 + 8.0) / 2
