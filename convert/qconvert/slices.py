"""How a weight is cut by rows to fit in memory: every output of a slice is one contiguous span.

A format's rows are independent above its block_rows; where the rows of a slice lie in each output
follows from the declaration. A transposed weight is stored [columns, rows]: it is cut along its
columns, which a format with blocks of columns allows between blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qconvert.errors import ConvertError, human
from qschema.dtypes import nbytes
from qschema.formats import Format
from qschema.formats.declare import resolve

_ALIGN = 64


@dataclass(frozen=True)
class Layout:
    """A weight as it is stored: `lines` of `width` elements of `dtype`, one after the other.

    Lines are the rows of the Linear, or its columns where it is stored transposed.
    """

    declared: Format
    dtype: str
    lines: int
    width: int
    transposed: bool = False

    @property
    def step(self) -> int:
        """Lines that can't be cut apart."""
        return self.declared.multiple_of_k if self.transposed else self.declared.block_rows


@dataclass(frozen=True)
class Cut:
    """Lines [start, stop) of a weight, with byte spans in each tensor."""

    layout: Layout
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows of the Linear the slice has, or parts of rows."""
        return self.layout.width if self.layout.transposed else self.stop - self.start

    @property
    def columns(self) -> int:
        """How many columns of the Linear the slice has."""
        return self.stop - self.start if self.layout.transposed else self.layout.width

    def source_span(self) -> tuple[int, int]:
        """Return (offset, nbytes) of the slice within the source tensor."""
        offset = self._source_nbytes(self.start)
        return offset, self._source_nbytes(self.stop) - offset

    def output_spans(self) -> list[tuple[int, int]]:
        """Return (offset, nbytes) within codes and scales, in the order of the declaration."""
        layout = self.layout
        if not layout.transposed:
            spans = layout.declared.spans(start=self.start, stop=self.stop, columns=layout.width)
            return list(spans.values())
        found = []
        for spec in layout.declared.specs("codes", "scale"):
            before, after = (
                nbytes(spec.dtype, resolve(spec.shape, rows=layout.width, columns=lines))
                for lines in (self.start, self.stop)
            )
            found.append((before, after - before))
        return found

    def sizes(self) -> list[int]:
        """Return the bytes of all buffers: source, outputs, and two f64 per row of statistics.

        A transposed slice has source and outputs a second time, the other way around.
        """
        data = [self.source_span()[1], *(size for _, size in self.output_spans())]
        sums = [8 * self.rows, 8 * self.rows]
        return [*data, *sums, *(data if self.layout.transposed else [])]

    def footprint(self) -> int:
        """Return the bytes of memory that the slice's buffers take, each aligned."""
        return sum(aligned(size) for size in self.sizes())

    def _source_nbytes(self, lines: int) -> int:
        return nbytes(self.layout.dtype, (lines, self.layout.width))


def aligned(size: int) -> int:
    """Return `size` rounded up to a multiple of 64 bytes."""
    return -(-size // _ALIGN) * _ALIGN


def lines_per_slice(layout: Layout, *, preferred: int, limit: int, name: str) -> int:
    """Return how many lines of tensor `name` to take at once: about `preferred` source bytes.

    The buffers stay within `limit` bytes. Raises ConvertError if not even one block of lines fits.
    """
    step, lines = layout.step, layout.lines
    line_nbytes = nbytes(layout.dtype, (1, layout.width))
    wanted = min(lines, max(1, preferred // max(1, line_nbytes * step)) * step)

    def footprint(count: int) -> int:
        return Cut(layout, 0, count).footprint()

    if footprint(wanted) <= limit:
        return wanted
    smallest = min(step, lines)
    if footprint(smallest) > limit:
        raise ConvertError(
            f"{name}: {smallest} of its {lines} rows of {layout.width} {layout.dtype} need "
            f"{human(footprint(smallest))} of memory, a worker has {human(limit)}; "
            "raise --memory-budget or lower --workers"
        )
    low, high = 1, wanted // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if footprint(middle * step) <= limit else (low, middle - 1)
    return min(lines, low * step)


def cuts(layout: Layout, *, each: int) -> Iterator[Cut]:
    """Yield the slices of a weight, `each` lines at a time, in order."""
    for start in range(0, layout.lines, each):
        yield Cut(layout, start, min(layout.lines, start + each))
