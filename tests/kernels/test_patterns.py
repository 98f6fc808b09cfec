"""Quantizing small domains entirely: 16-bit patterns, and ties by hand-written tables."""

import numpy as np
import pytest
import torch

import qkernels

from . import oracle, weights

# largest magnitudes of a block of patterns: an ordinary one and both ends of each dtype
AMAXES = {
    torch.bfloat16: (0.0712890625, 3.3895313892515355e38, 2.0**-120, 2.0**-126),
    torch.float16: (0.07122802734375, 65504.0, 2.0**-14),
}
CASES = [(dtype, amax) for dtype, amaxes in AMAXES.items() for amax in (None, *amaxes)]


def in_blocks(name, numbers, first):
    """Numbers in rows of 128 columns, `first` at the beginning of each block; zeros at the end."""
    group = oracle.FORMATS[name].group or 128
    blocks = -(-len(numbers) // (group - 1) * group // 256) * 256 // group + 256 // group
    w = torch.zeros(blocks, group - 1, dtype=numbers.dtype)
    w.view(-1)[: len(numbers)] = numbers
    begin = torch.full((blocks, 1), first, dtype=numbers.dtype)
    return torch.cat([begin, w], 1).view(-1, 128)


@pytest.mark.parametrize(
    ("dtype", "amax"),
    CASES,
    ids=[f"{str(dtype).removeprefix('torch.')}-{amax or 'top'}" for dtype, amax in CASES],
)
def test_every_16_bit_pattern(codec, quantize, dtype, amax, same_tensors):
    """Up to an amax that begins each block; the default makes the scale 1 (FP4 within FP8: 448)."""
    amax = oracle.FORMATS[codec.name].largest if amax is None else amax
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    w = in_blocks(codec.name, patterns.where(patterns.abs() <= amax, 0.0), amax)

    expected = oracle.to_torch(oracle.quantize(codec.name, oracle.to_numpy(w)))
    same_tensors(quantize(w), expected)


def around(middles):
    """Numbers below, at and above each midpoint of f32."""
    middle = torch.tensor(middles)
    return torch.stack(
        [middle.nextafter(torch.tensor(-torch.inf)), middle, middle.nextafter(torch.tensor(1e9))]
    )


def e4m3_ties():
    """All 127 magnitudes, the 126 midpoints and the f32 numbers next to them, of both signs."""
    small = [code * 2.0**-9 for code in range(8)]
    value = torch.tensor(small + [(8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(8, 127)])
    lower = torch.arange(126)
    numbers = torch.cat([value, *around(((value[:-1] + value[1:]) / 2).tolist())])
    codes = torch.cat([torch.arange(127), lower, lower + lower % 2, lower + 1])
    return torch.cat([numbers, -numbers]), torch.cat([codes, codes + 0x80])


def e2m1_ties():
    """The 8 magnitudes, the 7 midpoints and the f32 numbers next to them, of both signs.

    -0.0 has code 0, a negative number that rounds to zero code 8.
    """
    below, tie, above = around([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    numbers = torch.cat([torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6]), below, tie, above])
    rounded_down, rounded_up = list(range(7)), list(range(1, 8))
    codes = [*range(8), *rounded_down, *[0, 2, 2, 4, 4, 6, 6], *rounded_up]
    negative = [0, *[8 + code for code in codes[1:]]]
    return torch.cat([numbers, -numbers]), torch.tensor(codes + negative)


def integer_ties(low, high):
    """Integers, halves and the f32 numbers next to them; half of them go to the even number.

    What is above `high` is out of reach, since the largest number of a block becomes that.
    """
    numbers, codes = [], []
    for integer in range(-high, high):
        below, tie, above = around([integer + 0.5])
        numbers += [float(integer), below.item(), tie.item(), above.item()]
        even = integer if integer % 2 == 0 else integer + 1
        codes += [integer, integer, even, integer + 1]
    return torch.tensor(numbers), torch.tensor(codes) % (high - low + 1)


TIES = {
    "e4m3": e4m3_ties(),
    "e2m1": e2m1_ties(),
    "int8": integer_ties(-128, 127),
    "int4": integer_ties(-8, 7),
}


def test_ties_go_to_the_even_code(codec, quantize, same_bits):
    """Every scale is exactly 1."""
    form = oracle.FORMATS[codec.name]
    numbers, codes = TIES[form.element]
    w = in_blocks(codec.name, numbers, form.largest)
    top = {"e4m3": 0x7E, "e2m1": 7, "int8": 127, "int4": 7}[form.element]
    codes_NK = in_blocks(codec.name, codes.to(torch.uint8), top)
    scale = {"global_scale": torch.tensor(1.0)} if form.divisor else {}

    actual = quantize(w, **scale)

    stored = oracle.pack(form.element, codes_NK.numpy())
    expected = torch.from_numpy(np.ascontiguousarray(stored).view(np.uint8))
    same_bits(actual["weight"].view(torch.uint8), expected)
    one = {"e8m0": 127, "e4m3": 0x38}.get(form.scale, 1.0)
    stored_scale = actual["weight_scale"]
    raw = stored_scale.view(torch.uint8) if form.scale == "e4m3" else stored_scale
    assert set(raw.flatten().tolist()) == {one}


SPECIAL = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-4, -1e-4]
SPECIAL_CODES = {
    "e4m3": [0x7F, 0xFF, 0x7E, 0xFE, 0x00, 0x80, 0x00, 0x80],
    "e2m1": [0, 0, 7, 15, 0, 0, 0, 8],
    "int8": [0, 0, 127, -128, 0, 0, 0, 0],
    "int4": [0, 0, 7, -8, 0, 0, 0, 0],
}


def test_special_numbers_do_not_touch_the_scale(codec, quantize, dtype):
    """Among numbers of 1024; the sign of zero and of NaN in e4m3 is that of the source."""
    form = oracle.FORMATS[codec.name]
    w = torch.full(weights.fitting(codec, (130, 130)), 1024.0, dtype=dtype)
    clean = codec.quantize_torch(w)
    sign = torch.tensor([1.0, -1.0] * 4, dtype=dtype)
    w[1, 2:10] = torch.tensor(SPECIAL, dtype=dtype).copysign(sign)

    actual = {name: oracle.to_numpy(tensor) for name, tensor in quantize(w).items()}

    codes = oracle.unpack(form.element, actual["weight"])
    assert codes[1, 2:10].tolist() == SPECIAL_CODES[form.element]
    for suffix in set(clean) - {"weight"}:
        assert actual[suffix].tobytes() == oracle.to_numpy(clean[suffix]).tobytes()


def test_zeros_have_scale_one_and_zero_codes(codec, quantize):
    """0 / 448 would be a scale of 0 and codes of NaN; e8m0 scales of zeros are byte 0."""
    w = torch.zeros(weights.fitting(codec, (130, 130)), dtype=torch.bfloat16)

    actual = quantize(w)

    assert set(actual.pop("weight").view(torch.uint8).flatten().tolist()) == {0}
    for tensor in actual.values():
        expected = 0.0 if oracle.FORMATS[codec.name].scale == "e8m0" else 1.0
        assert set(tensor.float().flatten().tolist()) == {expected}


@pytest.mark.parametrize("implementation", ["torch", "triton", "native"], indirect=True)
def test_every_row_has_its_own_scale(implementation, device):
    codec = qkernels.kernels_for("FP8_PER_CHANNEL_PER_TOKEN")
    w = torch.tensor([[448.0, 1.0], [-896.0, 1.0], [0.0, 0.0]], device=device)

    scale = getattr(codec, f"quantize_{implementation}")(w)["weight_scale"]

    assert scale.tolist() == [1.0, 2.0, 1.0]
