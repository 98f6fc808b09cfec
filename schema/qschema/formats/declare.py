"""What a format declaration is made of. Data only: no bytes are touched here.

Dimensions are written as text over the Linear's N (rows out) and K (columns in): "N", "K", "1",
"ceil(N/128)" for a ragged grid, "K/2" where the division must be exact.
"""

import re
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Literal

from pydantic import Field

from qschema.dtypes import BITS, nbytes
from qschema.strict import Strict

_DIM = re.compile(
    r"(?P<literal>\d+)|(?P<axis>[NK])(?:/(?P<exact>\d+))?|ceil\((?P<ragged>[NK])/(?P<block>\d+)\)"
)


class TensorSpec(Strict):
    """One tensor that a quantized Linear [N, K] owns, named: the module, a dot, `suffix`."""

    suffix: str
    dtype: str
    shape: tuple[str, ...]
    # codes: the packed elements; scale: multiplies on dequantization, must be finite and positive
    role: Literal["codes", "scale"]
    meaning: str


class Format(Strict):
    """One format of the unified checkpoint: everything that anything else needs to know about it.

    Read by the converter (what to allocate and write), the validator (what must be there), the
    configs (what `hf_quant_config.json` and `config.json` say), docs/formats.md and the schemas.
    The kernels live in the `qkernels` module of the same name in lower case.
    """

    name: str
    # as `quant_algo` is written to disk; readers accept the name and every alias too
    spelling: str
    aliases: tuple[str, ...] = ()
    title: str
    tensors: tuple[TensorSpec, ...]
    # rows that share a scale: a weight may be cut between multiples of it and nowhere else
    block_rows: int = 1
    # divisors that N and K must have; 1 where any size goes (ragged blocks)
    multiple_of_n: int = 1
    multiple_of_k: int = 1
    source_dtypes: tuple[str, ...] = ("BF16", "F16", "F32")
    # what ||w - dequantized|| / ||w|| can't exceed when the scales come from the weight itself
    error_bound: float
    # keys after kv_cache_quant_algo in hf_quant_config.json
    hf_quant_fields: dict[str, int | bool] = Field(default_factory=dict)
    formula: str
    source: str
    departures: tuple[str, ...] = ()

    def outputs(self, *, rows: int, columns: int) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return suffix -> (dtype, shape) of the tensors that a Linear [rows, columns] becomes."""
        return MappingProxyType(
            {
                spec.suffix: (spec.dtype, resolve(spec.shape, rows=rows, columns=columns))
                for spec in self.tensors
            }
        )

    def spans(self, *, start: int, stop: int, columns: int) -> Mapping[str, tuple[int, int]]:
        """Return suffix -> (offset, nbytes) of rows [start, stop) within each tensor.

        The first dimension of every tensor follows the rows, so the rows before `start` (which cuts
        between blocks) and those up to `stop` say where a slice lies by their sizes alone.
        """
        before = self.outputs(rows=start, columns=columns)
        after = self.outputs(rows=stop, columns=columns)
        offsets = {suffix: nbytes(*output) for suffix, output in before.items()}
        return {
            suffix: (offsets[suffix], nbytes(*output) - offsets[suffix])
            for suffix, output in after.items()
        }

    def bits(self, *, rows: int, columns: int) -> int:
        """Return the stored bits of a Linear [rows, columns], scales included."""
        outputs = self.outputs(rows=rows, columns=columns)
        return sum(BITS[dtype] * prod(shape) for dtype, shape in outputs.values())

    def obstacle(self, *, rows: int, columns: int, dtype: str) -> str | None:
        """Return why a Linear [rows, columns] of `dtype` can't have this format, None if it can."""
        if dtype not in self.source_dtypes:
            return f"{self.name} is made from {', '.join(self.source_dtypes)}, found {dtype}"
        for axis, size, multiple in (
            ("rows", rows, self.multiple_of_n),
            ("columns", columns, self.multiple_of_k),
        ):
            if size % multiple:
                return f"{self.name} needs {axis} in multiples of {multiple}, found {size}"
        return None


def resolve(dims: tuple[str, ...], *, rows: int, columns: int) -> tuple[int, ...]:
    """Return the sizes of the dimension texts `dims` for N = rows, K = columns.

    Raises ValueError for a text outside the notation, or an exact division that leaves a rest.
    """
    return tuple(_size(dim, {"N": rows, "K": columns}) for dim in dims)


def _size(dim: str, axes: Mapping[str, int]) -> int:
    match = _DIM.fullmatch(dim)
    if match is None:
        raise ValueError(f"dimension {dim!r} is none of 1, N, N/2, ceil(N/128)")
    if match["literal"]:
        return int(match["literal"])
    if match["ragged"]:
        return -(-axes[match["ragged"]] // int(match["block"]))
    size, divisor = axes[match["axis"]], int(match["exact"] or 1)
    if size % divisor:
        raise ValueError(f"{dim}: {size} is not a multiple of {divisor}")
    return size // divisor
