"""What the codes of the quantized weights look like, by a sample of each: no weight is read whole.

A sample is the first, the middle and the last rows of the codes, 4 KiB of each where the weights
are few. Of more than 4096 weights that many are sampled, evenly chosen, and of all of them together
at most 4 MiB, so that a checkpoint of any size costs about the same: 0.3 s of a core for 45,000
weights. Whether a value is the source's shows in a comparison only (`--reference`).
"""

import os
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import starmap
from math import isnan, prod

from qschema.formats import Format
from qschema.safetensors import Stored
from qvalidate.context import Context, Module, codes_spec
from qvalidate.rules.registry import Spot, rule
from qvalidate.scales import E4M3, F32_TINY

_PIECE_NBYTES = 4096
_NUM_PIECES = 3
_MOST_MODULES = 4096
_MOST_NBYTES = 4 << 20
# codes that say something; a smaller weight may well hold one value, or no negative one
_ENOUGH = 64
# how far weights are read whose sample is one value: each, and all of them together
_PIECE_READ_ON, _MOST_READ_ON = 1 << 20, 16 << 20
# of the sampled codes
_MOST_SATURATED = 0.5
# how often the code of the lowest number has to be there for each zero
_OFFSET_RATIO = 8

_HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# element -> what its codes stand for
_NUMBERS = {
    "E4M3": E4M3,
    "E2M1": (*_HALVES, *(-value for value in _HALVES)),
    "INT8": tuple(float(code - 256 if code > 127 else code) for code in range(256)),
    "INT4": tuple(float(code - 16 if code > 7 else code) for code in range(16)),
}
# magnitudes from here on are those of the largest codes; two's complement has one more below zero
_SATURATED = {"E4M3": 448.0, "E2M1": 6.0, "INT8": 127.0, "INT4": 7.0}
# what symmetric scales never need: numbers that would be 0 if the codes were not signed
_LOWEST = {"INT8": -128.0, "INT4": -8.0}


@dataclass(frozen=True)
class Sample:
    """The sampled codes of one weight: number -> how often it is there. -0 counts as 0."""

    stored: Stored
    element: str
    counts: Counter[float]
    num_nan: int
    # of how many weights, if not all of them are sampled
    remark: str

    @cached_property
    def num_codes(self) -> int:
        """The sampled codes, those of NaN included."""
        return self.counts.total() + self.num_nan

    def spot(self, message: str) -> Spot:
        """Return the place of this weight, with what was seen there."""
        return Spot(str(self.stored.file), self.stored.name, f"{message}{self.remark}")


@rule(
    "codes-nan",
    severity="error",
    summary="the codes of a weight have NaN among them",
    text="""E4M3 has two codes for NaN, 0x7f and 0xff, and no writer makes them of numbers:
    quantizing saturates at 448. One of them makes its row's output NaN for every token. They come
    from a NaN in the source, from a cast without saturation, or from bytes that are no codes at
    all. A sample of each weight is looked at: first, middle and last rows.""",
    effects={"vllm": "wrong"},
)
def codes_nan(context: Context) -> Iterator[Spot]:
    for sample in _samples(context):
        if sample.num_nan:
            yield sample.spot(f"{sample.num_nan} of {sample.num_codes} sampled codes are NaN")


@rule(
    "codes-constant",
    severity="warning",
    summary="all sampled codes of a weight are one value",
    text="""The first, the middle and the last rows hold one and the same number. Zeros are
    what a file has where nothing was written: the file system fills the hole, and the size is
    right. A weight that is zero in the source too is no finding: its scales say so, by being 1 or
    as small as can be.""",
)
def codes_constant(context: Context) -> Iterator[Spot]:
    blank, left_nbytes = _blank(context), _MOST_READ_ON
    for sample in _samples(context):
        if len(sample.counts) > 1 or sample.num_nan or sample.num_codes < _ENOUGH:
            continue
        (value,) = sample.counts
        if not value and sample.stored.name in blank:
            continue
        # one outlier elsewhere can make all others zero; that is no hole
        size = min(sample.stored.nbytes, _PIECE_READ_ON, left_nbytes)
        left_nbytes -= size
        if _is_constant(sample.stored, size):
            yield sample.spot(f"all {sample.num_codes} sampled codes are {value or 0.0:g}")


@rule(
    "codes-saturated",
    severity="warning",
    summary="most sampled codes of a weight have the largest magnitude",
    text="""A scale that fits the weights makes the largest number of a block, row or tensor the
    largest code, and few others. More than half of them there means that the scale was too small
    when the codes were made, and that the weight is clipped: dequantized, it has lost its shape.
    Weights of one magnitude (binary ones) look like this and are right.""",
)
def codes_saturated(context: Context) -> Iterator[Spot]:
    for sample in _samples(context):
        limit = _SATURATED[sample.element]
        num = sum(count for value, count in sample.counts.items() if abs(value) >= limit)
        if num > _MOST_SATURATED * sample.num_codes and len(sample.counts) > 1:
            message = f"{num} of {sample.num_codes} sampled codes are {limit:g} or more"
            yield sample.spot(f"{message} in magnitude, the most that {sample.element} has")


