"""What the scales hold. Their bytes are read in pieces; the weights' are not."""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule


@rule(
    "nonfinite-scale",
    severity="error",
    summary="a scale is NaN or infinite",
    text="""A NaN scale makes its whole block, row or tensor NaN, and one NaN activation
    makes the rest of the model NaN. It comes from a division by zero, or from a source weight
    that held one.""",
    effects={"vllm": "wrong"},
)
def nonfinite_scale(context: Context) -> Iterator[Spot]:
    for stats in context.scales.values():
        if stats.num_nan or stats.num_inf:
            message = f"{stats.num_nan} NaN and {stats.num_inf} infinite of {stats.count} scales"
            yield Spot(str(stats.stored.file), stats.stored.name, message)


@rule(
    "nonpositive-scale",
    severity="error",
    summary="a scale is zero or negative",
    text="""Scales multiply on dequantization and are positive by construction; an all-zero
    block has scale 1. A zero erases its block (or divides by zero), a negative one flips
    every sign in it.""",
    effects={"vllm": "wrong"},
)
def nonpositive_scale(context: Context) -> Iterator[Spot]:
    for stats in context.scales.values():
        if stats.num_zero or stats.num_negative:
            message = (
                f"{stats.num_zero} zero and {stats.num_negative} negative of {stats.count} scales, "
                f"smallest {stats.minimum:.6g}"
            )
            yield Spot(str(stats.stored.file), stats.stored.name, message)


@rule(
    "denormal-scale",
    severity="note",
    summary="a scale is below the smallest normal f32",
    text="""Weights that small are as good as zero, and kernels that flush denormals make
    them zero. Rarely intended; a block of padding that was not quite zero looks like this.""",
)
def denormal_scale(context: Context) -> Iterator[Spot]:
    for stats in context.scales.values():
        if stats.num_denormal:
            message = f"{stats.num_denormal} of {stats.count} scales are below 2^-126"
            yield Spot(str(stats.stored.file), stats.stored.name, message)


@rule(
    "constant-scale",
    severity="note",
    summary="all scales of a tensor are equal",
    text="""A scale per row or block follows the weights, so many of them being one value
    hints at scales that were never computed. It is what an all-zero weight, or one of
    constant magnitude, looks like too.""",
)
def constant_scale(context: Context) -> Iterator[Spot]:
    for stats in context.scales.values():
        if stats.count >= 4 and stats.minimum == stats.maximum:
            message = f"all {stats.count} scales are {stats.minimum:.6g}"
            yield Spot(str(stats.stored.file), stats.stored.name, message)
