"""Sums of many numbers: exact until rounded once, so order and cutting leave no trace."""

import math

# numbers that wait to be added: 32 bytes each, as Python holds them
_MOST_PENDING = 8192


class ExactSum:
    """The sum of any number of f64 numbers, in memory that does not grow with them."""

    def __init__(self) -> None:
        self._pending: list[float] = []

    def add(self, numbers: memoryview) -> None:
        """Add the f64 numbers whose bytes `numbers` holds."""
        doubles = numbers.cast("d")
        for begin in range(0, len(doubles), _MOST_PENDING):
            self._pending.extend(doubles[begin : begin + _MOST_PENDING])
            if len(self._pending) > _MOST_PENDING:
                self._pending = _few(self._pending)

    def total(self) -> float:
        """Return the sum, rounded once to f64."""
        return math.fsum(self._pending)


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
