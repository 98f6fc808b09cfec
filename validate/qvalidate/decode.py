"""Bytes of a checkpoint as numbers: read by position, widened, decoded. Needs numpy."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qkernels import kernels_for, native
from qschema.formats import Format
from qschema.safetensors import Stored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def read(stored: Stored, offset: int, size: int) -> bytearray:
    """Return `size` bytes of a tensor from `offset` within it.

    Raises OSError for a file that ends before.
    """
    with open(stored.file, "rb", buffering=0) as file:
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        while done < size:
            count = os.preadv(file.fileno(), [view[done:]], stored.offset + offset + done)
            if count == 0:
                raise OSError(0, "ends before its header says", str(stored.file))
            done += count
    return buffer


def widen(raw: memoryview, dtype: str) -> "npt.NDArray[np.float32]":
    """Return the elements of BF16, F16 or F32 bytes as float32, exactly; NaN and Inf stay."""
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def dequantize(
    declared: Format, parts: Mapping[str, bytearray], *, rows: int, columns: int
) -> "npt.NDArray[np.float32]":
    """Return the float32 [rows, columns] that the bytes `parts` stand for, by their suffixes."""
    import numpy as np

    if native.supports(declared.name):
        decoded = np.empty(rows * columns, np.float32)
        arrays = [np.frombuffer(parts[spec.suffix], np.uint8) for spec in declared.tensors]
        addresses = [array.ctypes.data for array in arrays]
        native.dequantize(declared.name, addresses, "F32", rows, columns, decoded.ctypes.data)
        return decoded.reshape(rows, columns)
    import torch

    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "U8": torch.uint8}
    outputs = declared.outputs(rows=rows, columns=columns)
    tensors = {
        suffix: torch.frombuffer(parts[suffix], dtype=dtypes[dtype]).view(shape)
        for suffix, (dtype, shape) in outputs.items()
    }
    restored = kernels_for(declared.name).dequantize_torch(tensors, dtype=torch.float32)
    found: npt.NDArray[np.float32] = restored.numpy().reshape(rows, columns)
    return found
