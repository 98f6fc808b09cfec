"""Tensors against the source's: quantized ones decoded and compared, the others byte for byte.

What no rule can see, right shapes with wrong numbers (a scale times eight, a transposed matrix,
another model's norms), shows here by name, on any machine and without an engine. Needs numpy.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from qschema.checkpoint import open_checkpoint
from qschema.dtypes import HIGH_PRECISION
from qschema.formats import Format
from qschema.safetensors import Stored
from qschema.strict import DocumentError, Finding, load_json
from qvalidate.context import LM_HEAD, Context, Module
from qvalidate.decode import read
from qvalidate.group_errors import Deviation, deviation
from qvalidate.layout import as_declared, sizes
from qvalidate.measured import LayerError, finite
from qvalidate.pairs import Pair
from qvalidate.rules.registry import Severity, some
from qvalidate.side_files import side_findings
from qvalidate.smoothing import Smoothings, UnknownSmoothingError
from qvalidate.sources import Origin, stacked_pairs

# what the converter leaves in a checkpoint
REPORT = "qconvert_report.json"
# bytes of each side that are compared at a time
_SLICE_NBYTES = 4 << 20


def weight_findings(context: Context, reference: Path) -> Iterator[Finding]:
    """Yield the findings of `compared`."""
    return (found for found in compared(context, reference) if isinstance(found, Finding))


def compared(context: Context, reference: Path) -> Iterator[Finding | LayerError]:
    """Yield what differs between the tensors of `context` and those of `reference`.

    With it the error of every weight that could be decoded. Yields the problems of a `reference`
    that can't be opened. Quantized tensors whose dtype or shape is not the declared one are left
    to the rules, as is a format that nobody declared.
    """
    if context.obeyed is None:
        return
    try:
        source = Origin(open_checkpoint(reference))
    except DocumentError as problem:
        yield from problem.findings
        return
    smoothings = Smoothings(context, source)
    yield from side_findings(context.checkpoint, source.checkpoint)
    yield from _missing(context, source)
    yield from _kept(context, smoothings)
    for module, declared in context.encoded:
        weight = source.tensors.get(module.weight_name)
        if weight is None:
            message = f"{reference} has no tensor {module.weight_name}"
            yield _finding(module.file, module.weight_name, "weight-not-in-reference", message)
            continue
        outputs = as_declared(module, declared)
        if outputs is not None:
            yield from _quantized(module, declared, weight, outputs, smoothings)


def _missing(context: Context, source: Origin) -> Iterator[Finding]:
    """Yield the tensors of the source that the checkpoint lacks under any of their names.

    A stack of experts may be there as one weight per expert and projection.
    """
    here = context.checkpoint.tensors
    dropped = _dropped(context.path / REPORT)
    left_out = []
    for name, stored in source.checkpoint.tensors.items():
        is_head = name == f"{LM_HEAD}.weight" and context.is_tied
        if is_head or name in here or source.hub_name(name) in here:
            continue
        if name in dropped:
            left_out.append(name)
            continue
        parts = source.parts(stored)
        is_split = any(part in here for part in parts)
        for lost in [part for part in parts if part not in here] if is_split else [name]:
            wanted = parts.get(lost, stored)
            message = f"{wanted.dtype} {list(wanted.shape)} in {wanted.file}, is in no shard here"
            yield _finding(str(context.path), lost, "tensor-missing", message)
    if left_out:
        message = f"the conversion was asked to drop {some(left_out)}, and did"
        yield _finding(str(context.path / REPORT), "$.tensors", "tensor-dropped", message, "note")


def _dropped(report: Path) -> frozenset[str]:
    """Return the source's tensors that the converter's report lists as dropped.

    None without a report, or with one that is none: what is missing is then an error.
    """
    try:
        document = load_json(report)
    except (DocumentError, OSError):
        return frozenset()
    entries = document.get("tensors") if isinstance(document, dict) else None
    names = [
        entry.get("source")
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and entry.get("action") == "drop"
    ]
    return frozenset(name for name in names if isinstance(name, str))


def _kept(context: Context, smoothings: Smoothings) -> Iterator[Finding]:
    """Yield the tensors that are not quantized and are not the source's."""
    source = smoothings.source
    codes = {module.weight_name for module in context.quantized.values()}
    for name, stored in context.checkpoint.tensors.items():
        original = source.tensors.get(name)
        if original is None or (name in codes and stored.dtype != original.dtype):
            continue
        if (stored.dtype, stored.shape) != (original.dtype, original.shape):
            message = (
                f"is {stored.dtype} {list(stored.shape)}, in {source.path} it is "
                f"{original.dtype} {list(original.shape)}; what is not quantized is kept as it is"
            )
        elif name in smoothings.folded:
            # a wrong norm shows as wrong weights
            message = f"holds the smoothing of {some(list(smoothings.folded[name]))}"
            yield _finding(str(stored.file), name, "smoothing-folded", message, "note")
            continue
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
    declared: Format,
    weight: Stored,
    outputs: Mapping[str, Stored],
    smoothings: Smoothings,
) -> Iterator[Finding | LayerError]:
    name, reference = module.weight_name, smoothings.source.path
    size = sizes(module, declared)
    shape = weight.shape[:-2] + weight.shape[:-3:-1] if module.is_stack else weight.shape
    experts = outputs["weight"].shape[:1] if module.is_stack else ()
    if shape != (*experts, *(size or ())) or weight.dtype not in HIGH_PRECISION:
        message = f"is {list(size or ())}, in {reference} it is {weight.dtype} {list(weight.shape)}"
        yield _finding(module.file, name, "weight-reference-shape", message)
        return
    try:
        found = _deviations(module, declared, weight, outputs, smoothings)
    except UnknownSmoothingError as problem:
        yield _finding(module.file, name, "weight-not-compared", str(problem), "note")
        return
    yield _layer_error(module, found)
    if num := sum(part.num_nonfinite for part in found):
        message = (
            f"{num} NaN or Inf in {reference}, left out of the comparison; "
            "they can't be told from other values in the codes"
        )
        yield _finding(module.file, name, "weight-nonfinite", message, "warning")
    if any(part.num_beyond for part in found):
        yield _finding(module.file, name, "weight-error", _far(found, declared, reference))


