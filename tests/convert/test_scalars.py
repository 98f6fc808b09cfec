"""Scales that are one number: the f32 arithmetic of numpy and torch, without either."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconvert.scalars import f32, global_scale, input_scale, packed, quotient
from qkernels._scales import scale_from_amax
from qschema.formats import TensorSpec, find, formats

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DIVISORS = sorted({spec.divisor for found in formats().values() for spec in found.tensors})
GLOBALS = [spec for found in formats().values() for spec in found.specs("global")]
INPUTS = [spec for found in formats().values() for spec in found.specs("input")]


def bits(number: float) -> int:
    """Return the bits of an f32 number; fails for any other."""
    (back,) = struct.unpack("<f", struct.pack("<f", number))
    assert back == number
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def test_the_divisors_are_those_of_the_formats() -> None:
    assert DIVISORS == [1.0, 127.0, 448.0, 2688.0]


@pytest.mark.parametrize("divisor", DIVISORS)
def test_a_quotient_is_numpys_of_many_random_numbers(divisor: float) -> None:
    """Every exponent, subnormal numbers and subnormal quotients too."""
    generator = np.random.default_rng(11)
    patterns = generator.integers(0, 0x7F800000, size=20_000, dtype=np.uint32)
    subnormal = generator.integers(0, 1 << 24, size=5_000, dtype=np.uint32)
    amaxes = np.concatenate([patterns, subnormal]).view(np.float32)
    wanted = amaxes / np.float32(divisor)

    found = [quotient(float(amax), divisor) for amax in amaxes]

    assert np.array_equal(np.array(found, np.float32).view(np.uint32), wanted.view(np.uint32))
    assert [bits(number) for number in found[:500]] == wanted[:500].view(np.uint32).tolist()


@given(
    amax=st.floats(0, 2.0**126, width=32),
    divisor=st.floats(2.0**-10, 2.0**20, width=32),
)
def test_a_quotient_of_any_two_numbers_is_numpys(amax: float, divisor: float) -> None:
    with np.errstate(over="ignore"):
        wanted = np.float32(amax) / np.float32(divisor)

    if np.isfinite(wanted):
        assert bits(quotient(amax, divisor)) == int(wanted.view(np.uint32))


@pytest.mark.parametrize("number", [0.1, 1 / 3, 2688.1, 1e-45, 7e-46, 2.0**-149, 16777217.0, 3e-39])
def test_f32_rounds_as_numpy_does(number: float) -> None:
    assert bits(f32(number)) == int(np.float32(number).view(np.uint32))


def test_both_sides_are_rounded_first() -> None:
    """A number of a JSON file has 53 bits; the quotient is that of the nearest f32 number."""
    amaxes = [place / 97 for place in range(1, 200)]

    for amax in amaxes:
        assert quotient(amax, 448.0) == float(np.float32(amax) / np.float32(448.0))
    assert any(f32(amax / 448.0) != quotient(amax, 448.0) for amax in amaxes)


@pytest.mark.parametrize("spec", GLOBALS, ids=lambda spec: f"{spec.suffix}-{spec.divisor:g}")
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    "amax", [0.0, 2.0**-149, 2.0**-133, 2.0**-126, 2.0**-20, 2.0**-14, 0.7, 448.0, 1e30, 3.3e38]
)
def test_a_global_scale_is_the_kernels(spec: TensorSpec, dtype: str, amax: float) -> None:
    """1.0 of zeros; of numbers below the dtype's smallest normal that number's."""
    found = global_scale(amax, spec, dtype=dtype)

    wanted = scale_from_amax(torch.tensor(amax), source=DTYPES[dtype], divisor=spec.divisor)
    assert packed(found) == wanted.numpy().tobytes()
    assert math.isfinite(found)
    assert found > 0


@pytest.mark.parametrize("spec", INPUTS, ids=lambda spec: f"{spec.divisor:g}-{spec.zero:g}")
def test_an_input_scale_is_never_zero_and_never_nan(spec: TensorSpec) -> None:
    for amax in (0.0, math.nan, 2.0**-149, 1e-320, 5e-324, 1.0, 1e30):
        for dtype in DTYPES:
            found = input_scale(amax, spec, dtype=dtype)
            assert math.isfinite(found)
            assert found > 0
            assert packed(found) == struct.pack("<f", found)


@pytest.mark.parametrize(
    ("algo", "amax", "dtype", "wanted"),
    [
        ("FP8", 0.0, "BF16", 1.0),
        ("NVFP4", 0.0, "BF16", 0x3B124925),
        ("W8A8_SQ_PER_CHANNEL", 0.0, "BF16", 1.0),
        ("FP8", math.nan, "BF16", 1.0),
        ("FP8", 448.0, "F32", 1.0),
        ("FP8", 896.0, "F16", 2.0),
        # f16's smallest normal number, 2^-14, counts
        ("FP8", 2.0**-15, "F16", 2.0**-20 / 7),
        ("FP8", 2.0**-15, "BF16", 2.0**-21 / 7),
    ],
)
def test_input_scales_by_hand(algo: str, amax: float, dtype: str, wanted: float) -> None:
    """6 / 2688 = 0.002232143 is 0x3B124925 in f32."""
    (spec,) = find(algo).specs("input")

    found = input_scale(amax, spec, dtype=dtype)

    assert bits(found) == (wanted if isinstance(wanted, int) else bits(f32(wanted)))


def test_packed_is_little_endian_f32() -> None:
    assert packed(1.0) == bytes.fromhex("0000803f")
    assert packed(2.0**-149) == bytes.fromhex("01000000")
