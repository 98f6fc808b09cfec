"""Tensors and config groups that several declarations have in common."""

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
