"""Every codec of the native library against numpy and ml_dtypes (oracle.py): bytes, sums,
counts, and the numbers that bytes stand for."""

import ml_dtypes
import numpy as np
import pytest

from qkernels import native
from qkernels.errors import KernelError

from . import native_calls as calls
from . import oracle

pytestmark = pytest.mark.skipif(
    not native.available(), reason="libqkernels.so was not built: python hatch_build.py"
)

NUMPY, normal = calls.NUMPY, calls.normal
# columns that end inside of a segment, and several segments
K = {1: 205, 16: 272, 32: 224, 128: 384}


@pytest.fixture(params=calls.CODECS.values(), ids=calls.CODECS)
def codec(request):
    return request.param


@pytest.fixture(params=native.DTYPES)
def dtype(request):
    return request.param


def global_of(codec, w):
    """amax / 448, or / (6 * 448): what a caller without calibration gives."""
    x = w.astype(np.float32)
    amax = np.max(np.abs(x), where=np.isfinite(x), initial=0)
    return float(np.float32(amax or 1) / np.float32(448 if codec.form.element == "e4m3" else 2688))


def check(codec, w, dtype, global_scale=None):
    global_scale = global_of(codec, w) if global_scale is None else global_scale
    w = np.ascontiguousarray(w)
    expected = calls.expected(codec, w, global_scale)

    actual = calls.quantize(codec, w, dtype, global_scale=global_scale)

    for one, other in zip(actual.outs, expected.outs, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.reshape(one.shape).view(np.uint8))
    assert actual.counts == expected.counts
    assert actual.sums.tobytes() == expected.sums.tobytes()
    expected_w = calls.restored(codec, actual.outs, dtype, global_scale)
    restored = calls.dequantize(codec, actual.outs, dtype, w.shape, global_scale)
    assert restored.tobytes() == expected_w.tobytes()
    return actual


def bits(shape, dtype, seed=0):
    """Any pattern, NaN and Inf among them."""
    unsigned = np.uint32 if dtype == "F32" else np.uint16
    patterns = np.random.default_rng(seed).integers(0, np.iinfo(unsigned).max + 1, shape, unsigned)
    return patterns.view(NUMPY[dtype])


def outlier(shape, dtype):
    w = normal(shape, dtype)
    w[1, 9] = ml_dtypes.finfo(NUMPY[dtype]).max
    return w


def zeros_between(shape, dtype):
    """Zero groups, rows and blocks, some of -0.0."""
    w = normal(shape, dtype)
    w[:, :32] = 0
    w[2:4] = 0
    w[:, 40:48] = -0.0
    return w


def subnormal(shape, dtype):
    w = bits(shape, dtype)
    tiny = oracle.SMALLEST_NORMAL[np.dtype(NUMPY[dtype])] / np.float32(2)
    return np.nan_to_num(np.clip(w.astype(np.float32), -tiny, tiny)).astype(NUMPY[dtype])


def nonfinite(shape, dtype):
    w = normal(shape, dtype)
    w[0, :4] = [np.nan, np.inf, -np.inf, -np.nan]
    w[1, 100:164] = np.nan
    w[3, -1] = -np.inf
    return w


def ties(shape, dtype):
    """Halves and quarters below the largest code, which are the ties of one group or other."""
    w = np.random.default_rng(0).integers(-28, 29, shape) / 4
    w[:, 0::16] = 6
    w[1:3] *= 448 / 6
    return w.astype(NUMPY[dtype])


