"""What every format's kernels have in common: one `Codec` per module, the same methods on all.

A codec's module holds what is particular to it: the shapes of its tensors, the torch reference,
what its codes stand for, and the launches of its Triton kernels. Everything else is here: batches,
the scale of a whole weight, native calls, dequantization, statistics; checks are in `_declared`. No
format's name may be compared in either file.

Shapes: N rows out, K columns in, E matrices of a batch, R = E * N rows of all of them.
"""

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from qkernels import native
from qkernels._checks import SOURCE_DTYPES, check_contiguous, check_cpu
from qkernels._declared import Declared, Shapes
from qkernels._scales import scale_from_amax
from qkernels.amax import amax_native, amax_torch, amax_triton
from qkernels.errors import KernelError
from qkernels.stats import RowStats, by_row_chunks, error_stats

__all__ = ["SOURCE_DTYPES", "Codec", "Shapes"]


class Codec(Declared):
    """Quantize and dequantize in one format, by the reference, Triton and C: the same bytes.

    A weight is [N, K] or a batch [E, N, K], bf16, f16 or f32, any strides, any values. Tensors are
    keyed by suffix: codes, then scales by block or row, then the scale of the whole weight, which
    is [] for a matrix and [E] for a batch.
    """

    # what callers use

    def quantize_torch(self, w: Tensor, *, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Quantized tensors by the reference.

        global_scale: f32 [], or [E] for a batch, positive and finite; of codecs that have one,
        default that of the weight's own amax.
        Raises: KernelError for another rank, dtype or size.
        """
        n, k = self._check_weight(w)
        scale = self._own_scale(w, global_scale, self.amax_torch)
        if w.ndim == 3:
            return self._batch(w, scale, self.quantize_torch)
        tensors = self.encode(w.detach().contiguous(), scale)
        return self._named(dict(zip(self.shapes(n, k), tensors, strict=True)), scale)

    def quantize_triton(
        self, w: Tensor, *, global_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The same tensors as quantize_torch, by the Triton kernel, on the device of w.

        A batch is one launch, unless its matrices end within a block of rows.
        """
        n, k = self._check_weight(w)
        scale = self._own_scale(w, global_scale, self.amax_triton)
        if not w.numel():
            return self.quantize_torch(w, global_scale=scale)
        if w.ndim == 3 and n % self.block_rows:
            return self._batch(w, scale, self.quantize_triton)
        batch = w.shape[:-2]
        w_RK = w.detach().contiguous().view(prod(batch) * n, k)
        outs = _empty(self.shapes(w_RK.shape[0], k), w.device)
        scale_E = None if scale is None else scale.view(-1)
        self.launch_quantize(w_RK, tuple(outs.values()), scale_E, n)
        shaped = {
            suffix: outs[suffix].view(*batch, *shape)
            for suffix, (_, shape) in self.shapes(n, k).items()
        }
        return self._named(shaped, scale)

    def quantize_into_triton(self, w_NK: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """None, after filling codes and scales of `tensors` with what quantize_triton returns.

        One launch, and nothing is allocated. w_NK and tensors: contiguous, packed codes and their
        weight at a multiple of 4 bytes; of codecs that have one, the scale of the whole weight is
        read.
        Raises: KernelError for a batch, other names, dtypes, shapes or strides.
        """
        n, k = self._check_matrix(w_NK, tensors)
        for suffix, tensor in {"w": w_NK, **tensors}.items():
            check_contiguous(suffix, tensor)
        outs = tuple(tensors[suffix] for suffix in self.shapes(n, k))
        scale = self._given_scale(tensors)
        if w_NK.numel():
            self.launch_quantize(w_NK, outs, None if scale is None else scale.view(1), n)

    def quantize_native(
        self, w: Tensor, *, global_scale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The same tensors as quantize_torch, by the C kernel; w is on the CPU.

        Raises: KernelError also when w is on another device or there is no native kernel.
        """
        n, k = self._check_weight(w)
        check_cpu(w)
        scale = self._own_scale(w, global_scale, self.amax_native)
        if w.ndim == 3:
            return self._batch(w, scale, self.quantize_native)
        source, outs = w.detach().contiguous(), _empty(self.shapes(n, k), w.device)
        addresses = [tensor.data_ptr() for tensor in outs.values()]
        dtype = SOURCE_DTYPES[w.dtype]
        native.quantize(
            self.name, source.data_ptr(), dtype, n, k, addresses, global_scale=_number(scale)
        )
        return self._named(outs, scale)

    def quantize(self, w: Tensor, *, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        """The same tensors as quantize_torch, by the fastest implementation for w's device."""
        if w.is_cuda:
            return self.quantize_triton(w, global_scale=global_scale)
        if w.device.type == "cpu" and native.supports(self.name):
            return self.quantize_native(w, global_scale=global_scale)
        return self.quantize_torch(w, global_scale=global_scale)

    def dequantize_torch(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The weight, [N, K] or [E, N, K] of dtype (bf16, f16 or f32), by the reference.

        value(code) * scale in f32, rounded once to dtype, nearest even; a product beyond the range
        of dtype becomes infinite; every NaN is the positive quiet NaN.

        Raises: KernelError for other names, dtypes or shapes.
        """
        batch, n, k = self._check_tensors(tensors, dtype)
        if batch:
            parts = [self.dequantize_torch(part, dtype=dtype) for part in _unbind(tensors)]
            return torch.stack(parts) if parts else self._empty_weight(tensors, dtype)
        product = self.values(self._codes(tensors)) * self.scales(tensors, n, k)
        decoded = product.to(dtype).masked_fill(product.isnan(), torch.nan)
        # not .contiguous(), which leaves the strides of a single row or column alone
        return decoded.clone(memory_format=torch.contiguous_format)

    def dequantize_triton(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The same weight as dequantize_torch, by the Triton kernel, on the tensors' device."""
        batch, n, k = self._check_tensors(tensors, dtype)
        if batch and n % self.block_rows:
            parts = [self.dequantize_triton(part, dtype=dtype) for part in _unbind(tensors)]
            return torch.stack(parts) if parts else self._empty_weight(tensors, dtype)
        out = self._empty_weight(tensors, dtype)
        if out.numel():
            out_RK = out.view(prod(batch) * n, k)
            shapes = self.shapes(out_RK.shape[0], k)
            ins = tuple(
                tensors[suffix].detach().contiguous().view(shape)
                for suffix, (_, shape) in shapes.items()
            )
            scale = self._given_scale(tensors)
            scale_E = None if scale is None else scale.contiguous().view(-1)
            self.launch_dequantize(ins, scale_E, n, out_RK)
        return out

    def dequantize_native(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The same weight as dequantize_torch, by the C kernel; the tensors are on the CPU."""
        batch, n, k = self._check_tensors(tensors, dtype)
        check_cpu(self._codes(tensors))
        if batch:
            parts = [self.dequantize_native(part, dtype=dtype) for part in _unbind(tensors)]
            return torch.stack(parts) if parts else self._empty_weight(tensors, dtype)
        ins = [tensors[suffix].detach().contiguous() for suffix in self.shapes(n, k)]
        out = self._empty_weight(tensors, dtype)
        native.dequantize(
            self.name,
            [tensor.data_ptr() for tensor in ins],
            SOURCE_DTYPES[dtype],
            n,
            k,
            out.data_ptr(),
            global_scale=_number(self._given_scale(tensors)),
        )
        return out

    def dequantize(
        self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The same weight as dequantize_torch, by the fastest implementation for the device."""
        self._check_tensors(tensors, dtype)
        codes = self._codes(tensors)
        if codes.is_cuda:
            return self.dequantize_triton(tensors, dtype=dtype)
        if codes.device.type == "cpu" and native.supports(self.name):
            return self.dequantize_native(tensors, dtype=dtype)
        return self.dequantize_torch(tensors, dtype=dtype)

    def row_stats_torch(self, w_NK: Tensor, tensors: Mapping[str, Tensor]) -> RowStats:
        """What quantization lost of the matrix w_NK; bounded memory, no wait for the device.

        Raises: KernelError for a batch, other names, dtypes or shapes, or those of another weight.
        """
        _, k = self._check_matrix(w_NK, tensors)
        w_NK = w_NK.detach()
        low, high = self.limits

        def chunk(start: int, stop: int) -> RowStats:
            before, after = self.shapes(start, k), self.shapes(stop, k)
            part = {
                suffix: tensors[suffix][before[suffix][1][0] : after[suffix][1][0]]
                for suffix in after
            }
            if self.global_scale is not None:
                part[self.global_scale.suffix] = tensors[self.global_scale.suffix]
            rows = stop - start
            w_f32_NK = w_NK[start:stop].float()
            scale_NK = self.scales(part, rows, k).expand(rows, k)
            y_NK = w_f32_NK / scale_NK
            clipped_NK = w_f32_NK.isfinite() & ((y_NK > high) | (y_NK < low))
            return error_stats(w_f32_NK, self.values(self._codes(part)), scale_NK, clipped_NK)

        return by_row_chunks(w_NK, chunk, multiple=self.block_rows)

    def row_stats_triton(self, w_NK: Tensor, tensors: Mapping[str, Tensor]) -> RowStats:
        """The same counts and, but for the order of the f64 additions, sums, by a Triton kernel."""
        self._check_matrix(w_NK, tensors)
        stats = RowStats.empty(w_NK.shape[0], w_NK.device)
        whole = {suffix: tensor.detach().contiguous() for suffix, tensor in tensors.items()}
        self.row_stats_into_triton(w_NK.detach().contiguous(), whole, stats)
        return stats

    def row_stats_into_triton(
        self, w_NK: Tensor, tensors: Mapping[str, Tensor], stats: RowStats
    ) -> None:
        """None, after writing the sums of row_stats_triton to `stats` and adding its counts.

        One launch, and nothing is allocated. w_NK and tensors: contiguous.
        Raises: KernelError also for other strides.
        """
        from qkernels import _triton_stats

        n, k = self._check_matrix(w_NK, tensors)
        for suffix, tensor in {"w": w_NK, **tensors}.items():
            check_contiguous(suffix, tensor)
        ins = [tensors[suffix] for suffix in self.shapes(n, k)]
        if n:
            _triton_stats.row_stats(
                w_NK, ins, self._given_scale(tensors), stats, layout=self.layout, limits=self.limits
            )

    def row_stats(self, w_NK: Tensor, tensors: Mapping[str, Tensor]) -> RowStats:
        """The same by the fastest implementation for w's device."""
        if w_NK.is_cuda:
            return self.row_stats_triton(w_NK, tensors)
        return self.row_stats_torch(w_NK, tensors)

    amax_torch = staticmethod(amax_torch)
    amax_triton = staticmethod(amax_triton)
    amax_native = staticmethod(amax_native)

    # small parts

    def _own_scale(
        self, w: Tensor, given: Tensor | None, amax: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        if self.global_scale is None:
            if given is not None:
                raise KernelError(f"{self.name} has no scale of the whole weight, got one")
            return None
        if given is None:
            return scale_from_amax(amax(w), source=w.dtype, divisor=self.global_scale.divisor)
        if given.dtype != torch.float32 or given.shape != w.shape[:-2]:
            raise KernelError(
                f"expected a global scale of dtype float32 and shape {tuple(w.shape[:-2])}, "
                f"got dtype {given.dtype} and shape {tuple(given.shape)}"
            )
        return given.to(w.device).contiguous()

    def _named(self, tensors: dict[str, Tensor], scale: Tensor | None) -> dict[str, Tensor]:
        if self.global_scale is not None and scale is not None:
            tensors[self.global_scale.suffix] = scale
        return tensors

    def _batch(
        self, w: Tensor, scale: Tensor | None, quantize: Callable[..., dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors of a batch, matrix by matrix."""
        n, k = w.shape[-2:]
        parts = [
            quantize(matrix, global_scale=None if scale is None else scale[place])
            for place, matrix in enumerate(w)
        ]
        if not parts:
            shapes = {
                suffix: (dtype, (0, *shape)) for suffix, (dtype, shape) in self.shapes(n, k).items()
            }
            return self._named(_empty(shapes, w.device), scale)
        return {suffix: torch.stack([part[suffix] for part in parts]) for suffix in parts[0]}

    def _empty_weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        codes = self._codes(tensors)
        n, k = codes.shape[-2] * self.packed_n, codes.shape[-1] * self.packed_k
        return torch.empty(*codes.shape[:-2], n, k, dtype=dtype, device=codes.device)


def _empty(shapes: Shapes, device: torch.device) -> dict[str, Tensor]:
    return {
        suffix: torch.empty(shape, dtype=dtype, device=device)
        for suffix, (dtype, shape) in shapes.items()
    }


def _unbind(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    num = len(next(iter(tensors.values())))
    return [{suffix: tensor[place] for suffix, tensor in tensors.items()} for place in range(num)]


def _number(scale: Tensor | None) -> float:
    return 1.0 if scale is None else float(scale)
