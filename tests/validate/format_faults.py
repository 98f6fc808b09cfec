"""Faults in tensors and scales that only some formats have: one-byte scales, inputs, smoothing."""

from math import prod

from catalogue import GATE, K, Q, V, fault
from checkpoints import Draft, f32

from qschema.formats import find

EXPERT = "model.layers.0.block_sparse_moe.experts"
STACK = f"{EXPERT}.gate_up_proj"
# 0.5 in BF16
HALF = b"\x00\x3f"


def set_last(draft: Draft, name: str, data: bytes) -> None:
    """Set the last bytes of the tensor `name`."""
    dtype, shape, old = draft.tensor(name)
    draft.put(name, (dtype, shape, old[: -len(data)] + data))


def smooth(draft: Draft, module: str, count: int) -> None:
    """Give `module` a pre_quant_scale."""
    tensor = ("BF16", (count,), HALF * count)
    draft.put(f"{module}.pre_quant_scale", tensor, beside=f"{module}.weight")


@fault("missing-tensor", f"{Q}.weight_scale_2", algo="NVFP4")
def missing_global_scale(draft: Draft) -> None:
    draft.pop(f"{Q}.weight_scale_2")


@fault("missing-tensor", f"{Q}.input_scale", algo="FP8")
def never_calibrated(draft: Draft) -> None:
    draft.pop(f"{Q}.input_scale")


@fault("wrong-dtype", f"{Q}.weight_scale", algo="MXFP8")
def exponents_as_f8_e8m0(draft: Draft) -> None:
    _, shape, data = draft.tensor(f"{Q}.weight_scale")
    draft.put(f"{Q}.weight_scale", ("F8_E8M0", shape, data))


