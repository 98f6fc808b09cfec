"""Bytes of a checkpoint as numbers: read by position, widened, decoded. Needs numpy.

N  rows out    K  columns in    G  groups: [down the rows, beside each other]
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from qkernels import kernels_for, native
from qschema.formats import Format, TensorSpec
from qschema.safetensors import Stored
from qvalidate.scales import BYTES, scalar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Held:
    """A tensor whose bytes are in memory: one expert of a stack, turned."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Source: TypeAlias = Stored | Held


def read(stored: Source, offset: int, size: int) -> bytearray:
    """Return `size` bytes of a tensor from `offset` within it.

    Raises OSError for a file that ends before.
    """
    if isinstance(stored, Held):
        return bytearray(stored.data[offset : offset + size])
    with open(stored.file, "rb", buffering=0) as file:
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        while done < size:
            count = os.preadv(file.fileno(), [view[done:]], stored.offset + offset + done)
            if count == 0:
                raise OSError(0, "ends before its header says", str(stored.file))
            done += count
    return buffer


def widen(raw: bytes | bytearray | memoryview, dtype: str) -> "F32":
    """Return the elements of BF16, F16 or F32 bytes as float32, exactly; NaN and Inf stay."""
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def dequantize(
    declared: Format,
    parts: Mapping[str, bytearray],
    *,
    rows: int,
    columns: int,
    global_scale: float = 1.0,
) -> "F32":
    """Return the float32 [rows, columns] that the bytes `parts` stand for.

    `parts` are the codes and the scales that follow the rows, by their suffixes; `global_scale` is
    the number of the tensor with that role.
    """
    import numpy as np

    if not native.supports(declared.codec):
        return _dequantize_torch(declared, parts, (rows, columns), global_scale)
    decoded = np.empty((rows, columns), np.float32)
    arrays = [
        np.frombuffer(parts[spec.suffix], np.uint8) for spec in declared.specs("codes", "scale")
    ]
    native.dequantize(
        declared.codec,
        [array.ctypes.data for array in arrays],
        "F32",
        rows,
        columns,
        decoded.ctypes.data,
        global_scale=global_scale,
    )
    return decoded


def _dequantize_torch(
    declared: Format, parts: Mapping[str, bytearray], size: tuple[int, int], global_scale: float
) -> "F32":
    import torch

    codec = kernels_for(declared.codec)
    tensors = {
        suffix: torch.frombuffer(parts[suffix], dtype=dtype).view(shape)
        for suffix, (dtype, shape) in codec.shapes(*size).items()
    }
    if codec.global_scale is not None:
        tensors[codec.global_scale.suffix] = torch.tensor(global_scale, dtype=torch.float32)
    found: F32 = codec.dequantize_torch(tensors, dtype=torch.float32).numpy()
    return found


def global_spec(declared: Format) -> TensorSpec | None:
    """Return the declaration of the scale of the whole weight, None if the codes have none."""
    return next((spec for spec in declared.specs("global") if spec.scales_codes), None)


def global_scale(declared: Format, outputs: Mapping[str, Source]) -> float:
    """Return the number that the scale of the whole weight holds, 1.0 in a format without one."""
    spec = global_spec(declared)
    if spec is None:
        return 1.0
    stored = outputs[spec.suffix]
    if isinstance(stored, Held):
        return float(widen(stored.data, stored.dtype)[0])
    found = scalar(stored)
    assert found is not None, stored
    return found


def element_scales(
    declared: Format, parts: Mapping[str, bytearray], *, rows: int, global_scale: float
) -> "F32":
    """Return what the codes of each group are multiplied with, float32 [G, G]."""
    import numpy as np

    # numpy keeps subnormal products, as the kernels do
    whole = np.float32(global_scale)
    specs = declared.specs("scale")
    if not specs:
        return np.full((1, 1), whole, np.float32)
    (spec,) = specs
    values = _numbers(parts[spec.suffix], spec.dtype)
    step = declared.block_rows if "ceil" in spec.shape[0] else 1
    with np.errstate(all="ignore"):
        return (values * whole).reshape(-(-rows // step), -1)


def _numbers(raw: bytearray, dtype: str) -> "F32":
    import numpy as np

    return _table(dtype)[np.frombuffer(raw, np.uint8)] if dtype in BYTES else widen(raw, dtype)


@cache
def _table(dtype: str) -> "F32":
    import numpy as np

    return np.array(BYTES[dtype], np.float32)
