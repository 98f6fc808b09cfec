"""How each format's numbers come about: by our numeric contract, and by NVIDIA ModelOpt 0.47.0.

Written from measurements of ModelOpt on CPU, for reading: plain torch, one whole weight at a time,
nothing from qkernels. `CONTRACT` has an encoder per format; `MODELOPT` is the same table but for
the formats in which ModelOpt departs. An encoder takes a `Weight` and returns suffix -> tensor.

All quotients and products are f32 operations of their own, amax is exact in the source dtype, codes
round to nearest even unless said otherwise.

Shapes: N rows out, K columns in, B blocks of a row, G columns in a block, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3_MAX = 448.0
E2M1_MAX = 6.0
INT8_MAX = 127.0
INT4_MAX = 7.0
TINY = 2.0**-126
NAN_CODE = 0xFF
# the lowest quotient that gets code 1, 2, ...; a tie belongs to the even code of its two
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Encoded = dict[str, Tensor]


@dataclass(frozen=True)
class Weight:
    """One weight as it is quantized, after smoothing.

    w: bf16 [N, K] of a Linear, [E, K, N] of stacked experts.
    amax: f32 []. The largest |w| of all that share one scale, unless calibration clipped it.
    block_amax: f32 [N, K/16] where a search chose it per block (NVFP4 only), and block_limit: the
    largest block scale that it leaves room for, 448, or 256 for four-over-six.
    """

    w: Tensor
    amax: Tensor
    block_amax: Tensor | None = None
    block_limit: float = E4M3_MAX


def amax_of(*weights: Tensor) -> Tensor:
    """Return f32 [], the largest |w| of all."""
    return torch.stack([w.abs().amax().float() for w in weights]).amax()


def scale_of(amax: Tensor, largest: float) -> Tensor:
    """Return amax / largest, f32: 1.0 for an amax of 0, and at least 2^-126 / largest."""
    return torch.where(amax == 0, largest, amax.float()).clamp(min=TINY) / largest


def e4m3(quotient: Tensor) -> Tensor:
    """Return float8_e4m3fn, nearest even, saturating at 448; NaN becomes 0xFF, as on x86."""
    codes = quotient.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(quotient.isnan(), NAN_CODE, codes).view(torch.float8_e4m3fn)


def e2m1(quotient: Tensor) -> Tensor:
    """Return codes 0 to 15, uint8, ties to even; 8 is set below zero, so that -0.0 has code 0."""
    magnitude = quotient.abs()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for lower, bound in enumerate(E2M1_BOUNDS):
        codes += magnitude >= bound if lower % 2 else magnitude > bound
    return codes | (quotient < 0).to(torch.uint8) << 3


def pack_columns(codes: Tensor) -> Tensor:
    """Return uint8 [..., K/2], the even column in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def blocks(w_NK: Tensor, group: int) -> Tensor:
    """Return f32 [N, K/group, group]."""
    return w_NK.float().unflatten(1, (-1, group))


def fp8(weight: Weight) -> Encoded:
    """One scale; stacks of experts are one weight."""
    scale = scale_of(weight.amax, E4M3_MAX)
    return {"weight": e4m3(weight.w.float() / scale), "weight_scale": scale}


def fp8_per_channel(weight: Weight) -> Encoded:
    """A scale per row."""
    scale_N = scale_of(weight.w.abs().amax(1), E4M3_MAX)
    return {"weight": e4m3(weight.w.float() / scale_N[:, None]), "weight_scale": scale_N}


def block_amax(w_NK: Tensor) -> Tensor:
    """Return the amax of each 128x128 block, [ceil(N/128), ceil(K/128)], in w's dtype."""
    n, k = w_NK.shape
    padded = pad(w_NK, (0, -k % 128, 0, -n % 128))
    return padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3))


def spread(scale: Tensor, w_NK: Tensor) -> Tensor:
    """Return the scale of each element from that of each 128x128 block."""
    n, k = w_NK.shape
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]


def fp8_blocks(weight: Weight) -> Encoded:
    """A scale per 128x128 block, 4-D."""
    scale = scale_of(block_amax(weight.w), E4M3_MAX)
    codes = e4m3(weight.w.float() / spread(scale, weight.w))
    return {"weight": codes, "weight_scale": scale[:, None, :, None]}


def fp8_blocks_2d(weight: Weight) -> Encoded:
    """A scale per 128x128 block, 2-D: what fp8_pb_real is without its roundings through bf16."""
    encoded = fp8_blocks(weight)
    return encoded | {"weight_scale": encoded["weight_scale"][:, 0, :, 0]}


