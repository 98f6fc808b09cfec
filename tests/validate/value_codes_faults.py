"""Faults of values in the codes: of another weight, in another order, or of another meaning."""

import numpy as np
from catalogue import DOWN, GATE, O_PROJ, PC_PT, K, Q, V
from checkpoints import Draft
from value_faults import EXPERTS, Values, edit, numbers, swap, values

UP = GATE.replace("gate_proj", "up_proj")
W1, W2, W3 = (f"{EXPERTS}.0.{leaf}" for leaf in ("w1", "w2", "w3"))


@values("weights", "weight-error", where=f"{GATE}.weight")
def gate_and_up_swapped(draft: Draft) -> None:
    swap(draft, GATE, UP)


@values("weights", "weight-error", where=f"{W3}.weight", model="mixtral", algo="NVFP4")
def gate_and_up_of_an_expert_swapped(draft: Draft) -> None:
    swap(draft, W1, W3)


@values("weights", "weight-error", where=f"{O_PROJ}.weight")
def query_and_output_swapped(draft: Draft) -> None:
    swap(draft, Q, O_PROJ)


@values("weights", "weight-error", where=f"{K}.weight", algo="NVFP4")
def key_and_value_swapped(draft: Draft) -> None:
    swap(draft, K, V)


@values("weights", "weight-error", where=f"{W2}.weight", model="mixtral", algo="FP8")
def experts_swapped(draft: Draft) -> None:
    swap(draft, f"{EXPERTS}.0", f"{EXPERTS}.1")


@values("weights", "weight-error", where=f"{EXPERTS}.3.w1.weight", model="mixtral", algo="FP8")
def expert_is_a_copy_of_another(draft: Draft) -> None:
    for leaf in ("w1", "w2", "w3"):
        for suffix in ("weight", "weight_scale"):
            tensor = draft.tensor(f"{EXPERTS}.2.{leaf}.{suffix}")
            draft.put(f"{EXPERTS}.3.{leaf}.{suffix}", tensor)


@values("weights", "weight-error", "kept-tensor-differs", where=f"{DOWN}.weight")
def layers_swapped(draft: Draft) -> None:
    swap(draft, "model.layers.0", "model.layers.1")


@values("weights", "weight-error", where=f"{Q}.weight")
def square_weight_transposed(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes.T)
    scale = numbers(draft, f"{Q}.weight_scale")
    edit(draft, f"{Q}.weight_scale", lambda _: scale.transpose(2, 1, 0, 3))


@values("rules", "shape-disagrees-with-config", where=f"{W1}.weight", model="mixtral", algo="FP8")
def expert_transposed(draft: Draft) -> None:
    dtype, shape, _ = draft.tensor(f"{W1}.weight")
    codes = np.ascontiguousarray(numbers(draft, f"{W1}.weight").T)
    draft.put(f"{W1}.weight", (dtype, shape[::-1], codes.tobytes()))


@values("weights", "weight-error", where=f"{W1}.weight", model="mixtral", algo="FP8")
def expert_transposed_under_its_old_shape(draft: Draft) -> None:
    edit(draft, f"{W1}.weight", lambda codes: codes.T.reshape(codes.shape))


@values("weights", "weight-error", where=f"{Q}.weight", algo="NVFP4")
def nibbles_in_the_other_order(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes << 4 | codes >> 4)


@values("weights", "weight-error", where=f"{Q}.weight", algo="W4A16_AWQ")
def rows_packed_in_the_other_order(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes << 4 | codes >> 4)


@values("weights", "weight-error", where=f"{Q}.weight", algo=PC_PT)
def odd_and_even_columns_swapped(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes.reshape(-1, 2)[:, ::-1].reshape(codes.shape))


@values("weights", "weight-error", where=f"{Q}.weight", algo="MXFP4")
def columns_interleaved_for_the_kernel(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: np.concatenate([codes[:, ::2], codes[:, 1::2]], 1))


