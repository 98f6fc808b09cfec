"""Quantizing: every codec by every implementation gives the oracle's bytes."""

import itertools

import numpy as np
import pytest
import torch

from . import oracle, weights


def expected_tensors(codec, w, whole=None):
    whole = None if whole is None else whole.numpy()[()]
    return oracle.to_torch(oracle.quantize(codec.name, oracle.to_numpy(w), whole))


def expected_batch(codec, w, wholes=None):
    """Matrix by matrix, stacked."""
    wholes = [None] * len(w) if wholes is None else wholes
    parts = [
        expected_tensors(codec, matrix, whole) for matrix, whole in zip(w, wholes, strict=True)
    ]
    return {
        suffix: torch.stack([part[suffix].view(torch.uint8) for part in parts]).view(tensor.dtype)
        if tensor.dtype == torch.float8_e4m3fn
        else torch.stack([part[suffix] for part in parts])
        for suffix, tensor in parts[0].items()
    }


def test_the_oracle_has_every_codec(codec):
    assert codec.name in oracle.FORMATS


def test_quantize_matches_the_oracle(codec, quantize, weight, same_tensors):
    same_tensors(quantize(weight), expected_tensors(codec, weight))


@pytest.mark.usefixtures("poisoned_memory")
def test_every_byte_is_written(codec, quantize, dequantize, normal_weight, same_bits, same_tensors):
    expected = expected_tensors(codec, normal_weight)

    actual = quantize(normal_weight)

    same_tensors(actual, expected)
    decoded = oracle.dequantize(
        codec.name, oracle.quantize(codec.name, oracle.to_numpy(normal_weight)), torch.bfloat16
    )
    same_bits(dequantize(actual), decoded)


@pytest.mark.parametrize("shape", [(3, 128, 256), (3, 130, 136), (2, 1, 1), (1, 5, 130)])
def test_a_batch_is_its_matrices(codec, quantize, same_tensors, shape):
    """128 rows end with a block of 128 x 128, 130 and 5 rows end within one."""
    w = weights.normal(weights.fitting(codec, shape), torch.bfloat16)
    w *= torch.tensor([1.0, 0.0, -300.0])[: len(w), None, None]

    same_tensors(quantize(w), expected_batch(codec, w))


def test_a_batch_of_any_strides(codec, quantize, same_tensors):
    shape = weights.fitting(codec, (3, 20, 130))
    w = weights.normal((shape[1], shape[2] + 3, shape[0]), torch.float16).permute(2, 0, 1)[..., 3:]

    same_tensors(quantize(w), expected_batch(codec, w))


@pytest.mark.parametrize("shape", [(0, 2, 128), (0, 128, 128), (3, 0, 128), (3, 2, 0), (1, 0, 0)])
def test_an_empty_batch(codec, quantize, dequantize, same_tensors, shape):
    w = torch.empty(shape, dtype=torch.bfloat16)

    actual = quantize(w)

    if len(w):
        same_tensors(actual, expected_batch(codec, w))
    form = oracle.FORMATS[codec.name]
    if form.divisor:
        assert actual[form.suffix].shape == w.shape[:1]
    assert dequantize(actual).shape == shape


def test_slices_at_block_rows_give_the_same_bytes(codec, quantize, normal_weight, same_tensors):
    whole = expected_tensors(codec, normal_weight)
    suffix = oracle.FORMATS[codec.name].suffix
    scale = {"global_scale": whole.pop(suffix)} if suffix else {}
    n = normal_weight.shape[0]
    cuts = [0, codec.block_rows, 128, n]

    parts = [
        quantize(normal_weight[start:stop], **scale)
        for start, stop in itertools.pairwise(cuts)
        if start < stop
    ]

    for name, tensor in whole.items():
        joined = torch.cat([part[name].cpu().view(torch.uint8) for part in parts])
        same_tensors({name: joined}, {name: tensor.view(torch.uint8)})


