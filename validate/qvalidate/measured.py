"""Numbers of a checkpoint for reports to draw: errors of its weights, and how its scales spread.

No verdict is made here and no rule is checked. Scales are read in samples, so that a picture of a
large checkpoint costs no second reading of it; neither numpy nor torch is needed.
"""

import math
import os
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from qschema.dtypes import BITS
from qschema.safetensors import Stored
from qschema.strict import DocumentError, Json, Numerous, Strict, load_json, violation
from qvalidate.context import Context
from qvalidate.scales import BYTES, Scale

# what is read of all scales together, and of one tensor at least
_BUDGET_NBYTES, _LEAST_NBYTES = 8 << 20, 256
# tensors of one kind that are looked into
_MOST_TENSORS = 128
# pieces of a tensor that is not read as a whole
_NUM_PIECES = 16
# what the converter leaves in a checkpoint, and how much of it is worth a picture
_CONVERSION_REPORT, _MOST_REPORT_NBYTES = "qconvert_report.json", 64 << 20

# a part of a dotted name
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")

ErrorSource: TypeAlias = Literal["reference", "conversion-report"]


class LayerError(Numerous):
    """How far one decoded weight is from its source; of a stack of experts, the worst."""

    module: str
    relative_error: float | None = Field(
        ge=0,
        allow_inf_nan=False,
        description="||w - decoded|| / ||w|| over the whole weight, w as it was quantized; null "
        "where that is no finite number",
    )
    expected: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="the largest that the format's rounding explains; null where not known",
    )


class ScaleHistogram(Strict):
    """How the scales of one kind of tensor spread over the powers of two."""

    kind: str = Field(description="the tensors' name, with * for each number in it")
    role: str = Field(description="scale, global, input, smoothing or kv")
    num_tensors: int = Field(ge=1)
    num_scales: int = Field(ge=0, description="in all tensors; the counts are of a sample")
    first_log2: int = Field(
        description="counts[i] is of magnitudes from 2^(first_log2 + i) up to twice that"
    )
    counts: list[int]
    num_zero: int = Field(default=0, ge=0)
    num_negative: int = Field(default=0, ge=0, description="also in the counts, by magnitude")
    num_nonfinite: int = Field(default=0, ge=0)


class Measured(Strict):
    """What was measured of a checkpoint, for pictures. `errors_from` says who measured them."""

    errors_from: ErrorSource | None = Field(
        default=None, description="null where no weight was compared with a source"
    )
    errors: list[LayerError] = Field(default_factory=list)
    scales: list[ScaleHistogram] = Field(default_factory=list)

    @model_validator(mode="after")
    def _errors_have_a_source(self) -> Self:
        if self.errors and self.errors_from is None:
            raise violation("measured-source", "errors need to say where they are from")
        return self


def measure(context: Context, errors: Sequence[LayerError] | None = None) -> Measured:
    """Return the histograms of the scales of `context`, and the errors of its weights.

    errors: what `weights.compared` yielded, None without a reference. Then they are those that the
    converter reported in the checkpoint, if it did.
    """
    source: ErrorSource | None = "reference"
    if errors is None:
        errors = _reported(context.path / _CONVERSION_REPORT)
        source = "conversion-report" if errors else None
    return Measured(
        errors_from=source, errors=list(errors), scales=list(_histograms(context.scales))
    )


def finite(value: float) -> float | None:
    """Return `value`, None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def kind_of(name: str) -> str:
    """Return `name` with * for its numbers: `model.layers.*.mlp.experts.*.up_proj`."""
    return _NUMBER.sub("*", name)


def _reported(file: Path) -> list[LayerError]:
    """Return the errors in a converter's report; none of one that is missing, none or too large."""
    try:
        if file.stat().st_size > _MOST_REPORT_NBYTES:
            return []
        document = load_json(file)
    except (DocumentError, OSError):
        return []
    entries = document.get("tensors") if isinstance(document, dict) else None
    found = (_reported_error(entry) for entry in (entries if isinstance(entries, list) else []))
    return [error for error in found if error is not None]