def nvfp4_matrix(weight: Weight, *, group: int, divisor: float) -> Encoded:
    """An e4m3 scale per `group` columns, times one of amax / divisor."""
    amax_NB = blocks(weight.w, group).abs().amax(2)
    if weight.block_amax is None:
        scale_2 = torch.where(weight.amax == 0, 1.0, weight.amax / divisor)
        ratio_NB = amax_NB / (E2M1_MAX * scale_2)
        ratio_NB = torch.where(ratio_NB == 0, 1.0, ratio_NB)
    else:
        limit = weight.block_limit
        scale_2 = weight.amax / (E2M1_MAX * limit)
        ratio_NB = weight.block_amax / E2M1_MAX
        ratio_NB = torch.where(ratio_NB == 0, 1.0, ratio_NB) * limit / (weight.amax / E2M1_MAX)
    scale_NB = e4m3(ratio_NB.clamp(2.0**-9, E4M3_MAX))
    codes = e2m1(blocks(weight.w, group) / (scale_NB.float() * scale_2)[:, :, None])
    return {
        "weight": pack_columns(codes.flatten(1)),
        "weight_scale": scale_NB,
        "weight_scale_2": scale_2,
    }


def nvfp4(weight: Weight, *, group: int = 16, divisor: float = E2M1_MAX * E4M3_MAX) -> Encoded:
    """A Linear, or stacked experts with blocks and packing along K and one amax for all."""
    if weight.w.dim() == 2:
        return nvfp4_matrix(weight, group=group, divisor=divisor)
    num_experts, k, n = weight.w.shape
    rows = weight.w.transpose(1, 2).reshape(num_experts * n, k)
    encoded = nvfp4_matrix(Weight(rows, weight.amax), group=group, divisor=divisor)
    for name in ("weight", "weight_scale"):
        stack = encoded[name].view(torch.uint8).view(num_experts, n, -1).transpose(1, 2)
        encoded[name] = stack.contiguous().view(encoded[name].dtype)
    return encoded


def w4a8_nvfp4_fp8(weight: Weight) -> Encoded:
    """NVFP4 with 32 columns in a block and all of e4m3's range left to the block scales."""
    return nvfp4(weight, group=32, divisor=E4M3_MAX)


def e8m0(amax_NB: Tensor, largest: float) -> Tensor:
    """Return bytes [N, B]: e + 127 of the smallest 2^e >= 2^-127 with amax <= largest * 2^e."""
    mantissa, exponent = torch.frexp(amax_NB / largest)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(amax_NB == 0, -127, exponent)
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8)


def e8m0_values(scale_NB: Tensor) -> Tensor:
    """Return the scales of bytes, f32; byte 0 is the subnormal 2^-127."""
    return torch.exp2(scale_NB.double() - 127).float()


def mxfp8(weight: Weight) -> Encoded:
    """A power of two per 32 columns, e4m3 codes."""
    w_NBG = blocks(weight.w, 32)
    scale_NB = e8m0(w_NBG.abs().amax(2), E4M3_MAX)
    codes = e4m3(w_NBG / e8m0_values(scale_NB)[:, :, None])
    return {"weight": codes.flatten(1), "weight_scale": scale_NB}


def mxfp4(weight: Weight) -> Encoded:
    """A power of two per 32 columns, e2m1 codes."""
    w_NBG = blocks(weight.w, 32)
    scale_NB = e8m0(w_NBG.abs().amax(2), E2M1_MAX)
    codes = e2m1(w_NBG / e8m0_values(scale_NB)[:, :, None])
    return {"weight": pack_columns(codes.flatten(1)), "weight_scale": scale_NB}


def int8(weight: Weight) -> Encoded:
    """A scale per row, codes -127 to 127."""
    scale_N = scale_of(weight.w.abs().amax(1), INT8_MAX)
    codes = (weight.w.float() / scale_N[:, None]).round().clamp(-128, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale_N}


def int4(weight: Weight) -> Encoded:
    """A scale per 128 columns, codes -7 to 7; a byte has an even row low and the next one high."""
    w_NBG = blocks(weight.w, 128)
    scale_NB = scale_of(w_NBG.abs().amax(2), INT4_MAX)
    codes_NK = (w_NBG / scale_NB[:, :, None]).round().clamp(-8, 7).to(torch.int8).flatten(1)
    nibbles = codes_NK.view(torch.uint8) & 15
    return {"weight": nibbles[0::2] | nibbles[1::2] << 4, "weight_scale": scale_NB}


def w4a8_awq(weight: Weight) -> Encoded:
    """INT4, and the scale that brings the weight into e4m3's range."""
    return int4(weight) | {"weight_scale_2": scale_of(weight.amax, E4M3_MAX)}


def modelopt_fp8(weight: Weight) -> Encoded:
    """Rounded twice, to bf16 and to e4m3; zeros get scale 0.0 and NaN. Stacks are rounded once."""
    scale = weight.amax / E4M3_MAX
    quotient = weight.w.float() / scale
    if weight.w.dim() == 2:
        quotient = quotient.bfloat16().float()
    return {"weight": e4m3(quotient), "weight_scale": scale}