@pytest.mark.parametrize("codec", ["FP8", "W4A16_AWQ"], indirect=True)
def test_amax_is_the_largest_finite_magnitude(codec, implementation, device, weight, same_bits):
    magnitude = np.abs(oracle.to_numpy(weight).astype(np.float32))
    expected = torch.tensor(magnitude[np.isfinite(magnitude)].max(initial=0.0))
    amax = getattr(codec, f"amax_{implementation}")

    with np.errstate(all="ignore"):
        same_bits(amax(weight.to(device)), expected)
        pair = torch.stack([torch.zeros_like(weight), weight]).to(device)
        same_bits(amax(pair), torch.stack([torch.tensor(0.0), expected]))


SCALED = [name for name, form in oracle.FORMATS.items() if form.divisor]
GIVEN = {"half": 0.5, "a third more": 1.3, "1e6 times": 1e6, "1e-6 times": 1e-6}


def scale_like(own, factor):
    """Times a factor, inside f32's range: a scale of 0 is none."""
    return torch.tensor(min(max(float(own) * factor, 2.0**-149), 3e38)).float()


@pytest.mark.parametrize("codec", SCALED, indirect=True)
@pytest.mark.parametrize("kind", ["nonfinite", "zero_block", "wide", "tiny"])
@pytest.mark.parametrize("factor", GIVEN.values(), ids=GIVEN)
def test_a_given_global_scale(codec, quantize, dtype, same_tensors, kind, factor):
    """Smaller than its own clips, larger makes block scales and numbers underflow."""
    w = weights.make(kind, codec, dtype)
    scale = scale_like(oracle.global_scale(codec.name, oracle.to_numpy(w)), factor)

    same_tensors(quantize(w, global_scale=scale), expected_tensors(codec, w, scale))


@pytest.mark.parametrize("codec", SCALED, indirect=True)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_given_global_scales_of_a_batch(codec, quantize, same_tensors, shared):
    """A scale that the matrices share may come expanded, with a stride of 0."""
    w = weights.normal(weights.fitting(codec, (3, 20, 130)), torch.bfloat16)
    own = torch.tensor([1e-3, 1e-2, 1e-4])
    scale_E = own[:1].expand(3) if shared else own

    actual = quantize(w, global_scale=scale_E)

    same_tensors(actual, expected_batch(codec, w, scale_E))


def test_dispatch_takes_the_library_or_torch(codec, monkeypatch, same_bits, same_tensors):
    w = weights.make("zero_block", codec, torch.bfloat16)
    expected = expected_tensors(codec, w)
    for value in ("0", "1"):
        monkeypatch.setenv("QKERNELS_NATIVE", value)
        actual = codec.quantize(w)

        same_tensors(actual, expected)
        same_bits(codec.dequantize(actual), codec.dequantize_torch(expected))


def test_no_other_code_is_nearer(codec, quantize, dtype):
    """The largest of a block of NVFP4 may be clipped, since its scale was rounded."""
    form = oracle.FORMATS[codec.name]
    w = weights.make("normal", codec, dtype)

    tensors = {name: oracle.to_numpy(tensor) for name, tensor in quantize(w).items()}

    w_f64 = w[:8].double().numpy()
    scale = oracle.scales(codec.name, tensors)[:8].astype(np.float64)
    value = oracle.values(codec.name, tensors["weight"])[:8]
    byte = np.arange(16 if form.element == "e2m1" else 256, dtype=np.uint8)
    codes = np.arange(-8, 8, dtype=np.int8) if form.element == "int4" else byte
    codes = codes.view(np.int8) if form.element == "int8" else codes
    candidates = oracle.decode(form.element, codes).astype(np.float64)
    candidates = candidates[~np.isnan(candidates)]
    best = np.abs(w_f64 / scale - candidates[:, None, None]).min(0)
    # the quotient was rounded to f32 before
    assert (np.abs(w_f64 / scale - value) <= best + 2.0**-23 * np.abs(w_f64 / scale)).all()