def magnitudes(shape, dtype):
    """Groups of very different sizes beside each other."""
    exponents = np.random.default_rng(1).integers(-12, 12, (shape[0], -(-shape[1] // 16)))
    factor = np.repeat(2.0**exponents, 16, 1)[:, : shape[1]]
    return (normal(shape, "F32").astype(np.float64) * factor).astype(NUMPY[dtype])


CASES = (normal, bits, outlier, zeros_between, subnormal, nonfinite, ties, magnitudes)


def shape_of(codec, rows=6):
    return rows, K[codec.steps[1]]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_weights(codec, dtype, make):
    check(codec, make(shape_of(codec), dtype), dtype)


def test_more_rows_than_a_block(codec, dtype):
    check(codec, normal((258, K[codec.steps[1]]), dtype), dtype)


@pytest.mark.parametrize("columns", [1, 7, 8, 9])
def test_one_step_of_rows_and_few_columns(codec, dtype, columns):
    row_step, column_step = codec.steps
    check(codec, normal((row_step, columns * column_step), dtype), dtype)


def test_more_columns_than_a_band(codec):
    check(codec, normal((2, 8448), "BF16"), "BF16")


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_pattern(codec, dtype):
    """In order, so that a group holds numbers of one size, and strided, so that it holds all."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(NUMPY[dtype])

    check(codec, patterns.reshape(256, 256), dtype)
    check(codec, patterns.reshape(256, 256).T, dtype)


@pytest.mark.parametrize("factor", [2.0**-20, 0.01, 0.9, 1.1, 100.0, 2.0**20, 1e-33])
@pytest.mark.parametrize("name", ["FP8", "NVFP4", "W4A8_NVFP4_FP8"])
def test_any_global_scale(name, dtype, factor):
    codec = calls.CODECS[name]
    w = magnitudes(shape_of(codec), dtype)
    w[0, 3], w[2, 5] = np.nan, np.inf
    global_scale = float(np.float32(global_of(codec, w) * factor))

    result = check(codec, w, dtype, global_scale)

    if name == "FP8":
        assert (result.counts[1] > 0) == (factor < 448 / 464)


@pytest.mark.parametrize("exponent", [-140, -125, -60, 0, 60, 120])
def test_mx_scales_at_their_thresholds(dtype, exponent):
    """amax is 448 * 2^e or 6 * 2^e, or its neighbour on either side."""
    with np.errstate(all="ignore"):
        for name, largest in (("MXFP8", 448.0), ("MXFP4", 6.0)):
            w = np.zeros((3, 32), NUMPY[dtype])
            threshold = np.array(largest * 2.0 ** (exponent - 3), NUMPY[dtype])
            unsigned = np.uint32 if dtype == "F32" else np.uint16
            pattern = int(threshold.view(unsigned))
            w.view(unsigned)[:, 5] = [max(pattern - 1, 0), pattern, pattern + 1]
            check(calls.CODECS[name], w, dtype)


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("name", ["NVFP4", "W4A8_NVFP4_FP8", "MXFP4"])
@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_rounds_to_nearest_even_at_every_midpoint(name, sign):
    """A group with a 6 has the scale 1 here, so w / scale is w."""
    codec = calls.CODECS[name]
    bit = 0 if sign == 1 else 8
    midpoints = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}
    expected = {value: code for code, value in enumerate(E2M1)}
    for middle, even in midpoints.items():
        below = max(code for code, value in enumerate(E2M1) if value < middle)
        expected[float(np.nextafter(np.float32(middle), np.float32(0)))] = below
        expected[middle] = even
        expected[float(np.nextafter(np.float32(middle), np.float32(9)))] = below + 1
    expected[float(np.float32(1e-45))] = 0
    w = np.zeros((1, 32 * len(expected)), np.float32)
    w[0, 0::16] = 6
    w[0, 1::32] = [sign * value for value in expected]

    outs = calls.quantize(codec, w, "F32").outs

    codes = oracle.unpack("e2m1", outs[0])[0, 1::32]
    # a zero has no sign, a number that rounds to zero has
    assert list(codes) == [code | bit if value else 0 for value, code in expected.items()]
    check(codec, w, "F32", 1.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_saturates(sign):
    """Too small a global scale: b is clamped to 448, w / scale is w."""
    w = np.full((1, 16), 6.0, np.float32) * sign
    w[0, 1:5] = np.array([6.5, 7.0, np.nextafter(np.float32(7), np.float32(8)), np.inf]) * sign
    w[0, 5] = 100 * sign

    result = check(calls.CODECS["NVFP4"], w, "F32", 1.0 / 448)

    assert result.counts == (1, 2)
    assert set(oracle.unpack("e2m1", result.outs[0])[0]) == {7 if sign > 0 else 15}


@pytest.mark.parametrize("sign", [1, -1])
def test_e4m3_saturates_beyond_464(sign):
    """464 is the tie between 448 and what would be 480, and rounds to 448 by itself."""
    w = np.full((2, 130), 464.0, np.float32) * sign
    w[0, 3] = w[1, 129] = np.nextafter(np.float32(464), np.float32(500)) * sign
    w[1, 7] = 1e30 * sign

    result = check(calls.CODECS["FP8"], w, "F32", 1.0)

    assert result.counts == (0, 3)
    assert set(result.outs[0].flat) == {0x7E if sign > 0 else 0xFE}


def test_a_scale_that_underflows_to_zero():
    """2^-9 * 2^-141 is 0 in f32: w / 0 saturates, 0 / 0 is the code 0."""
    w = np.zeros((1, 32), np.float32)
    w[0, 2], w[0, 18] = 2.0**-149, -(2.0**-149)

    result = check(calls.CODECS["NVFP4"], w, "F32", 2.0**-141)

    assert result.counts == (0, 2)
    codes = oracle.unpack("e2m1", result.outs[0])[0]
    assert codes[2] == 7
    assert codes[18] == 15
    assert np.count_nonzero(codes) == 2


@pytest.mark.parametrize("name", ["NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "MXFP8"])
def test_every_scale_byte_dequantizes(name, dtype):
    """256 rows, one scale byte each; a row has every code, of e2m1 in either nibble."""
    codec = calls.CODECS[name]
    k = 512
    every_byte = np.arange(256, dtype=np.uint8)
    codes = np.tile(every_byte, (256, 2 if codec.form.element == "e4m3" else 1))
    scale = np.repeat(every_byte[:, None], k // codec.form.group, 1)

    for global_scale in (1.0, 0.0123, 2.0**-126):
        actual = calls.dequantize(codec, [codes, scale], dtype, (256, k), global_scale)
        expected = calls.restored(codec, [codes, scale], dtype, global_scale)

        assert actual.tobytes() == expected.tobytes()
    nan = np.isnan(actual.astype(np.float32)).all(1)
    expected_nan = [127, 255] if codec.form.scale == "e4m3" else [255]
    assert list(np.flatnonzero(nan)) == expected_nan


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-130, 1e36])
@pytest.mark.parametrize("name", [name for name in calls.CODECS if name[:2] in ("FP", "W8", "W4")])
def test_every_code_dequantizes(name, dtype, scale):
    """Under f32 scales: their own or that of the weight."""
    codec = calls.CODECS[name]
    n, k = (4, 768) if codec.form.element == "int4" else (2, 768)
    outs = calls.outputs(codec, n, k)
    outs[0][:] = np.resize(np.arange(256, dtype=np.uint8), outs[0].shape)
    for out in outs[1:]:
        out[:] = scale if out.dtype == np.float32 else 0x38

    actual = calls.dequantize(codec, outs, dtype, (n, k), scale)

    assert actual.tobytes() == calls.restored(codec, outs, dtype, scale).tobytes()


def test_shapes_that_the_groups_do_not_divide_are_errors(codec):
    row_step, column_step = codec.steps
    for n, k in ((row_step, column_step + 1), (row_step + 1, column_step)):
        if n % row_step or k % column_step:
            with pytest.raises(
                KernelError, match=rf"{codec.name}: expected .* got shape \({n}, {k}\)"
            ):
                native.quantize(codec.name, 0, "BF16", n, k, [0, 0])
            with pytest.raises(
                KernelError, match=rf"{codec.name}: expected .* got shape \({n}, {k}\)"
            ):
                native.dequantize(codec.name, [0, 0], "BF16", n, k, 0)
