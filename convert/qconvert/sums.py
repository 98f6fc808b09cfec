"""Sums of many numbers: exact until rounded once, so order and cutting leave no trace."""

import ctypes
import math

from qconvert.backends import address
from qkernels import native

# numbers that wait to be added: 32 bytes each, as Python holds them
_MOST_PENDING = 8192


# doubles that don't overlap: at most one for each of the bits that a finite one can have
_NUM_PARTS = 2100


class ExactSum:
    """The sum of any number of f64 numbers, in memory that does not grow with them.

    The native library adds without the GIL; without it, and for what is not finite, Python does.
    """

    def __init__(self) -> None:
        self._pending: list[float] = []
        self._parts = (ctypes.c_double * _NUM_PARTS)()
        self._num_parts = 0

    def add(self, numbers: memoryview) -> None:
        """Add the f64 numbers whose bytes `numbers` holds."""
        if not numbers.readonly and native.available():
            num_parts = native.exact_sum(
                address(numbers), len(numbers) // 8, self._parts, self._num_parts
            )
            if num_parts >= 0:
                self._num_parts = num_parts
                return
        doubles = numbers.cast("d")
        for begin in range(0, len(doubles), _MOST_PENDING):
            self._pending.extend(doubles[begin : begin + _MOST_PENDING])
            if len(self._pending) > _MOST_PENDING:
                self._pending = _few(self._pending)

    def total(self) -> float:
        """Return the sum, rounded once to f64."""
        return math.fsum([*self._pending, *self._parts[: self._num_parts]])


def _few(numbers: list[float]) -> list[float]:
    """Return a few numbers whose sum is exactly that of `numbers`."""
    parts: list[float] = []
    while True:
        # what the parts so far leave of the sum, rounded
        rest = math.fsum([*numbers, *(-part for part in parts)])
        if not rest:
            return parts
        parts.append(rest)
        if not math.isfinite(rest):
            return [rest]
