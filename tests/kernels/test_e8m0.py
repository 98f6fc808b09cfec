"""The scales of MX formats, by enumeration against exact rational numbers."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from qkernels import _e8m0

LARGEST = [448.0, 6.0]


def positive_finite(dtype):
    numbers = torch.arange(1, 1 << 15).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()].float()


def near_powers_of_two(largest):
    """f32 numbers up to 3 steps from `largest` times a power of two, over all of f32."""
    exponents = np.arange(-160, 128)
    exact = np.ldexp(np.float64(largest), exponents[exponents + np.log2(largest) < 128])
    centers = exact.astype(np.float32)
    around = centers.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)
    numbers = around[(around > 0) & (around < 0x7F800000)].view(np.float32)
    return torch.from_numpy(numbers)


def random_f32():
    bits = torch.randint(1, 0x7F800000, (20000,), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF])
    return torch.cat([bits, edges]).int().view(torch.float32)


NUMBERS = {
    "every bf16": lambda largest: positive_finite(torch.bfloat16),
    "every f16": lambda largest: positive_finite(torch.float16),
    "f32 near powers of two": near_powers_of_two,
    "random f32": lambda largest: random_f32(),
}


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_bytes_are_the_smallest_powers_that_hold_amax(numbers, largest):
    """amax <= largest * 2^e, which no smaller e >= -127 allows."""
    amax = numbers(largest)
    bounds = [Fraction(largest) * Fraction(2) ** (byte - 127) for byte in range(256)]

    actual = _e8m0.bytes_from_amax(amax, largest=largest)

    assert actual.dtype == torch.uint8
    for number, byte in zip(amax.tolist(), actual.tolist(), strict=True):
        exact = Fraction(number)
        assert exact <= bounds[byte]
        assert byte == 0 or exact > bounds[byte - 1]


@pytest.mark.parametrize("largest", LARGEST)
def test_zero_has_byte_0(largest):
    assert _e8m0.bytes_from_amax(torch.zeros(2, 0), largest=largest).shape == (2, 0)
    assert _e8m0.bytes_from_amax(torch.zeros(1), largest=largest).item() == 0


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_the_logarithm_of_modelopt_agrees(dtype, largest):
    """Its formula, ceil(log2(amax / largest)) in f32 and at least -127, on this CPU."""
    amax = positive_finite(dtype)

    power = (amax / largest).log2().ceil().clamp(-127, 127)

    assert torch.equal(_e8m0.bytes_from_amax(amax, largest=largest), (power + 127).to(torch.uint8))


@pytest.mark.parametrize("largest", LARGEST)
def test_the_logarithm_of_modelopt_loses_the_last_bits_of_f32(largest):
    """The number after largest * 2^10 needs 2^11; the logarithm of the quotient is 10 in f32."""
    amax = torch.tensor([largest * 2.0**10]).nextafter(torch.tensor([torch.inf]))

    power = (amax / largest).log2().ceil()

    assert power.item() == 10.0
    assert _e8m0.bytes_from_amax(amax, largest=largest).item() == 127 + 11


def test_every_byte_as_a_scale():
    byte = np.arange(256, dtype=np.uint8)
    expected = byte.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)

    actual = _e8m0.scales(torch.from_numpy(byte)).numpy()

    assert actual[:255].tolist() == [2.0 ** (place - 127) for place in range(255)]
    np.testing.assert_array_equal(actual, expected)
    assert np.isnan(actual[255])
