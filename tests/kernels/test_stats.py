"""Row statistics against the definition and the native ones, in torch and in short by Triton."""

import numpy as np
import pytest
import torch

import qkernels
from qkernels import native, stats
from qkernels.codec import SOURCE_DTYPES, Codec

from . import oracle, weights

SCALED = [name for name, form in oracle.FORMATS.items() if form.divisor]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks for a small weight."""
    monkeypatch.setattr(stats, "CHUNK_NUMEL", {"cpu": 1000, "cuda": 1000})


@pytest.fixture(params=["torch", "triton"])
def row_stats(request):
    """The method of a codec, on the CPU; numpy, of Triton's interpreter, warns of overflow."""
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"

    def run(codec, w, tensors):
        moved = {suffix: tensor.to(device) for suffix, tensor in tensors.items()}
        with np.errstate(all="ignore"):
            found = getattr(codec, f"row_stats_{request.param}")(w.to(device), moved)
        return stats.RowStats(**{name: tensor.cpu() for name, tensor in vars(found).items()})

    return run


def definition(name, w, tensors):
    """Sums in f64 of exact products, and the numbers of nonfinite and of clipped elements."""
    arrays = {suffix: oracle.to_numpy(tensor) for suffix, tensor in tensors.items()}
    value = torch.from_numpy(oracle.values(name, arrays["weight"])).double()
    scale = torch.from_numpy(oracle.scales(name, arrays).copy()).double()
    w_f64 = w.double()
    finite = w_f64.isfinite()
    err2_N = (w_f64 - value * scale).where(finite, 0.0).square().sum(1)
    ref2_N = w_f64.where(finite, 0.0).square().sum(1)
    # the quotient in f32, as it is rounded
    quotient = w.float() / scale.float()
    low, high = oracle.LIMITS[oracle.FORMATS[name].element]
    clipped = finite & ((quotient < low) | (quotient > high))
    return err2_N, ref2_N, int((~finite).sum()), int(clipped.sum())


def assert_close_to_the_definition(codec, w, tensors, row_stats=Codec.row_stats):
    actual = row_stats(codec, w, tensors)
    err2_N, ref2_N, num_nonfinite, num_saturated = definition(codec.name, w, tensors)
    # value * scale is rounded to f32, so each error is off by up to 2^-24 of its element (Cauchy
    # and Schwarz make a bound of the sum); squares far below the block's largest underflow
    noise_N = 2.0**-46 * ref2_N + 2.0**-100 * ref2_N.sum()
    bound_N = 1e-6 * err2_N + 2.0 * (err2_N * noise_N).sqrt() + noise_N

    assert actual.err2_N.dtype == actual.ref2_N.dtype == torch.float64
    assert torch.all((actual.err2_N - err2_N).abs() <= bound_N)
    assert torch.all((actual.ref2_N - ref2_N).abs() <= 1e-6 * ref2_N + noise_N)
    assert int(actual.num_nonfinite) == num_nonfinite
    assert int(actual.num_saturated) == num_saturated
    return actual


@pytest.mark.usefixtures("small_chunks")
def test_row_stats_are_those_of_the_definition(codec, weight):
    """Own scales clip nothing, but for an e4m3 scale that its subnormals round down by a third."""
    tensors = codec.quantize_torch(weight)

    actual = assert_close_to_the_definition(codec, weight, tensors)

    if oracle.FORMATS[codec.name].scale != "e4m3":
        assert int(actual.num_saturated) == 0


@pytest.mark.parametrize("exponent", [-36, -25, 25, 36])
def test_row_stats_neither_overflow_nor_underflow(codec, exponent, row_stats):
    """Squares of 1e36 or 1e-36 are outside of f32."""
    w = weights.make("normal", codec, torch.float32) * 10.0**exponent

    assert_close_to_the_definition(codec, w, codec.quantize_torch(w), row_stats)


def test_chunks_change_no_sum(codec, normal_weight, monkeypatch):
    tensors = codec.quantize_torch(normal_weight)
    whole = codec.row_stats(normal_weight, tensors)

    for numel in (1, 40_000):
        monkeypatch.setattr(stats, "CHUNK_NUMEL", {"cpu": numel, "cuda": numel})
        part = codec.row_stats(normal_weight, tensors)

        assert torch.equal(part.err2_N, whole.err2_N)
        assert torch.equal(part.ref2_N, whole.ref2_N)
        assert int(part.num_nonfinite) == int(whole.num_nonfinite)
        assert int(part.num_saturated) == int(whole.num_saturated)


