"""How a weight is cut by rows to fit in memory: every output of a slice is one contiguous span.

A format's rows are independent above its block_rows; where the rows of a slice lie in each output
follows from the declaration (Format.spans).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qconvert.errors import ConvertError, human
from qschema.dtypes import nbytes
from qschema.formats import Format

_ALIGN = 64


@dataclass(frozen=True)
class Cut:
    """Rows [start, stop) of a weight [rows, columns] of `dtype`, with byte spans in each tensor."""

    declared: Format
    dtype: str
    start: int
    stop: int
    columns: int

    @property
    def rows(self) -> int:
        """How many rows the slice has."""
        return self.stop - self.start

    def source_span(self) -> tuple[int, int]:
        """Return (offset, nbytes) of the slice within the source tensor."""
        offset = nbytes(self.dtype, (self.start, self.columns))
        return offset, nbytes(self.dtype, (self.stop, self.columns)) - offset

    def output_spans(self) -> list[tuple[int, int]]:
        """Return (offset, nbytes) within each output tensor, in the order of the declaration."""
        spans = self.declared.spans(start=self.start, stop=self.stop, columns=self.columns)
        return list(spans.values())

    def sizes(self) -> list[int]:
        """Return the bytes of all buffers: source, outputs, and two f64 per row of statistics."""
        return [
            self.source_span()[1],
            *(size for _, size in self.output_spans()),
            8 * self.rows,
            8 * self.rows,
        ]

    def footprint(self) -> int:
        """Return the bytes of memory that the slice's buffers take, each aligned."""
        return sum(aligned(size) for size in self.sizes())


def aligned(size: int) -> int:
    """Return `size` rounded up to a multiple of 64 bytes."""
    return -(-size // _ALIGN) * _ALIGN


def rows_per_slice(
    declared: Format, *, dtype: str, rows: int, columns: int, preferred: int, limit: int, name: str
) -> int:
    """Return how many rows of tensor `name` to take at once: about `preferred` source bytes.

    The buffers stay within `limit` bytes. Raises ConvertError if not even one block of rows fits.
    """
    step = declared.block_rows
    row_nbytes = nbytes(dtype, (1, columns))
    wanted = min(rows, max(1, preferred // max(1, row_nbytes * step)) * step)

    def footprint(count: int) -> int:
        return Cut(declared, dtype, 0, count, columns).footprint()

    if footprint(wanted) <= limit:
        return wanted
    smallest = min(step, rows)
    if footprint(smallest) > limit:
        raise ConvertError(
            f"{name}: {smallest} of its {rows} rows of {columns} {dtype} need "
            f"{human(footprint(smallest))} of memory, a worker has {human(limit)}; "
            "raise --memory-budget or lower --workers"
        )
    low, high = 1, wanted // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if footprint(middle * step) <= limit else (low, middle - 1)
    return min(rows, low * step)


def cuts(declared: Format, *, dtype: str, rows: int, columns: int, each: int) -> Iterator[Cut]:
    """Yield the slices of a weight [rows, columns], `each` rows at a time, in order."""
    for start in range(0, rows, each):
        yield Cut(declared, dtype, start, min(rows, start + each), columns)
