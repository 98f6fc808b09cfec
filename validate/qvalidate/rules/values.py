"""What the scales hold. Their bytes are read in pieces; the weights' are not."""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Severity, Spot, rule
from qvalidate.scales import ScaleRole, ScaleStats

# codes are coarse: fewer scales than this may well be equal. E8M0 scales often are, all of them
_MANY = {"F8_E4M3": 256, "F32": 4}


@rule(
    "nonfinite-scale",
    severity="error",
    summary="a scale is NaN or infinite",
    text="""A NaN scale makes its whole block, row or tensor NaN, and one NaN activation
    makes the rest of the model NaN. It comes from a division by zero, or from a source weight
    that held one. Block scales of one byte have NaN codes too: 0x7f and 0xff of E4M3, 255 of
    E8M0.""",
    effects={"vllm": "wrong"},
)
def nonfinite_scale(context: Context) -> Iterator[Spot]:
    for _, stats in _scales(context):
        if stats.num_nan or stats.num_inf:
            message = f"{stats.num_nan} NaN and {stats.num_inf} infinite of {stats.count} scales"
            yield Spot(str(stats.stored.file), stats.stored.name, message)


@rule(
    "nonpositive-scale",
    severity="error",
    summary="a scale is zero or negative",
    text="""Scales multiply on dequantization and are positive by construction; an all-zero
    block has scale 1. A zero erases its block (or divides by zero), a negative one flips
    every sign in it. Some zeros among E4M3 block scales are a warning: writers that do not
    hold them at the smallest code lose blocks that are tiny beside the rest of the weight. An
    input_scale of zero divides by zero, a pre_quant_scale of zero silences a column.""",
    effects={"vllm": "wrong"},
)
def nonpositive_scale(context: Context) -> Iterator[Spot]:
    for _, stats in _scales(context):
        if stats.num_zero or stats.num_negative:
            is_underflow = (
                stats.stored.dtype == "F8_E4M3"
                and not stats.num_negative
                and stats.num_zero < stats.count
            )
            severity: Severity | None = "warning" if is_underflow else None
            message = (
                f"{stats.num_zero} zero and {stats.num_negative} negative of {stats.count} scales, "
                f"smallest {stats.minimum:.6g}"
            )
            yield Spot(str(stats.stored.file), stats.stored.name, message, severity)


@rule(
    "denormal-scale",
    severity="note",
    summary="a scale is below the smallest normal f32",
    text="""Weights that small are as good as zero, and kernels that flush denormals make
    them zero. Rarely intended; a block of padding that was not quite zero looks like this.""",
)
def denormal_scale(context: Context) -> Iterator[Spot]:
    for _, stats in _scales(context):
        if stats.num_denormal:
            message = f"{stats.num_denormal} of {stats.count} scales are below 2^-126"
            yield Spot(str(stats.stored.file), stats.stored.name, message)


@rule(
    "constant-scale",
    severity="note",
    summary="all scales of a tensor are equal",
    text="""A scale per row or block follows the weights, so many of them being one value
    hints at scales that were never computed. It is what an all-zero weight, or one of
    constant magnitude, looks like too. Powers of two (E8M0) are often equal and not looked at.""",
)
def constant_scale(context: Context) -> Iterator[Spot]:
    for role, stats in _scales(context):
        many = _MANY.get(stats.stored.dtype)
        if role != "scale" or many is None or stats.count < many:
            continue
        if stats.minimum == stats.maximum:
            message = f"all {stats.count} scales are {stats.minimum:.6g}"
            yield Spot(str(stats.stored.file), stats.stored.name, message)


def _scales(context: Context) -> Iterator[tuple[ScaleRole, ScaleStats]]:
    yield from ((scale.role, scale.stats) for scale in context.scales)
