"""What a codec's module says of its tensors, and what is refused because of it.

Shapes: N rows out, K columns in, E matrices of a batch, R = E * N rows of all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from qkernels._checks import check_dtype
from qkernels._scales import GlobalScale, Layout
from qkernels.errors import KernelError

Shapes: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Declared(ABC):
    """A codec without its methods: names, shapes, arithmetic, launches, checks."""

    name: str
    # rows that share a scale or a byte; N and K of every weight must be multiples
    block_rows = 1
    multiple_of_n = 1
    multiple_of_k = 1
    # elements in a byte of the codes, along N and along K
    packed_n = 1
    packed_k = 1
    global_scale: GlobalScale | None = None
    # what kernels for any format go by
    layout: Layout
    # w / scale beyond these clips by more than rounding
    limits: tuple[float, float]

    # what a format's module says

    @abstractmethod
    def shapes(self, n: int, k: int) -> Shapes:
        """Suffix -> (dtype, shape) of the tensors whose first dimension follows the rows."""

    @abstractmethod
    def encode(self, w_NK: Tensor, global_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Those tensors, by the reference; w_NK is a checked matrix, contiguous."""

    @abstractmethod
    def scales(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """What each number is multiplied with, f32, broadcasts to [n, k]."""

    @abstractmethod
    def launch_quantize(
        self, w_RK: Tensor, outs: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int
    ) -> None:
        """Fill `outs` by the Triton kernel; n rows of w_RK, contiguous, belong to each matrix."""

    @abstractmethod
    def launch_dequantize(
        self, ins: tuple[Tensor, ...], global_scale_E: Tensor | None, n: int, out_RK: Tensor
    ) -> None:
        """Fill out_RK, contiguous, by the Triton kernel."""

    def values(self, codes: Tensor) -> Tensor:
        """Numbers that the codes stand for before scaling, f32 [N, K]; packed codes say how."""
        return codes.float()

    # checks

    def _check_weight(self, w: Tensor) -> tuple[int, int]:
        if w.ndim not in (2, 3):
            shape = tuple(w.shape)
            raise KernelError(f"expected a weight of shape (N, K) or (E, N, K), got shape {shape}")
        check_dtype(w.dtype)
        n, k = w.shape[-2:]
        self._check_size(n, k)
        return n, k

    def _check_matrix(self, w_NK: Tensor, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(N, K) of a matrix and its tensors."""
        n, k = self._check_weight(w_NK)
        found = self._check_tensors(tensors, w_NK.dtype)
        if w_NK.ndim != 2 or found != ((), n, k):
            raise KernelError(
                f"expected the tensors of a weight of shape (N, K), got {tuple(w_NK.shape)} "
                f"and tensors of shape {(*found[0], *found[1:])}"
            )
        return n, k

    def _check_size(self, n: int, k: int) -> None:
        for axis, size, multiple in (("N", n, self.multiple_of_n), ("K", k, self.multiple_of_k)):
            if size % multiple:
                raise KernelError(f"expected {axis} in multiples of {multiple}, got {size}")

    def _check_tensors(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[tuple[int, ...], int, int]:
        """(batch, N, K) of tensors that are as they should be, batch () or (E,)."""
        check_dtype(dtype)
        names = [*self.shapes(0, 0), *([self.global_scale.suffix] if self.global_scale else [])]
        if set(tensors) != set(names):
            raise KernelError(f"expected the tensors {sorted(names)}, got {sorted(tensors)}")
        codes = self._codes(tensors)
        if codes.ndim not in (2, 3):
            shape = tuple(codes.shape)
            raise KernelError(f"expected {names[0]} of shape (N, K) or (E, N, K), got {shape}")
        n, k = codes.shape[-2] * self.packed_n, codes.shape[-1] * self.packed_k
        self._check_size(n, k)
        batch = tuple(codes.shape[:-2])
        expected = {
            suffix: (dtype, (*batch, *shape))
            for suffix, (dtype, shape) in self.shapes(n, k).items()
        }
        if self.global_scale is not None:
            expected[self.global_scale.suffix] = (torch.float32, batch)
        for suffix, (wanted, shape) in expected.items():
            tensor = tensors[suffix]
            if tensor.dtype != wanted or tuple(tensor.shape) != shape:
                raise KernelError(
                    f"expected {suffix} of dtype {wanted} and shape {shape}, "
                    f"got dtype {tensor.dtype} and shape {tuple(tensor.shape)}"
                )
            if tensor.device != codes.device:
                raise KernelError(
                    f"expected {suffix} on {codes.device} beside {names[0]}, got {tensor.device}"
                )
        return batch, n, k

    def _given_scale(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return tensors[self.global_scale.suffix] if self.global_scale else None

    def _codes(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[next(iter(self.shapes(0, 0)))]
