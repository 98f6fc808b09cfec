"""Multiplying a slice by smoothing's vectors, in place, before anything else is done with it."""

from typing import TYPE_CHECKING

from qconvert.backends import address
from qkernels import native

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]


def scale(
    slice_: memoryview,
    *,
    dtype: str,
    rows: int,
    columns: int,
    along: str,
    factor: "F32",
    divisor: "F32 | None",
) -> None:
    """Make w = round(w * factor / divisor) of every element of `slice_`, [rows, columns].

    along: "columns" for a number per column, "rows" for one per row. The product and the quotient
    are f32 operations; one rounding to `dtype`, nearest even.
    """
    import numpy as np

    factor = np.ascontiguousarray(factor, np.float32)
    if native.available():
        run = native.scale_columns if along == "columns" else native.scale_rows
        divided = None if divisor is None else np.ascontiguousarray(divisor, np.float32)
        run(
            address(slice_),
            dtype,
            rows,
            columns,
            factor.ctypes.data,
            0 if divided is None else divided.ctypes.data,
        )
        return
    import torch

    from qconvert.backends.torch_cpu import DTYPES

    weight = torch.frombuffer(slice_, dtype=DTYPES[dtype]).view(rows, columns)
    shape = (1, columns) if along == "columns" else (rows, 1)
    product = weight.float() * torch.from_numpy(factor).view(shape)
    if divisor is not None:
        product = product / torch.from_numpy(divisor).view(shape)
    weight.copy_(product.to(weight.dtype))