def _deviations(
    module: Module,
    declared: Format,
    weight: Stored,
    outputs: Mapping[str, Stored],
    smoothings: Smoothings,
) -> list[Deviation]:
    """Return the deviation of the weight, of each expert's in a stack."""
    if module.is_stack:
        pairs = (Pair(source, parts, declared) for source, parts in stacked_pairs(weight, outputs))
        return [deviation(pair) for pair in pairs]
    pair = Pair(weight, outputs, declared)
    return [deviation(Pair(weight, outputs, declared, smoothings.of(module, pair)))]


def _layer_error(module: Module, found: list[Deviation]) -> LayerError:
    """Return the error of a weight, of the worst expert of a stack; NaN is worse than any other."""
    worst = max(found, key=_badness, default=Deviation())
    return LayerError(
        module=module.name,
        relative_error=finite(worst.whole_error),
        expected=finite(worst.whole_allowed),
    )


def _badness(part: Deviation) -> float:
    return math.inf if math.isnan(part.whole_error) else part.whole_error


def _far(found: list[Deviation], declared: Format, reference: Path) -> str:
    beyond = [index for index, part in enumerate(found) if part.num_beyond]
    worst = max(beyond, key=lambda index: found[index].error)
    (top, bottom), (left, right) = found[worst].rows, found[worst].columns
    expert = f"expert {worst}, " if len(found) > 1 else ""
    where = f"{expert}rows {top} to {bottom - 1}, columns {left} to {right - 1}"
    return (
        f"relative error {found[worst].error:.4g} against {reference} in {where}, the worst of "
        f"{sum(part.num_beyond for part in found)} scale groups (of "
        f"{sum(part.num_groups for part in found)}) that are beyond what {declared.name} explains: "
        "wrong scales, or another weight"
    )


def _finding(
    file: str, where: str, rule: str, message: str, severity: Severity = "error"
) -> Finding:
    return Finding(file=file, where=where, rule=rule, message=message, severity=severity)
