"""Weights against the source's: every quantized tensor decoded and compared, streamed by rows.

What no rule can see, right shapes with wrong numbers (a scale times eight, a transposed matrix,
another model's weights), shows here by name, on any machine and without an engine. Needs numpy.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qkernels import kernels_for, native
from qschema.checkpoint import open_checkpoint
from qschema.dtypes import HIGH_PRECISION, nbytes
from qschema.formats import Format
from qschema.safetensors import Stored
from qschema.strict import DocumentError, Finding
from qvalidate.context import Context, Module

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# source bytes that are decoded at a time
_SLICE_NBYTES = 8 << 20


def weight_findings(context: Context, reference: Path) -> Iterator[Finding]:
    """Yield what differs between the quantized weights of `context` and those of `reference`.

    Yields the problems of a `reference` that can't be opened. Tensors whose dtype or shape is not
    the declared one are left to the rules.
    """
    if context.declared is None:
        return
    try:
        source = open_checkpoint(reference)
    except DocumentError as problem:
        yield from problem.findings
        return
    for name, module in context.quantized.items():
        weight = source.tensors.get(f"{name}.weight")
        if weight is None:
            message = f"{reference} has no tensor {name}.weight"
            yield _finding(module, "weight-not-in-reference", message, severity="warning")
            continue
        outputs = _outputs(module, context.declared)
        if outputs is None:
            continue
        codes = next(iter(outputs.values()))
        if weight.shape != codes.shape or weight.dtype not in HIGH_PRECISION:
            message = (
                f"is {list(codes.shape)}, in {reference} it is {weight.dtype} {list(weight.shape)}"
            )
            yield _finding(module, "weight-reference-shape", message)
            continue
        error = relative_error(weight, outputs, context.declared)
        # a NaN is not below the bound either
        if not error <= context.declared.error_bound:
            message = (
                f"relative error {error:.4g} against {reference}; {context.declared.name} "
                f"can't exceed {context.declared.error_bound}: wrong scales, or another weight"
            )
            yield _finding(module, "weight-error", message)


def relative_error(weight: Stored, outputs: Mapping[str, Stored], declared: Format) -> float:
    """Return ||w - dequantized|| / ||w|| of one weight; 0.0 if both are all zero."""
    import numpy as np

    rows, columns = weight.shape
    block = declared.block_rows
    each = max(1, _SLICE_NBYTES // max(1, nbytes(weight.dtype, (block, columns)))) * block
    err2 = ref2 = 0.0
    for start in range(0, rows, each):
        stop = min(rows, start + each)
        row_nbytes = nbytes(weight.dtype, (1, columns))
        raw = _read(weight, start * row_nbytes, (stop - start) * row_nbytes)
        spans = declared.spans(start=start, stop=stop, columns=columns)
        parts = {suffix: _read(outputs[suffix], *span) for suffix, span in spans.items()}
        source = _widen(raw, weight.dtype)
        decoded = _dequantize(declared, parts, rows=stop - start, columns=columns)
        err2 += float(np.square(source - decoded, dtype=np.float64).sum())
        ref2 += float(np.square(source, dtype=np.float64).sum())
    if ref2 == 0.0:
        return 0.0 if err2 == 0.0 else float("inf")
    return float(np.sqrt(err2 / ref2))


def _outputs(module: Module, declared: Format) -> Mapping[str, Stored] | None:
    """Return the module's tensors by suffix, None unless they are as declared."""
    codes = module.codes(declared)
    if codes is None or len(codes.shape) != 2:
        return None
    expected = declared.outputs(rows=codes.shape[0], columns=codes.shape[1])
    found = {suffix: module.tensors.get(suffix) for suffix in expected}
    complete = {suffix: stored for suffix, stored in found.items() if stored is not None}
    as_declared = {suffix: (stored.dtype, stored.shape) for suffix, stored in complete.items()}
    return complete if as_declared == dict(expected) else None


def _read(stored: Stored, offset: int, size: int) -> bytearray:
    with open(stored.file, "rb", buffering=0) as file:
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        while done < size:
            count = os.preadv(file.fileno(), [view[done:]], stored.offset + offset + done)
            if count == 0:
                raise OSError(0, "ends before its header says", str(stored.file))
            done += count
    return buffer


def _widen(raw: bytearray, dtype: str) -> "npt.NDArray[np.float32]":
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def _dequantize(
    declared: Format, parts: Mapping[str, bytearray], *, rows: int, columns: int
) -> "npt.NDArray[np.float32]":
    import numpy as np

    if native.supports(declared.name):
        decoded = np.empty(rows * columns, np.float32)
        arrays = [np.frombuffer(parts[spec.suffix], np.uint8) for spec in declared.tensors]
        addresses = [array.ctypes.data for array in arrays]
        native.dequantize(declared.name, addresses, "F32", rows, columns, decoded.ctypes.data)
        return decoded
    import torch

    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "U8": torch.uint8}
    outputs = declared.outputs(rows=rows, columns=columns)
    tensors = {
        suffix: torch.frombuffer(parts[suffix], dtype=dtypes[dtype]).view(shape)
        for suffix, (dtype, shape) in outputs.items()
    }
    restored = kernels_for(declared.name).dequantize_torch(tensors, dtype=torch.float32)
    found: npt.NDArray[np.float32] = restored.numpy().reshape(-1)
    return found


def _finding(module: Module, rule: str, message: str, *, severity: str = "error") -> Finding:
    return Finding.model_validate(
        {
            "file": module.file,
            "where": f"{module.name}.weight",
            "rule": rule,
            "message": message,
            "severity": severity,
        }
    )