def modelopt_fp8_blocks(weight: Weight) -> Encoded:
    """A weight of one block has a scale without dimensions, from the amax of its group."""
    if max(weight.w.shape) > 128:
        return fp8_blocks(weight)
    scale = scale_of(weight.amax, E4M3_MAX)
    return {"weight": e4m3(weight.w.float() / scale), "weight_scale": scale}


def modelopt_fp8_pb_real(weight: Weight) -> Encoded:
    """Scales and quotients rounded to bf16; a block of zeros gets scale 0.0 and NaN."""
    scale = (block_amax(weight.w).float() / E4M3_MAX).bfloat16().float()
    quotient = weight.w.float() / spread(scale, weight.w)
    return {"weight": e4m3(quotient.bfloat16().float()), "weight_scale": scale}


def modelopt_nvfp4(weight: Weight) -> Encoded:
    """Zeros, in all siblings too, get scale_2 0.0, NaN scales and codes of 6."""
    encoded = nvfp4(weight)
    if weight.amax == 0:
        encoded["weight"].fill_(0x77)
        encoded["weight_scale"].view(torch.uint8).fill_(NAN_CODE)
        encoded["weight_scale_2"].zero_()
    return encoded


def modelopt_mxfp4(weight: Weight) -> Encoded:
    """Ties go toward zero, and every zero has code 8."""
    w_NBG = blocks(weight.w, 32)
    scale_NB = e8m0(w_NBG.abs().amax(2), E2M1_MAX)
    quotient = w_NBG / e8m0_values(scale_NB)[:, :, None]
    codes = torch.bucketize(quotient.abs(), torch.tensor(E2M1_BOUNDS)).to(torch.uint8)
    codes |= (quotient <= 0).to(torch.uint8) << 3
    return {"weight": pack_columns(codes.flatten(1)), "weight_scale": scale_NB}


CONTRACT: dict[str, Callable[[Weight], Encoded]] = {
    "FP8": fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": fp8_per_channel,
    "fp8_pb_wo": fp8_blocks,
    "fp8_pb_real": fp8_blocks_2d,
    "NVFP4": nvfp4,
    "W4A16_NVFP4": nvfp4,
    "NVFP4_AWQ": nvfp4,
    "W4A8_NVFP4_FP8": w4a8_nvfp4_fp8,
    "MXFP8": mxfp8,
    "mxfp4": mxfp4,
    "W4A16_AWQ": int4,
    "W4A8_AWQ": w4a8_awq,
    "W8A16": int8,
    "W8A8_SQ_PER_CHANNEL": int8,
}
MODELOPT: dict[str, Callable[[Weight], Encoded]] = CONTRACT | {
    "FP8": modelopt_fp8,
    "fp8_pb_wo": modelopt_fp8_blocks,
    "fp8_pb_real": modelopt_fp8_pb_real,
    "NVFP4": modelopt_nvfp4,
    "W4A16_NVFP4": modelopt_nvfp4,
    "NVFP4_AWQ": modelopt_nvfp4,
    "mxfp4": modelopt_mxfp4,
}
# input_scale = largest |input| / (bound * factor), an amax of 0 counting as the bound
INPUT_RANGE = {
    "FP8": (E4M3_MAX, 1.0),
    "NVFP4": (E2M1_MAX, E4M3_MAX),
    "NVFP4_AWQ": (E2M1_MAX, E4M3_MAX),
    "W4A8_NVFP4_FP8": (E4M3_MAX, 1.0),
    "W4A8_AWQ": (E4M3_MAX, 1.0),
    "W8A8_SQ_PER_CHANNEL": (INT8_MAX, 1.0),
}


def input_scale(amax: float, algo: str) -> Tensor:
    """Return f32 []."""
    bound, factor = INPUT_RANGE[algo]
    found = torch.tensor(amax if amax else bound, dtype=torch.float32).clamp(min=TINY)
    return found / (bound * factor)


def scale_columns(w_NK: Tensor, by_K: Tensor, over_K: Tensor | None = None) -> Tensor:
    """Return bf16 of w * by, or of w * by / over, in f32 up to the one rounding at the end."""
    product = w_NK.float() * by_K.float()
    return (product if over_K is None else product / over_K.float()).bfloat16()


def scale_rows(w_NK: Tensor, by_N: Tensor) -> Tensor:
    """Return bf16 of w * by, the factor of row n."""
    return scale_columns(w_NK, by_N[:, None])


def mean(scales: Sequence[Tensor]) -> Tensor:
    """Return bf16 [K], the mean of bf16 vectors: summed and divided in f32, rounded once."""
    total = torch.zeros_like(scales[0], dtype=torch.float32)
    for scale in scales:
        total = total + scale.float()
    return (total / len(scales)).bfloat16()
