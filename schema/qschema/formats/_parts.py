"""Tensors, bounds, formulas and config groups that several declarations have in common."""

from pydantic import JsonValue

from qschema.formats.declare import Sharing, TensorSpec

E4M3_CODES = TensorSpec(
    suffix="weight", dtype="F8_E4M3", shape=("N", "K"), role="codes", meaning="E4M3 codes"
)
E2M1_CODES = TensorSpec(
    suffix="weight",
    dtype="U8",
    shape=("N", "K/2"),
    role="codes",
    meaning="two E2M1 codes per byte, the even column in the low nibble",
)
INT8_CODES = TensorSpec(
    suffix="weight", dtype="I8", shape=("N", "K"), role="codes", meaning="INT8 codes"
)
INT4_CODES = TensorSpec(
    suffix="weight",
    dtype="U8",
    shape=("N/2", "K"),
    role="codes",
    meaning="two INT4 codes (two's complement) per byte, the even row in the low nibble",
)
ROW_SCALE = TensorSpec(
    suffix="weight_scale",
    dtype="F32",
    shape=("N",),
    role="scale",
    meaning="scale of each output channel (row)",
)
INT4_SCALE = TensorSpec(
    suffix="weight_scale",
    dtype="F32",
    shape=("N", "K/128"),
    role="scale",
    meaning="scale of each 128 columns of a row",
)
E8M0_SCALE = TensorSpec(
    suffix="weight_scale",
    dtype="U8",
    shape=("N", "K/32"),
    role="scale",
    meaning="E8M0 scale of each 32 columns: 2^(byte - 127)",
)
PRE_QUANT_SCALE = TensorSpec(
    suffix="pre_quant_scale",
    dtype="BF16",
    shape=("K",),
    role="smoothing",
    meaning="the input is multiplied with it; absent where the layer before has taken it in",
    required=False,
)


# half a step of three mantissa bits, 2^-4, and a little for subnormal codes and rounded scales
E4M3_ERROR = 0.0626
# half a step of one mantissa bit: 1/5 at the ties 1.25, 2.5 and 5
E2M1_ERROR = 0.2
# nothing relative: half a step of the block's or row's codes, whatever the number
INTEGER_ERROR = 1e-6

TINY_DEPARTURE = (
    "an amax below the smallest normal number of the source dtype counts as that number"
)
NV_DEPARTURES = (
    "a weight of zeros gets weight_scale_2 1.0 and zeros; ModelOpt writes 0.0, NaN scales and "
    "codes of 6",
    TINY_DEPARTURE,
    "a negative number whose quotient underflows to zero keeps its sign (code 8)",
)
# in f32 the logarithm of the number after 2^10 is 10; bf16 and f16 are too coarse for that
LOGARITHM_DEPARTURE = (
    "the power of two is exact; ModelOpt takes a logarithm in f32, which can make it half of that "
    "for f32 weights"
)
MXFP4_DEPARTURES = (
    "ties go to the even code; ModelOpt's go toward zero",
    "zeros have code 0; ModelOpt writes code 8, -0",
    LOGARITHM_DEPARTURE,
)
MXFP4_FORMULA = (
    "weight_scale = 127 + the smallest e >= -127 with amax <= 6 * 2^e, 0 for a block of zeros; "
    "code = e2m1(w / 2^e), ties to even, the sign bit where w < 0"
)
INT8_FORMULA = (
    "weight_scale = max(amax, tiny) / 127, 1.0 for a row of zeros; code = w / weight_scale rounded "
    "to nearest even, clamped to -128..127"
)
INT4_FORMULA = (
    "weight_scale = max(amax, tiny) / 7, 1.0 for a block of zeros; code = w / weight_scale rounded "
    "to nearest even, clamped to -8..7"
)


def nv_formula(*, divisor: float) -> str:
    """Return how weights of the NVFP4 family are encoded."""
    return (
        f"weight_scale_2 = max(amax, tiny) / {divisor:g}, 1.0 for zeros; weight_scale = e4m3(clamp("
        "block amax / (6 * weight_scale_2), 2^-9, 448)), 1.0 for a block of zeros; code = e2m1(w / "
        "(weight_scale * weight_scale_2)), ties to even, the sign bit where w < 0"
    )


def nv_scales(*, group: int, divisor: float) -> tuple[TensorSpec, TensorSpec]:
    """Return weight_scale and weight_scale_2 of the NVFP4 family."""
    return (
        TensorSpec(
            suffix="weight_scale",
            dtype="F8_E4M3",
            shape=("N", f"K/{group}"),
            role="scale",
            meaning=f"scale of each {group} columns of a row, itself scaled by weight_scale_2",
        ),
        TensorSpec(
            suffix="weight_scale_2",
            dtype="F32",
            shape=(),
            role="global",
            meaning=f"amax / {divisor:g}, the largest of fused siblings",
            divisor=divisor,
            shared="siblings",
        ),
    )


def input_scale(*, divisor: float, zero: float, shared: Sharing) -> TensorSpec:
    """Return the static scale of the input; all experts of a projection share it in any case."""
    return TensorSpec(
        suffix="input_scale",
        dtype="F32",
        shape=(),
        role="input",
        meaning=f"largest magnitude of the input / {divisor:g}, from calibration",
        divisor=divisor,
        zero=zero,
        shared=shared,
    )


def group(*, bits: int, kind: str = "float", size: int | None = None) -> dict[str, JsonValue]:
    """Return one side, weights or inputs, of a config group."""
    side: dict[str, JsonValue] = {"dynamic": False, "num_bits": bits, "type": kind}
    return side if size is None else {**side, "group_size": size}
