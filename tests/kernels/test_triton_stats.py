"""Row statistics by Triton against those of torch: the same counts, and sums to 14 digits."""

import numpy as np
import pytest
import torch

from qkernels.codec import Codec
from qkernels.errors import KernelError
from qkernels.stats import RowStats

from . import weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# every kind in one dtype, what depends on the dtype in all
CASES = [(kind, torch.bfloat16) for kind in weights.WEIGHTS] + [
    (kind, dtype)
    for kind in ("finite_bits", "nonfinite", "tiny", "wide")
    for dtype in (torch.float16, torch.float32)
]


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """Numpy, of Triton's interpreter, warns of overflow."""
    with np.errstate(all="ignore"):
        yield


def quantized(codec, w):
    """A weight on the device, and its tensors."""
    w = w.to(DEVICE)
    return w, codec.quantize_torch(w)


def assert_same(actual: RowStats, expected: RowStats) -> None:
    # the f32 sums are the same; only the order of the f64 additions differs
    torch.testing.assert_close(actual.err2_N, expected.err2_N, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(actual.ref2_N, expected.ref2_N, rtol=1e-14, atol=0.0)
    for name in ("num_nonfinite", "num_saturated"):
        count = getattr(actual, name)
        assert count.dtype == torch.int64
        assert count.shape == ()
        assert int(count) == int(getattr(expected, name))


@pytest.mark.parametrize(
    ("kind", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch.")
)
def test_triton_and_torch_agree(codec, kind, dtype):
    w, tensors = quantized(codec, weights.make(kind, codec, dtype))

    assert_same(codec.row_stats_triton(w, tensors), codec.row_stats_torch(w, tensors))


# one column of a segment, a segment, and several tiles of segments, the last with a part of one
@pytest.mark.parametrize("k", [1, 15, 17, 127, 128, 129, 640, 1100])
def test_rows_of_several_tiles(codec, k, monkeypatch):
    from qkernels import _triton_stats

    shape = weights.fitting(codec, (7, k))
    w, tensors = quantized(codec, weights.normal(shape, torch.bfloat16))
    w[3, -1], w[-1, 0] = torch.nan, torch.inf
    small = _triton_stats.choose(DEVICE, tile_rows=2, tile_cols=2)
    monkeypatch.setattr(_triton_stats, "stats_config", lambda device, k: small)

    assert_same(codec.row_stats_triton(w, tensors), codec.row_stats_torch(w, tensors))


def buffers(codec: Codec, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of a weight that hold something else, but for the scale of the whole weight."""
    filled = {}
    for suffix, tensor in codec.quantize_torch(w).items():
        filled[suffix] = tensor
        if suffix in codec.shapes(*w.shape):
            filled[suffix] = torch.empty_like(tensor)
            filled[suffix].view(-1).view(torch.uint8).fill_(0x5A)
    return filled


def test_quantize_into_given_tensors(codec, normal_weight, same_tensors):
    w, expected = quantized(codec, normal_weight)
    actual = buffers(codec, w)

    codec.quantize_into_triton(w, actual)

    same_tensors(actual, expected)


def test_statistics_into_given_tensors_add_to_the_counts(codec):
    w, tensors = quantized(codec, weights.make("nonfinite", codec, torch.bfloat16))
    expected = codec.row_stats_torch(w, tensors)
    stats = RowStats.empty(len(w), w.device)

    for turn in (1, 2):
        stats.err2_N.fill_(torch.nan)
        stats.ref2_N.fill_(torch.nan)
        codec.row_stats_into_triton(w, tensors, stats)

        assert torch.allclose(stats.err2_N, expected.err2_N, rtol=1e-14, atol=0.0)
        assert torch.allclose(stats.ref2_N, expected.ref2_N, rtol=1e-14, atol=0.0)
        assert int(stats.num_nonfinite) == turn * int(expected.num_nonfinite) > 0
        assert int(stats.num_saturated) == turn * int(expected.num_saturated)


def test_given_tensors_are_contiguous(codec):
    w, tensors = quantized(codec, weights.normal(weights.fitting(codec, (8, 256)), torch.bfloat16))
    stats = RowStats.empty(len(w), w.device)
    strided = torch.empty(len(w), 2 * w.shape[1], dtype=w.dtype, device=DEVICE)[:, ::2].copy_(w)
    codes = tensors["weight"]
    apart = torch.empty(len(codes), 2 * codes.shape[1], dtype=codes.dtype, device=DEVICE)[:, ::2]

    for given in ((strided, tensors), (w, {**tensors, "weight": apart})):
        with pytest.raises(KernelError, match=r"expected (w|weight) contiguous, got"):
            codec.quantize_into_triton(*given)
        with pytest.raises(KernelError, match=r"expected (w|weight) contiguous, got"):
            codec.row_stats_into_triton(*given, stats)


def test_given_tensors_are_those_of_the_weight(codec):
    _, tensors = quantized(codec, torch.ones(weights.fitting(codec, (4, 256))))

    with pytest.raises(KernelError, match="shape"):
        codec.quantize_into_triton(torch.ones(8, 256), tensors)
    with pytest.raises(KernelError, match="shape"):
        codec.row_stats_into_triton(torch.ones(8, 256), tensors, RowStats.empty(8, DEVICE))