# under scales of 1: what is clipped, and what is rounded at most half a step further
CLIPPED = {
    "e4m3": ([464.5, -1000.0], [448.0, 464.0, -464.0]),
    "e2m1": ([7.5, -1000.0], [6.0, 7.0, -7.0]),
    "int8": ([128.0, -129.0], [127.5, -128.5, 3.0]),
    "int4": ([8.0, -9.0], [7.5, -8.5, 3.0]),
}


def with_unit_scales(name, tensors):
    """The same tensors, every scale 1."""
    one = {torch.uint8: 127, torch.float8_e4m3fn: 1.0, torch.float32: 1.0}
    return {
        suffix: tensor
        if suffix == "weight"
        else torch.full(tensor.shape, one[tensor.dtype]).to(tensor.dtype)
        for suffix, tensor in tensors.items()
    }


@pytest.mark.usefixtures("small_chunks")
def test_row_stats_count_what_another_scale_clips(codec, row_stats):
    clipped, rounded = CLIPPED[oracle.FORMATS[codec.name].element]
    w = torch.zeros(weights.fitting(codec, (150, 150)))
    w[140, : len(clipped + rounded)] = torch.tensor(clipped + rounded)
    w[141, 3] = torch.inf
    tensors = with_unit_scales(codec.name, codec.quantize_torch(w))

    actual = row_stats(codec, w, tensors)

    assert int(actual.num_saturated) == 2
    assert int(actual.num_nonfinite) == 1


LARGEST_IN_SCALES = {"FP8": 464.0, "NVFP4": 7.0 * 448, "W4A8_NVFP4_FP8": 7.0 * 448}


@pytest.mark.parametrize("codec", SCALED, indirect=True)
def test_row_stats_count_what_a_given_global_scale_clips(codec, dtype, row_stats):
    """Block scales end at 448, so that 7 * 448 times the scale of the weight is the limit."""
    w = weights.make("normal", codec, dtype)
    scale = torch.tensor(1e-5)
    clipped = w.double().abs() > LARGEST_IN_SCALES[codec.name] * scale.double()

    tensors = codec.quantize_torch(w, global_scale=scale)
    actual = assert_close_to_the_definition(codec, w, tensors, row_stats)

    assert 0 < int(clipped.sum()) < w.numel()
    assert int(actual.num_saturated) == int(clipped.sum())


def native_stats(codec, w, tensors, global_scale):
    """Sums and counts of one call of the library, which writes the same bytes."""
    outs = {suffix: torch.empty_like(tensors[suffix]) for suffix in codec.shapes(*w.shape)}
    sums_2N = torch.full((2, w.shape[0]), torch.nan, dtype=torch.float64)
    counts = native.quantize(
        codec.name,
        w.data_ptr(),
        SOURCE_DTYPES[w.dtype],
        *w.shape,
        [tensor.data_ptr() for tensor in outs.values()],
        sums_2N[0].data_ptr(),
        sums_2N[1].data_ptr(),
        global_scale=global_scale,
    )
    for suffix, out in outs.items():
        assert torch.equal(out.view(torch.uint8), tensors[suffix].view(torch.uint8))
    return sums_2N, counts


@pytest.mark.skipif(not native.available(), reason="libqkernels.so was not built")
@pytest.mark.parametrize("kind", ["normal", "nonfinite", "zero_block", "outlier", "wide"])
@pytest.mark.parametrize(
    ("codec", "given"),
    [(name, None) for name in qkernels.codecs()] + [(name, 1e-5) for name in SCALED],
    indirect=["codec"],
)
def test_row_stats_agree_with_the_native_library(codec, dtype, kind, given, row_stats):
    w = weights.make(kind, codec, dtype)
    scale = {} if given is None else {"global_scale": torch.tensor(given)}
    tensors = codec.quantize_torch(w, **scale)
    suffix = oracle.FORMATS[codec.name].suffix

    sums_2N, counts = native_stats(codec, w, tensors, float(tensors[suffix]) if suffix else 1.0)

    actual = row_stats(codec, w, tensors)
    # the same f32 sums of eight squares; only the order of the f64 sums differs
    torch.testing.assert_close(sums_2N[0], actual.err2_N, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(sums_2N[1], actual.ref2_N, rtol=1e-13, atol=0.0)
    assert counts == (int(actual.num_nonfinite), int(actual.num_saturated))


def test_limits_are_half_a_step_beyond_the_codes(codec):
    assert codec.limits == oracle.LIMITS[oracle.FORMATS[codec.name].element]
