"""The integer arithmetic of the references, by enumeration."""

import numpy as np
import pytest
import torch

from qkernels import _integer

from . import oracle

BOUNDS = {"int8": (-128, 127), "int4": (-8, 7)}


@pytest.fixture(params=BOUNDS)
def element(request):
    return request.param


def encode(element, w, scale):
    low, high = BOUNDS[element]
    return _integer.encode(torch.tensor(w), torch.tensor(scale), low=low, high=high)


def test_codes_of_halves_and_their_neighbours(element):
    """From two beyond the lowest code to two beyond the highest."""
    low, high = BOUNDS[element]
    halves = np.arange(2 * low - 4, 2 * high + 5).astype(np.float32) / 2
    below, above = (np.nextafter(halves, np.float32(to)) for to in (-np.inf, np.inf))
    for numbers in (below, halves, above):
        exact = [min(max(round(float(number)), low), high) for number in numbers]

        assert encode(element, numbers, np.float32(1.0)).tolist() == exact


@pytest.mark.parametrize("exponent", [-149, -130, 0, 100])
def test_codes_of_a_rounded_quotient(element, exponent):
    generator = np.random.default_rng(0)
    scale = np.ldexp(generator.uniform(1, 8, 100_000), exponent).astype(np.float32)
    w = (generator.uniform(-140, 140, len(scale)) * scale).astype(np.float32)

    actual = encode(element, w, scale).numpy()

    np.testing.assert_array_equal(actual, oracle.encode(element, w, scale))


def test_special_numbers(element):
    """A quotient beyond f32 and infinity become the bound, NaN and -0.0 become 0."""
    low, high = BOUNDS[element]
    w = np.array([np.nan, np.inf, -np.inf, -0.0, 1e30, -1e30], np.float32)

    actual = encode(element, w, np.float32(1e-30))

    assert actual.dtype == torch.int8
    assert actual.tolist() == [0, high, low, 0, high, low]
