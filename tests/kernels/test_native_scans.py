"""The native library's work on plain tensors: scans, transposes, and factors in place."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from qkernels import native
from qkernels.errors import KernelError

NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
LENGTHS = [0, 1, 127, 128, 8192, 20001]

pytestmark = pytest.mark.skipif(
    not native.available(), reason="libqkernels.so was not built: python hatch_build.py"
)


@pytest.fixture(params=native.DTYPES)
def dtype(request):
    return request.param


def normal(shape, dtype):
    return np.random.default_rng(0).normal(0, 0.02, shape).astype(NUMPY[dtype])


def patterns(dtype):
    """All of 16 bits; of f32, one in 65521."""
    if dtype == "F32":
        every = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32)
    else:
        every = np.arange(1 << 16, dtype=np.uint16)
    return every.view(NUMPY[dtype])


@pytest.mark.parametrize("n", LENGTHS)
def test_count_nonfinite(dtype, n):
    w = normal(n + 1, dtype)
    w[0] = np.nan
    places = sorted({0, n // 3, n - 1} - {-1}) if n else []

    assert native.count_nonfinite(w.ctypes.data + w.itemsize, dtype, n) == 0

    w[1:][places] = [np.nan, -np.inf, np.inf][: len(places)]

    assert native.count_nonfinite(w.ctypes.data + w.itemsize, dtype, n) == len(places)


@pytest.mark.parametrize("n", LENGTHS)
def test_amax(dtype, n):
    """The element before the weight is larger, and NaN and Inf do not count."""
    w = normal(n + 1, dtype)
    w[0] = 9
    expected = float(np.max(np.abs(w[1:].astype(np.float32)), initial=0))

    assert native.amax(w.ctypes.data + w.itemsize, dtype, n) == (expected, 0)

    for place in {0, n // 2, n - 1} if n > 3 else ():
        w[1:][place] = -7 - place % 2
        expected = max(expected, 7 + place % 2)

        assert native.amax(w.ctypes.data + w.itemsize, dtype, n) == (expected, 0)


def test_every_pattern_as_in_numpy(dtype):
    w = patterns(dtype)
    x = w.astype(np.float32)
    largest = float(np.max(np.abs(x), where=np.isfinite(x), initial=0))
    num_nonfinite = np.count_nonzero(~np.isfinite(x))

    assert native.count_nonfinite(w.ctypes.data, dtype, w.size) == num_nonfinite
    assert native.amax(w.ctypes.data, dtype, w.size) == (largest, num_nonfinite)


@pytest.mark.parametrize("value", [0.0, -0.0, np.nan, -np.inf])
def test_amax_of_nothing_but_one_value(dtype, value):
    w = np.full(300, value, NUMPY[dtype])

    assert native.amax(w.ctypes.data, dtype, 300) == (0.0, 0 if value == 0 else 300)


def test_amax_under_flush_to_zero():
    """f16 becomes f32 by way of a subnormal number."""
    w = np.zeros(300, np.float16)
    w[123] = -(2.0**-24)
    torch.set_flush_denormal(True)
    try:
        actual = native.amax(w.ctypes.data, "F16", 300)
    finally:
        torch.set_flush_denormal(False)

    assert actual == (2.0**-24, 0)


SIZES = [0, 1, 15, 16, 33, 64, 130, 700]


@pytest.mark.parametrize("itemsize", UNSIGNED)
@pytest.mark.parametrize(("rows", "cols"), list(itertools.product(SIZES, SIZES)))
def test_transpose(itemsize, rows, cols):
    """Tiles are 64, 32 or 16 wide, eight of them in a strip."""
    unsigned = UNSIGNED[itemsize]
    rng = np.random.default_rng(0)
    src = rng.integers(0, np.iinfo(unsigned).max, (rows, cols), unsigned, endpoint=True)
    out = np.full(src.size + 64, 0x5A, unsigned)

    native.transpose(src.ctypes.data, out[32:].ctypes.data, itemsize, rows, cols)

    assert out[32:-32].tobytes() == np.ascontiguousarray(src.T).tobytes()
    assert (out[:32] == 0x5A).all()
    assert (out[-32:] == 0x5A).all()


@pytest.mark.parametrize("itemsize", [0, 3, 8])
def test_transpose_of_other_items_is_an_error(itemsize):
    with pytest.raises(KernelError, match=f"itemsize of 1, 2 or 4, got {itemsize}"):
        native.transpose(0, 0, itemsize, 0, 0)


def scaled(w, factor, dtype):
    """The product rounded to f32, then to the dtype; one NaN."""
    with np.errstate(all="ignore"):
        product = w.astype(np.float32) * factor
        product = np.where(np.isnan(product), np.float32(np.nan), product)
        return product.astype(NUMPY[dtype])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (7, 128), (5, 300), (128, 64)])
def test_factors_of_columns_and_rows(dtype, shape):
    n, k = shape
    rng = np.random.default_rng(1)
    columns = rng.lognormal(0, 3, k).astype(np.float32)
    rows = rng.lognormal(0, 3, n).astype(np.float32)
    w = np.resize(np.concatenate([normal(n * k, dtype), patterns(dtype)[::7]]), shape)
    by_columns, by_rows = w.copy(), w.copy()

    native.scale_columns(by_columns.ctypes.data, dtype, n, k, columns.ctypes.data)
    native.scale_rows(by_rows.ctypes.data, dtype, n, k, rows.ctypes.data)

    assert by_columns.tobytes() == scaled(w, columns[None, :], dtype).tobytes()
    assert by_rows.tobytes() == scaled(w, rows[:, None], dtype).tobytes()


@pytest.mark.parametrize("factor", [1.0, -1.5, 1 / 3, 2.0**-20, 1e30, 0.0, np.inf, np.nan])
def test_factors_of_every_pattern(dtype, factor):
    w = patterns(dtype)[: 1 << 16].reshape(256, -1)
    factors = np.full(256, factor, np.float32)
    actual = w.copy()

    native.scale_rows(actual.ctypes.data, dtype, *w.shape, factors.ctypes.data)

    assert actual.tobytes() == scaled(w, np.float32(factor), dtype).tobytes()


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.count_nonfinite(0, "F64", 0),
        lambda: native.amax(0, "F64", 0),
        lambda: native.scale_columns(0, "F64", 0, 0, 0),
        lambda: native.scale_rows(0, "F64", 0, 0, 0),
    ],
)
def test_unknown_dtypes_are_errors(call):
    with pytest.raises(KernelError, match="expected a dtype of BF16, F16, F32, got F64"):
        call()
