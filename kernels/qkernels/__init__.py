"""How one tensor is encoded: quantize and dequantize, per format, the same bits on every device.

Each format is one file named like the format in lower case; it exports what `Kernels` lists.
Importing this package imports no torch: a format's module does.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from qkernels.errors import KernelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qkernels.stats import RowStats

# modules of this package that are no formats
_SHARED = frozenset({"errors", "native", "stats"})


class Kernels(Protocol):
    """What a format's module exports; weights are [N, K], tensors keyed by suffix."""

    def quantize(self, w_NK: "Tensor", /) -> "dict[str, Tensor]":
        """Quantized tensors, by the fastest implementation for the weight's device."""

    def quantize_torch(self, w_NK: "Tensor", /) -> "dict[str, Tensor]":
        """Quantized tensors, by the reference."""

    def quantize_triton(self, w_NK: "Tensor", /) -> "dict[str, Tensor]":
        """Quantized tensors, by the Triton kernel."""

    def quantize_native(self, w_NK: "Tensor", /) -> "dict[str, Tensor]":
        """Quantized tensors, by the C kernel."""

    def dequantize(
        self, tensors: "Mapping[str, Tensor]", /, *, dtype: "torch.dtype" = ...
    ) -> "Tensor":
        """The weight, by the fastest implementation for the tensors' device."""

    def dequantize_torch(
        self, tensors: "Mapping[str, Tensor]", /, *, dtype: "torch.dtype" = ...
    ) -> "Tensor":
        """The weight, by the reference."""

    def dequantize_triton(
        self, tensors: "Mapping[str, Tensor]", /, *, dtype: "torch.dtype" = ...
    ) -> "Tensor":
        """The weight, by the Triton kernel."""

    def dequantize_native(
        self, tensors: "Mapping[str, Tensor]", /, *, dtype: "torch.dtype" = ...
    ) -> "Tensor":
        """The weight, by the C kernel."""

    def row_stats(self, w_NK: "Tensor", tensors: "Mapping[str, Tensor]", /) -> "RowStats":
        """What quantization lost, per row."""


def formats() -> list[str]:
    """Names, upper case and sorted, of the formats that have kernels."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(stem.upper() for stem in stems - _SHARED if not stem.startswith("_"))


def kernels_for(format_name: str) -> Kernels:
    """The kernels of a format, by its public name in any case. Imports torch.

    Raises: KernelError for a name without kernels; lists the names that have some.
    """
    if format_name.upper() not in formats():
        raise KernelError(f"no kernels for {format_name!r}; there are {', '.join(formats())}")
    return cast(Kernels, importlib.import_module(f"qkernels.{format_name.lower()}"))
