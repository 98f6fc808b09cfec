"""Sums of the error statistics: exact, in any order, in memory that does not grow."""

import math
import random
import struct
import tracemalloc
from fractions import Fraction

import pytest

from qconvert.sums import ExactSum


@pytest.fixture(params=["native", "python"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setenv("QKERNELS_NATIVE", "0")


def added(*slices: list[float]) -> float:
    total = ExactSum()
    for numbers in slices:
        total.add(memoryview(bytearray(struct.pack(f"{len(numbers)}d", *numbers))))
    return total.total()


def numbers_of(count: int, *, seed: int) -> list[float]:
    """Return numbers over 60 orders of magnitude, which no plain sum adds up right."""
    generator = random.Random(seed)
    sizes = [generator.random() * 10.0 ** generator.randint(-40, 20) for _ in range(count)]
    return [size * generator.choice((-1, 1)) for size in sizes]


def test_the_sum_is_exact_however_it_is_cut() -> None:
    numbers = numbers_of(30000, seed=1)
    exact = float(sum(map(Fraction, numbers)))

    assert added(numbers) == exact
    assert added(*(numbers[begin : begin + 7] for begin in range(0, 30000, 7))) == exact
    assert added(numbers[20000:], [], numbers[:20000]) == exact
    assert added() == 0.0


@pytest.mark.parametrize("step", [1, 2, 54])
def test_numbers_of_one_bit_each_keep_apart(step: int) -> None:
    """As many parts as there are numbers: from the smallest subnormal to the largest power."""
    numbers = [math.ldexp(1.0, exponent) for exponent in range(-1074, 1000, step)]
    exact = float(sum(map(Fraction, numbers)))

    assert added(numbers) == added(numbers[::-1]) == exact
    assert added(numbers, [-number for number in numbers]) == 0.0


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_what_is_not_finite_stays(odd: float) -> None:
    found = added([1.0] * 20000, [odd], [1.0] * 20000)

    assert str(found) == str(odd)


def test_memory_does_not_grow_with_the_numbers() -> None:
    """A million numbers take 32 MB as a list."""
    some = memoryview(bytearray(struct.pack("1000d", *numbers_of(1000, seed=2))))
    total = ExactSum()
    tracemalloc.start()

    for _ in range(1000):
        total.add(some)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 2 << 20
