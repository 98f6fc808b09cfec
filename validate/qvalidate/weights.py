"""Tensors against the source's: quantized ones decoded and compared, the others byte for byte.

What no rule can see, right shapes with wrong numbers (a scale times eight, a transposed matrix,
another model's norms), shows here by name, on any machine and without an engine. Needs numpy.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from qschema.checkpoint import Checkpoint, open_checkpoint
from qschema.dtypes import HIGH_PRECISION
from qschema.formats import Format
from qschema.safetensors import Stored
from qschema.strict import DocumentError, Finding
from qvalidate.context import LM_HEAD, Context, Module
from qvalidate.decode import read
from qvalidate.group_errors import Deviation, deviation

# bytes of each side that are compared at a time
_SLICE_NBYTES = 4 << 20


def weight_findings(context: Context, reference: Path) -> Iterator[Finding]:
    """Yield what differs between the tensors of `context` and those of `reference`.

    Yields the problems of a `reference` that can't be opened. Quantized tensors whose dtype or
    shape is not the declared one are left to the rules, as is a format that nobody declared.
    """
    if context.declared is None:
        return
    try:
        source = open_checkpoint(reference)
    except DocumentError as problem:
        yield from problem.findings
        return
    yield from _missing(context, source)
    yield from _kept(context, source)
    for name, module in context.quantized.items():
        weight = source.tensors.get(f"{name}.weight")
        if weight is None:
            message = f"{reference} has no tensor {name}.weight"
            yield _finding(module.file, f"{name}.weight", "weight-not-in-reference", message)
            continue
        outputs = _outputs(module, context.declared)
        if outputs is not None:
            yield from _quantized(module, weight, outputs, context.declared, reference)


def _missing(context: Context, source: Checkpoint) -> Iterator[Finding]:
    """Yield the tensors of the source that the checkpoint lacks under their names."""
    for name, stored in source.tensors.items():
        is_tied = name == f"{LM_HEAD}.weight" and context.is_tied
        if name not in context.checkpoint.tensors and not is_tied:
            message = f"{stored.dtype} {list(stored.shape)} in {stored.file}, is in no shard here"
            yield _finding(str(context.path), name, "tensor-missing", message)


def _kept(context: Context, source: Checkpoint) -> Iterator[Finding]:
    """Yield the tensors that are not quantized and are not the source's."""
    for name, stored in context.checkpoint.tensors.items():
        original = source.tensors.get(name)
        is_codes = name.endswith(".weight") and name.removesuffix(".weight") in context.quantized
        if original is None or (is_codes and stored.dtype != original.dtype):
            continue
        if (stored.dtype, stored.shape) != (original.dtype, original.shape):
            message = (
                f"is {stored.dtype} {list(stored.shape)}, in {source.path} it is "
                f"{original.dtype} {list(original.shape)}; what is not quantized is kept as it is"
            )
        elif count := _num_differing(stored, original):
            message = (
                f"{count} of {stored.nbytes} bytes are not those in {source.path}; "
                "what is not quantized is kept as it is"
            )
        else:
            continue
        yield _finding(str(stored.file), name, "kept-tensor-differs", message)


def _num_differing(stored: Stored, original: Stored) -> int:
    count = 0
    for offset in range(0, stored.nbytes, _SLICE_NBYTES):
        size = min(_SLICE_NBYTES, stored.nbytes - offset)
        found, expected = read(stored, offset, size), read(original, offset, size)
        if found != expected:
            import numpy as np

            differs = np.frombuffer(found, np.uint8) != np.frombuffer(expected, np.uint8)
            count += int(np.count_nonzero(differs))
    return count


def _quantized(
    module: Module,
    weight: Stored,
    outputs: Mapping[str, Stored],
    declared: Format,
    reference: Path,
) -> Iterator[Finding]:
    name, codes = f"{module.name}.weight", next(iter(outputs.values()))
    if weight.shape != codes.shape or weight.dtype not in HIGH_PRECISION:
        message = (
            f"is {list(codes.shape)}, in {reference} it is {weight.dtype} {list(weight.shape)}"
        )
        yield _finding(module.file, name, "weight-reference-shape", message)
        return
    found = deviation(weight, outputs, declared)
    if found.num_nonfinite:
        message = (
            f"{found.num_nonfinite} NaN or Inf in {reference}, left out of the comparison; "
            "they can't be told from other values in the codes"
        )
        yield Finding(
            file=module.file, where=name, rule="weight-nonfinite", message=message,
            severity="warning",
        )  # fmt: skip
    if found.num_beyond:
        yield _finding(module.file, name, "weight-error", _far(found, declared, reference))


def _far(found: Deviation, declared: Format, reference: Path) -> str:
    (top, bottom), (left, right) = found.rows, found.columns
    where = f"rows {top} to {bottom - 1}, columns {left} to {right - 1}"
    return (
        f"relative error {found.error:.4g} against {reference} in {where}, the worst of "
        f"{found.num_beyond} scale groups (of {found.num_groups}) that are beyond "
        f"{declared.error_bound}, which {declared.name} can't exceed: wrong scales, or another "
        "weight"
    )


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


def _finding(file: str, where: str, rule: str, message: str) -> Finding:
    return Finding(file=file, where=where, rule=rule, message=message)
