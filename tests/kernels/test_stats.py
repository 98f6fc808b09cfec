"""Row statistics in torch against the native ones and the definition."""

import pytest
import torch

import qkernels
from qkernels import native, stats


@pytest.fixture(params=qkernels.formats())
def format_name(request):
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks for a small weight."""
    monkeypatch.setattr(stats, "CHUNK_NUMEL", {"cpu": 1000, "cuda": 1000})


def definition(w, tensors):
    w_f64, scale = w.double(), tensors["weight_scale"].double()
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        scale = scale[: w.shape[0], : w.shape[1]]
    else:
        scale = scale[:, None]
    error = w_f64 - tensors["weight"].double() * scale
    finite = w_f64.isfinite()
    err2_N = error.where(finite, 0.0).square().sum(1)
    return err2_N, w_f64.where(finite, 0.0).square().sum(1), int((~finite).sum())


@pytest.mark.usefixtures("small_chunks")
def test_row_stats_are_those_of_the_definition(format_name, weight):
    kernels = qkernels.kernels_for(format_name)
    tensors = kernels.quantize_torch(weight)

    actual = kernels.row_stats(weight, tensors)

    err2_N, ref2_N, num_nonfinite = definition(weight, tensors)
    # value * scale is rounded to f32, so each error is off by up to 2^-24 of its element (Cauchy
    # and Schwarz make a bound of the sum); squares far below the block's largest underflow
    noise_N = 2.0**-46 * ref2_N + 2.0**-100 * ref2_N.sum()
    bound_N = 1e-6 * err2_N + 2.0 * (err2_N * noise_N).sqrt() + noise_N
    assert torch.all((actual.err2_N - err2_N).abs() <= bound_N)
    assert torch.all((actual.ref2_N - ref2_N).abs() <= 1e-6 * ref2_N + noise_N)
    assert int(actual.num_nonfinite) == num_nonfinite
    assert int(actual.num_saturated) == 0


@pytest.mark.usefixtures("small_chunks")
def test_row_stats_count_what_another_scale_clips(format_name):
    """A scale of 1 for numbers up to 1000: 464 still rounds to 448, what is above is clipped."""
    w = torch.zeros(150, 150)
    w[140, :5] = torch.tensor([448.0, 464.0, 464.5, -1000.0, torch.inf])
    kernels = qkernels.kernels_for(format_name)
    tensors = kernels.quantize_torch(w)
    tensors["weight_scale"] = torch.ones_like(tensors["weight_scale"])

    actual = kernels.row_stats(w, tensors)

    assert int(actual.num_saturated) == 2
    assert int(actual.num_nonfinite) == 1


@pytest.mark.skipif(not native.available(), reason="libqkernels.so was not built")
def test_row_stats_agree_with_the_native_library(format_name, normal_weight):
    kernels = qkernels.kernels_for(format_name)
    tensors = kernels.quantize_torch(normal_weight)
    codes, scale = (torch.empty_like(tensor) for tensor in tensors.values())
    sums_2N = torch.empty(2, normal_weight.shape[0], dtype=torch.float64)
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[normal_weight.dtype]

    native.quantize(
        format_name,
        normal_weight.data_ptr(),
        name,
        *normal_weight.shape,
        [codes.data_ptr(), scale.data_ptr()],
        sums_2N[0].data_ptr(),
        sums_2N[1].data_ptr(),
    )

    actual = kernels.row_stats(normal_weight, tensors)
    # the same f32 sums of eight squares; only the order of the f64 sums differs
    torch.testing.assert_close(sums_2N[0], actual.err2_N, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(sums_2N[1], actual.ref2_N, rtol=1e-13, atol=0.0)