def _reported_error(entry: Json) -> LayerError | None:
    if not isinstance(entry, dict):
        return None
    error, outputs = entry.get("relative_error"), entry.get("outputs")
    if isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < math.inf:
        return None
    written = outputs if isinstance(outputs, list) else []
    names = [part.get("name") for part in written if isinstance(part, dict)]
    weights = [name for name in names if isinstance(name, str) and name.endswith(".weight")]
    name = weights[0] if weights else entry.get("source")
    if not isinstance(name, str):
        return None
    return LayerError(module=name.removesuffix(".weight"), relative_error=float(error))


def _histograms(scales: Sequence[Scale]) -> Iterator[ScaleHistogram]:
    kinds: Mapping[tuple[str, str], list[Scale]] = defaultdict(list)
    for scale in scales:
        kinds[kind_of(scale.stats.stored.name), scale.role].append(scale)
    picked = {key: _spread(found, _MOST_TENSORS) for key, found in kinds.items()}
    share = _BUDGET_NBYTES // max(1, sum(map(len, picked.values())))
    for (kind, role), found in kinds.items():
        tally = _Tally()
        for scale in picked[kind, role]:
            for piece in _sample(scale.stats.stored, max(share, _LEAST_NBYTES)):
                tally.add(piece, scale.stats.stored.dtype)
        first = min(tally.bins, default=0)
        yield ScaleHistogram(
            kind=kind,
            role=role,
            num_tensors=len(found),
            num_scales=sum(scale.stats.count for scale in found),
            first_log2=first,
            counts=[tally.bins[bin_] for bin_ in range(first, max(tally.bins, default=-1) + 1)],
            num_zero=tally.num_zero,
            num_negative=tally.num_negative,
            num_nonfinite=tally.num_nonfinite,
        )


def _spread(found: list[Scale], most: int) -> list[Scale]:
    """Return `most` of `found`, evenly spread."""
    if len(found) <= most:
        return found
    return [found[index * len(found) // most] for index in range(most)]


def _sample(stored: Stored, share: int) -> Iterator[bytes]:
    """Yield the bytes of a tensor, of one larger than `share` evenly spread pieces."""
    each, pieces = stored.nbytes, 1
    if stored.nbytes > share:
        # a multiple of the largest element's size
        each, pieces = max(16, share // _NUM_PIECES // 8 * 8), _NUM_PIECES
    with open(stored.file, "rb", buffering=0) as file:
        for index in range(pieces):
            start = (stored.nbytes - each) * index // max(1, pieces - 1) // 8 * 8
            yield os.pread(file.fileno(), each, stored.offset + start)


class _Tally:
    """Counts by floor(log2 |scale|), and of what has none."""

    def __init__(self) -> None:
        self.bins: Counter[int] = Counter()
        self.num_zero = self.num_negative = self.num_nonfinite = 0

    def add(self, piece: bytes, dtype: str) -> None:
        """Count the scales in `piece`."""
        for value, count in _values(piece, dtype).items():
            if not math.isfinite(value):
                self.num_nonfinite += count
                continue
            if value == 0:
                self.num_zero += count
                continue
            # frexp's mantissa is in [0.5, 1)
            self.bins[math.frexp(value)[1] - 1] += count
            self.num_negative += count if value < 0 else 0


def _values(piece: bytes, dtype: str) -> Counter[float]:
    """Return how often each number is in `piece`."""
    if dtype in BYTES:
        meaning = BYTES[dtype]
        found: Counter[float] = Counter()
        for code, count in Counter(piece).items():
            found[meaning[code]] += count
        return found
    if dtype == "BF16":
        # a bf16 is the upper half of an f32
        wide = bytearray(2 * len(piece))
        wide[2::4], wide[3::4] = piece[::2], piece[1::2]
        piece, dtype = bytes(wide), "F32"
    letter = {"F16": "e", "F32": "f", "F64": "d"}[dtype]
    return Counter(struct.unpack(f"<{len(piece) * 8 // BITS[dtype]}{letter}", piece))