@rule(
    "codes-unsigned",
    severity="warning",
    summary="the codes of a weight look unsigned",
    text="""All formats here have signed codes, and a weight has numbers of both signs. None below
    zero in the whole sample means that signs were lost. Integers where the lowest code, which
    symmetric scales never need, is eight times as frequent as 0 look like offset binary: 8 (or 128)
    was added to make them unsigned, as AWQ's and GPTQ's own files have it, and every value would be
    off by half of the range.""",
)
def codes_unsigned(context: Context) -> Iterator[Spot]:
    for sample in _samples(context):
        zeros = sample.counts[0.0]
        lowest = _LOWEST.get(sample.element)
        num = sample.counts[lowest] if lowest is not None else 0
        nonzero = sample.counts.total() - zeros
        if len(sample.counts) > 1 and nonzero >= _ENOUGH and min(sample.counts) >= 0:
            yield sample.spot(f"none of {sample.num_codes} sampled codes is below zero")
        elif len(sample.counts) > 1 and num >= _ENOUGH and num > _OFFSET_RATIO * zeros:
            message = f"{num} of {sample.num_codes} sampled codes are {lowest:g}, and {zeros} are 0"
            yield sample.spot(f"{message}: unsigned codes with an offset?")


def _blank(context: Context) -> frozenset[str]:
    """Return the weights whose scales are those of zeros, or of numbers that are as good as zero.

    That is 1.0, or the smallest E4M3, for blocks of zeros, and less than the smallest normal f32.
    """
    stats = {scale.stats.stored.name: scale.stats for scale in context.scales}
    found = set()
    for module, declared in context.encoded:
        largest = 1.0
        for spec in declared.tensors:
            stored = module.tensors.get(spec.suffix)
            known = stats.get(stored.name) if stored is not None and spec.scales_codes else None
            if known is not None and spec.role in ("scale", "global"):
                largest *= known.maximum
                if spec.role == "scale" and known.minimum == known.maximum in (1.0, E4M3[1]):
                    found.add(module.weight_name)
        if largest == 1 or largest < F32_TINY:
            found.add(module.weight_name)
    return frozenset(found)


def _is_constant(stored: Stored, size: int) -> bool:
    """Return whether the first `size` bytes of a tensor are one value, as those before were."""
    with open(stored.file, "rb", buffering=0) as file:
        raw = os.pread(file.fileno(), size, stored.offset)
    return not raw.strip(raw[:1])


@dataclass
class _Latest:
    """The samples of the context that was asked about last: each rule here asks for them."""

    context: "weakref.ref[Context] | None" = None
    samples: tuple[Sample, ...] = field(default=())


_LATEST = _Latest()


def _samples(context: Context) -> tuple[Sample, ...]:
    """Return the samples of the weights whose codes have the declared dtype, in their order."""
    if _LATEST.context is None or _LATEST.context() is not context:
        _LATEST.samples = tuple(_sampled(context))
        _LATEST.context = weakref.ref(context)
    return _LATEST.samples


def _sampled(context: Context) -> Iterator[Sample]:
    every = [found for found in starmap(_codes, context.encoded) if found is not None]
    num = min(len(every), _MOST_MODULES)
    chosen = [every[place * len(every) // num] for place in range(num)]
    remark = f"; {num} of {len(every)} weights were sampled" if num < len(every) else ""
    by_file: dict[str, list[tuple[Stored, Format]]] = {}
    for stored, declared in chosen:
        by_file.setdefault(str(stored.file), []).append((stored, declared))
    found: dict[str, Sample] = {}
    share = _MOST_NBYTES // (_NUM_PIECES * max(1, num))
    for file, weights in by_file.items():
        with open(file, "rb", buffering=0) as shard:
            for stored, declared in weights:
                raw = _read(shard.fileno(), stored, min(_PIECE_NBYTES, max(_ENOUGH, share)))
                found[stored.name] = _counted(stored, declared, raw, remark)
    yield from (found[stored.name] for stored, _ in chosen)


def _codes(module: Module, declared: Format) -> tuple[Stored, Format] | None:
    stored = module.codes(declared)
    if stored is None or stored.dtype != codes_spec(declared).dtype or not stored.nbytes:
        return None
    return stored, declared


def _read(descriptor: int, stored: Stored, piece_nbytes: int) -> bytes:
    """Return about `piece_nbytes` of the first, the middle and the last rows; all of a small one.

    Pieces begin with a row, and end with one where rows are shorter than a piece.
    """
    if stored.nbytes <= _NUM_PIECES * piece_nbytes:
        return os.pread(descriptor, stored.nbytes, stored.offset)
    rows = prod(stored.shape[:-1])
    row_nbytes = stored.nbytes // rows
    each = max(1, piece_nbytes // row_nbytes)
    size = min(each * row_nbytes, piece_nbytes)
    return b"".join(
        os.pread(descriptor, size, stored.offset + row * row_nbytes)
        for row in (0, min(rows // 2, rows - each), rows - each)
    )


def _counted(stored: Stored, declared: Format, raw: bytes, remark: str) -> Sample:
    numbers = _NUMBERS[declared.element]
    counts: Counter[float] = Counter()
    num_nan = 0
    for byte, count in Counter(raw).items():
        for code in (byte,) if len(numbers) == 256 else (byte & 15, byte >> 4):
            if isnan(numbers[code]):
                num_nan += count
            else:
                counts[numbers[code]] += count
    return Sample(stored, declared.element, counts, num_nan, remark)
