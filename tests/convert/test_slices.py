"""Cutting weights by rows: nothing lost, nothing twice, contiguous in every output."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconvert.errors import ConvertError
from qconvert.slices import Cut, Layout, cuts, lines_per_slice
from qschema.dtypes import nbytes
from qschema.formats import Format, formats
from qschema.formats.declare import resolve

_FORMATS = st.sampled_from(list(formats().values()))
_STACKABLE = st.sampled_from([declared for declared in formats().values() if declared.stackable])


@given(
    declared=_FORMATS,
    rows=st.integers(1, 700),
    columns=st.integers(1, 400),
    limit=st.integers(300_000, 2_000_000),
    preferred=st.integers(1, 1_000_000),
)
def test_slices_tile_the_source_and_every_output(
    declared: Format, rows: int, columns: int, limit: int, preferred: int
) -> None:
    # up to what the format can have
    rows = -(-rows // declared.multiple_of_n) * declared.multiple_of_n
    columns = -(-columns // declared.multiple_of_k) * declared.multiple_of_k
    layout = Layout(declared, "F32", rows, columns)
    each = lines_per_slice(layout, preferred=preferred, limit=limit, name="w")

    found = list(cuts(layout, each=each))

    assert all(cut.footprint() <= limit for cut in found)
    assert all(cut.start % declared.block_rows == 0 for cut in found)
    assert [(cut.rows, cut.columns) for cut in found] == [
        (cut.stop - cut.start, columns) for cut in found
    ]
    outputs = [
        nbytes(spec.dtype, resolve(spec.shape, rows=rows, columns=columns))
        for spec in declared.specs("codes", "scale")
    ]
    check_tiling(found, [nbytes("F32", (rows, columns)), *outputs])


@given(
    declared=_STACKABLE,
    experts=st.integers(1, 5),
    blocks=st.integers(1, 12),
    rows=st.integers(1, 300),
    limit=st.integers(600_000, 2_000_000),
    preferred=st.integers(1, 1_000_000),
)
def test_slices_of_transposed_stacks_tile_the_source_and_every_output(
    declared: Format, experts: int, blocks: int, rows: int, limit: int, preferred: int
) -> None:
    """[E, K, N]: cut between blocks of columns, which are lines there."""
    columns = blocks * declared.multiple_of_k
    layout = Layout(declared, "BF16", experts * columns, rows, transposed=True)
    each = lines_per_slice(layout, preferred=preferred, limit=limit, name="w")

    found = list(cuts(layout, each=each))

    assert all(cut.footprint() <= limit for cut in found)
    assert all(cut.start % declared.multiple_of_k == 0 for cut in found)
    assert {cut.rows for cut in found} == {rows}
    assert sum(cut.columns for cut in found) == experts * columns
    outputs = [
        experts * nbytes(spec.dtype, resolve(spec.shape, rows=rows, columns=columns))
        for spec in declared.specs("codes", "scale")
    ]
    check_tiling(found, [2 * experts * columns * rows, *outputs])


def check_tiling(found: list[Cut], totals: list[int]) -> None:
    """Check that the slices' spans in source and outputs follow each other up to `totals`."""
    spans = [[cut.source_span() for cut in found]]
    spans += [list(tensor) for tensor in zip(*(cut.output_spans() for cut in found), strict=True)]
    for pieces, total in zip(spans, totals, strict=True):
        ends = [offset + size for offset, size in pieces]
        assert [offset for offset, _ in pieces] == [0, *ends[:-1]]
        assert ends[-1] == total


def test_a_slice_is_as_large_as_the_limit_allows() -> None:
    layout = Layout(formats()["FP8_PB_WO"], "BF16", 4096, 1024)
    limit = Cut(layout, 0, 3 * 128).footprint()

    assert lines_per_slice(layout, preferred=1 << 30, limit=limit, name="w") == 3 * 128


def test_a_budget_below_one_block_of_rows_is_refused_by_name() -> None:
    layout = Layout(formats()["FP8_PB_WO"], "BF16", 4096, 65536)

    with pytest.raises(ConvertError, match=r"w: 128 of its 4096 rows of 65536 BF16 need .* raise"):
        lines_per_slice(layout, preferred=1, limit=1 << 20, name="w")