@values("weights", "weight-error", where=f"{Q}.weight")
def rows_of_heads_permuted(draft: Draft) -> None:
    """As Meta's checkpoints have them: the halves of each rotary pair beside each other."""

    def permute(codes: Values) -> Values:
        heads = codes.reshape(4, 2, 32, 256)
        return heads.transpose(0, 2, 1, 3).reshape(codes.shape)

    edit(draft, f"{Q}.weight", permute)


@values("weights", "weight-error", where=f"{Q}.weight")
def sign_bits_flipped(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes ^ 0x80)


@values("none")
def lowest_bit_of_one_code_flipped(draft: Draft) -> None:
    """A disk's or a network's error; only a digest in qconvert_report.json could tell."""

    def flip(codes: Values) -> Values:
        made = codes.copy()
        made[7, 7] ^= 1
        return made

    edit(draft, f"{Q}.weight", flip)


@values("rules", "codes-unsigned", where=f"{Q}.weight")
def sign_bits_lost(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes & 0x7F)


@values("weights", "weight-error", where=f"{Q}.weight", algo=PC_PT)
def codes_shifted_by_one_column(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: np.roll(codes, 1, axis=1))


@values("weights", "weight-error", where=f"{Q}.weight", algo="W8A16")
def one_row_of_zeros(draft: Draft) -> None:
    def clear(codes: Values) -> Values:
        made = codes.copy()
        made[100] = 0
        return made

    edit(draft, f"{Q}.weight", clear)


@values("rules", "codes-constant", where=f"{Q}.weight")
def codes_of_zeros(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes * 0)


@values("rules", "codes-constant", where=f"{Q}.weight", algo="W8A16")
def codes_of_one_value(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes * 0 + 1)


@values("rules", "codes-saturated", where=f"{Q}.weight", algo="NVFP4")
def blocks_saturated(draft: Draft) -> None:
    """Only the signs are left."""
    edit(draft, f"{Q}.weight", lambda codes: codes | 0x77)


@values("weights", "weight-error", where=f"{Q}.weight", algo="W8A16")
def clipped_at_a_quarter_of_the_range(draft: Draft) -> None:
    """Too few codes are at the end for a rule to be sure."""
    scale = numbers(draft, f"{Q}.weight_scale")
    edit(draft, f"{Q}.weight", lambda codes: np.clip(codes.astype(int) * 4, -127, 127))
    edit(draft, f"{Q}.weight_scale", lambda _: scale / 4)


@values("rules", "codes-nan", where=f"{Q}.weight")
def cast_without_saturation(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes | (codes & 0x7F >= 0x70) * 0x7F)


@values("rules", "codes-unsigned", "codes-saturated", where=f"{Q}.weight", algo="W4A16_AWQ")
def offset_binary_for_twos_complement(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes ^ 0x88)


@values("rules", "codes-unsigned", where=f"{Q}.weight", algo="W8A16")
def bytes_with_128_added(draft: Draft) -> None:
    edit(draft, f"{Q}.weight", lambda codes: codes.astype(int) ^ -128)


@values("weights", "weight-error", where=f"{DOWN}.weight")
def codes_of_e5m2_under_the_label_of_e4m3(draft: Draft) -> None:
    """The exponent's lowest bit becomes the mantissa's highest."""

    def shift(codes: Values) -> Values:
        exponent = np.minimum((codes >> 3 & 15) + 8, 30)
        made: Values = codes & 0x80 | exponent << 2 | codes >> 1 & 3
        return made

    edit(draft, f"{DOWN}.weight", shift)


@values("rules", "wrong-dtype", where=f"{DOWN}.weight")
def codes_under_the_label_of_e5m2(draft: Draft) -> None:
    _, shape, data = draft.tensor(f"{DOWN}.weight")
    draft.put(f"{DOWN}.weight", ("F8_E5M2", shape, data))


@values("weights", "weight-error", where=f"{GATE}.weight", algo="NVFP4")
def codes_are_plain_integers(draft: Draft) -> None:
    """INT4 of two's complement where E2M1 is meant."""
    signed = np.array([0, 1, 1, 2, 2, 3, 4, 6, 0, 15, 15, 14, 14, 13, 12, 10], "u1")
    edit(draft, f"{GATE}.weight", lambda codes: signed[codes & 15] | signed[codes >> 4] << 4)
