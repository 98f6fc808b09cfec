"""Cutting weights by rows: nothing lost, nothing twice, contiguous in every output."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconvert.errors import ConvertError
from qconvert.slices import Cut, cuts, rows_per_slice
from qschema.dtypes import nbytes
from qschema.formats import Format, formats

_FORMATS = st.sampled_from(list(formats().values()))


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
    each = rows_per_slice(
        declared,
        dtype="F32",
        rows=rows,
        columns=columns,
        preferred=preferred,
        limit=limit,
        name="w",
    )

    found = list(cuts(declared, dtype="F32", rows=rows, columns=columns, each=each))

    assert all(cut.footprint() <= limit for cut in found)
    assert all(cut.start % declared.block_rows == 0 for cut in found)
    spans = [[cut.source_span() for cut in found]]
    spans += [list(tensor) for tensor in zip(*(cut.output_spans() for cut in found), strict=True)]
    totals = [nbytes("F32", (rows, columns))]
    totals += [nbytes(*output) for output in declared.outputs(rows=rows, columns=columns).values()]
    for pieces, total in zip(spans, totals, strict=True):
        ends = [offset + size for offset, size in pieces]
        assert [offset for offset, _ in pieces] == [0, *ends[:-1]]
        assert ends[-1] == total


def test_a_slice_is_as_large_as_the_limit_allows() -> None:
    declared = formats()["FP8_PB_WO"]
    limit = Cut(declared, "BF16", 0, 3 * 128, 1024).footprint()

    each = rows_per_slice(
        declared, dtype="BF16", rows=4096, columns=1024, preferred=1 << 30, limit=limit, name="w"
    )

    assert each == 3 * 128


def test_a_budget_below_one_block_of_rows_is_refused_by_name() -> None:
    with pytest.raises(ConvertError, match=r"w: 128 of its 4096 rows of 65536 BF16 need .* raise"):
        rows_per_slice(
            formats()["FP8_PB_WO"],
            dtype="BF16",
            rows=4096,
            columns=65536,
            preferred=1,
            limit=1 << 20,
            name="w",
        )