@fault("wrong-shape", f"{Q}.weight_scale", algo="NVFP4")
def scales_of_blocks_of_32(draft: Draft) -> None:
    dtype, (rows, groups), data = draft.tensor(f"{Q}.weight_scale")
    draft.put(f"{Q}.weight_scale", (dtype, (rows, groups // 2), data[: len(data) // 2]))


@fault("wrong-shape", f"{Q}.weight_scale", algo="W4A16_AWQ")
def int4_packed_along_the_columns(draft: Draft) -> None:
    dtype, (rows, columns), data = draft.tensor(f"{Q}.weight")
    draft.put(f"{Q}.weight", (dtype, (2 * rows, columns // 2), data))


@fault("wrong-shape", f"{Q}.weight", algo="NVFP4")
def columns_that_blocks_do_not_divide(draft: Draft) -> None:
    dtype, (rows, columns), data = draft.tensor(f"{Q}.weight")
    draft.put(f"{Q}.weight", (dtype, (rows, columns - 4), data[: rows * (columns - 4)]))


@fault("wrong-shape", f"{Q}.pre_quant_scale", algo="NVFP4_AWQ")
def smoothing_of_other_columns(draft: Draft) -> None:
    smooth(draft, Q, 128)


@fault("orphan-tensor", f"{Q}.pre_quant_scale", algo="NVFP4")
def smoothing_in_a_format_without(draft: Draft) -> None:
    smooth(draft, Q, 256)


@fault("orphan-tensor", f"{Q}.input_scale", algo="W4A16_NVFP4", severity="warning")
def input_scale_of_a_weight_only_format(draft: Draft) -> None:
    draft.put(f"{Q}.input_scale", ("F32", (), f32(0.5)), beside=f"{Q}.weight")


@fault("wrong-shape", f"{STACK}_weight_scale", model="mixtral", algo="NVFP4")
def scales_of_a_stack_not_turned(draft: Draft) -> None:
    draft.stack_experts(find("NVFP4"))
    dtype, (experts, groups, rows), data = draft.tensor(f"{STACK}_weight_scale")
    draft.put(f"{STACK}_weight_scale", (dtype, (experts, rows, groups), data))


@fault("missing-tensor", f"{STACK}_weight_scale_2", model="mixtral", algo="NVFP4")
def stack_without_its_global_scale(draft: Draft) -> None:
    draft.stack_experts(find("NVFP4"))
    draft.pop(f"{STACK}_weight_scale_2")


@fault("stack-unsupported", STACK, model="mixtral", algo="MXFP8")
def stack_of_a_format_without_that_layout(draft: Draft) -> None:
    draft.stack_experts(find("MXFP8"))


@fault("nonfinite-scale", f"{GATE}.weight_scale", algo="NVFP4")
def nan_among_e4m3_scales(draft: Draft) -> None:
    set_last(draft, f"{GATE}.weight_scale", b"\x7f")


@fault("nonfinite-scale", f"{GATE}.weight_scale", algo="NVFP4")
def negative_nan_among_e4m3_scales(draft: Draft) -> None:
    set_last(draft, f"{GATE}.weight_scale", b"\xff")


@fault("nonfinite-scale", f"{GATE}.weight_scale", algo="MXFP4")
def nan_among_e8m0_scales(draft: Draft) -> None:
    set_last(draft, f"{GATE}.weight_scale", b"\xff")


@fault("nonfinite-scale", f"{GATE}.weight_scale_2", algo="NVFP4")
def nan_global_scale(draft: Draft) -> None:
    set_last(draft, f"{GATE}.weight_scale_2", f32(float("nan")))


@fault("nonpositive-scale", f"{GATE}.weight_scale", algo="NVFP4", severity="warning")
def one_e4m3_scale_is_zero(draft: Draft) -> None:
    set_last(draft, f"{GATE}.weight_scale", b"\x00")


@fault("nonpositive-scale", f"{GATE}.weight_scale", algo="NVFP4")
def all_e4m3_scales_are_zero(draft: Draft) -> None:
    dtype, shape, _ = draft.tensor(f"{GATE}.weight_scale")
    draft.put(f"{GATE}.weight_scale", (dtype, shape, bytes(prod(shape))))


@fault("nonpositive-scale", f"{GATE}.weight_scale", algo="NVFP4")
def negative_e4m3_scale(draft: Draft) -> None:
    set_last(draft, f"{GATE}.weight_scale", b"\xb8")


@fault("nonpositive-scale", f"{Q}.input_scale", algo="FP8")
def input_scale_of_zero(draft: Draft) -> None:
    set_last(draft, f"{Q}.input_scale", f32(0.0))


@fault("nonfinite-scale", f"{Q}.input_scale", algo="W8A8_SQ_PER_CHANNEL")
def infinite_input_scale(draft: Draft) -> None:
    set_last(draft, f"{Q}.input_scale", f32(float("inf")))


@fault("nonpositive-scale", f"{Q}.pre_quant_scale", algo="W4A16_AWQ")
def smoothing_that_silences_a_column(draft: Draft) -> None:
    smooth(draft, Q, 256)
    set_last(draft, f"{Q}.pre_quant_scale", b"\x00\x00")


@fault("fused-scale-differs", f"{K}.weight_scale_2", algo="NVFP4")
def global_scales_of_qkv_differ(draft: Draft) -> None:
    set_last(draft, f"{K}.weight_scale_2", f32(3e-4))


@fault("fused-scale-differs", f"{EXPERT}.1.w3.weight_scale_2", model="mixtral", algo="W4A16_NVFP4")
def global_scales_of_one_expert_differ(draft: Draft) -> None:
    set_last(draft, f"{EXPERT}.1.w3.weight_scale_2", f32(3e-4))


@fault("fused-scale-differs", f"{V}.input_scale", algo="NVFP4", severity="warning")
def input_scales_of_qkv_differ(draft: Draft) -> None:
    set_last(draft, f"{V}.input_scale", f32(3e-4))


@fault(
    "fused-scale-differs",
    f"{EXPERT}.1.w3.weight_scale",
    model="mixtral",
    algo="FP8",
    severity="warning",
)
def gate_and_up_of_an_expert_differ(draft: Draft) -> None:
    set_last(draft, f"{EXPERT}.1.w3.weight_scale", f32(3e-4))


@fault(
    "expert-input-scales-differ",
    f"{EXPERT}.2.w2.input_scale",
    model="mixtral",
    algo="FP8",
    severity="warning",
)
def experts_were_calibrated_one_by_one(draft: Draft) -> None:
    set_last(draft, f"{EXPERT}.2.w2.input_scale", f32(3e-4))
