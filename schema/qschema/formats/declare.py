"""What a format declaration is made of. Data only: no bytes are touched here.

Dimensions are written as text over the Linear's N (rows out) and K (columns in): "N", "K", "1",
"ceil(N/128)" for a ragged grid, "K/2" where the division must be exact.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Literal, TypeAlias

from pydantic import Field, JsonValue

from qschema.dtypes import BITS, nbytes
from qschema.strict import Strict

_DIM = re.compile(
    r"(?P<literal>\d+)|(?P<axis>[NK])(?:/(?P<exact>\d+))?|ceil\((?P<ragged>[NK])/(?P<block>\d+)\)"
)


# who must agree on a value: no other weight; the gate and up of one expert; all fused siblings
Sharing: TypeAlias = Literal["own", "experts", "siblings"]
# codes: the packed elements. scale: made beside them, row by row, multiplies on dequantization.
# global: the scale of the whole weight. input: the scale of its input, from calibration.
# smoothing: what the input is multiplied with, per column, before it is quantized.
Role: TypeAlias = Literal["codes", "scale", "global", "input", "smoothing"]


class TensorSpec(Strict):
    """One tensor that a quantized Linear [N, K] owns, named: the module, a dot, `suffix`.

    A `global` scale is amax / divisor in f32, of the largest finite |w|, which counts as the
    smallest normal number of the source dtype at least; 1.0 for zeros. An `input` scale is
    amax / divisor of the largest |x| that calibration saw, and `zero` / divisor for none but zeros.
    """

    suffix: str
    dtype: str
    shape: tuple[str, ...]
    role: Role
    meaning: str
    divisor: float = 1.0
    zero: float = 1.0
    shared: Sharing = "own"
    # False where some modules of a right checkpoint do without it
    required: bool = True
    # False of a `global` scale that the codes are not multiplied with on dequantization
    scales_codes: bool = True


class Format(Strict):
    """One format of the unified checkpoint: everything that anything else needs to know about it.

    Read by the converter (what to allocate and write), the validator (what must be there), the
    configs (what `hf_quant_config.json` and `config.json` say), docs/formats.md and the schemas.
    The kernels live in the `qkernels` module named `codec` in lower case.
    """

    name: str
    # as `quant_algo` is written to disk; readers accept the name and every alias too
    spelling: str
    aliases: tuple[str, ...] = ()
    title: str
    # whose kernels encode the weight, where another format has the same bytes for it
    kernels: str = ""
    # codes first; then what follows the rows, then the others
    tensors: tuple[TensorSpec, ...]
    element: Literal["E4M3", "E2M1", "INT8", "INT4"]
    # rows that share a scale or a byte: a weight may be cut between multiples of it, nowhere else
    block_rows: int = 1
    # divisors that N and K must have; 1 where any size goes (ragged blocks)
    multiple_of_n: int = 1
    multiple_of_k: int = 1
    source_dtypes: tuple[str, ...] = ("BF16", "F16", "F32")
    # ||w - dequantized|| / ||w|| can't exceed this for numbers above the smallest code, when the
    # scales come from the weight itself; below, an element is off by half the smallest step
    error_bound: float
    # keys after kv_cache_quant_algo in hf_quant_config.json, and in each of quantized_layers
    hf_quant_fields: dict[str, int | bool] = Field(default_factory=dict)
    # the format in compressed-tensors' words: a group of config.json's config_groups, and whether
    # ModelOpt writes one when the whole checkpoint has this format
    config_group: dict[str, JsonValue] = Field(default_factory=dict)
    has_config_group: bool = False
    # whether ModelOpt has a layout for experts stacked in one tensor [E, K, N]
    stackable: bool = False
    # what takes in the smoothing of a layer's input, so that no smoothing tensor is needed: the
    # norm before it, the linear before it; where neither can, and without any, it is kept
    folds_into: tuple[Literal["norm", "linear"], ...] = ()
    # why it is read but never written
    read_only: str = ""
    formula: str
    source: str
    readers: tuple[str, ...] = ()
    departures: tuple[str, ...] = ()

    @property
    def codec(self) -> str:
        """The name of its kernels."""
        return self.kernels or self.name

    def specs(self, *roles: Role) -> tuple[TensorSpec, ...]:
        """Return the tensors with one of `roles`, in order."""
        return tuple(spec for spec in self.tensors if spec.role in roles)

    def outputs(self, *, rows: int, columns: int) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return suffix -> (dtype, shape) of what every Linear [rows, columns] becomes."""
        return MappingProxyType(
            {
                spec.suffix: (spec.dtype, resolve(spec.shape, rows=rows, columns=columns))
                for spec in self.tensors
                if spec.required
            }
        )

    def spans(self, *, start: int, stop: int, columns: int) -> Mapping[str, tuple[int, int]]:
        """Return suffix -> (offset, nbytes) of rows [start, stop) within codes and scales.

        The first dimension of those tensors follows the rows, so the rows before `start` (which
        cuts between blocks) and those up to `stop` say where a slice lies by their sizes alone.
        """
        found = {}
        for spec in self.specs("codes", "scale"):
            before = nbytes(spec.dtype, resolve(spec.shape, rows=start, columns=columns))
            after = nbytes(spec.dtype, resolve(spec.shape, rows=stop, columns=columns))
            found[spec.suffix] = (before, after - before)
        return MappingProxyType(found)

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


@lru_cache(maxsize=4096)
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
