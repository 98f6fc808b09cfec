"""The C kernels on raw addresses: what the format tests, which go through tensors, do not see."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

import qkernels
from qkernels import native
from qkernels.errors import KernelError

HATCH_BUILD = Path(__file__).parents[2] / "hatch_build.py"
NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}

pytestmark = pytest.mark.skipif(
    not native.available(), reason="libqkernels.so was not built: python hatch_build.py"
)


@pytest.fixture(params=qkernels.formats())
def format_name(request):
    return request.param


@pytest.fixture(params=native.DTYPES)
def dtype(request):
    return request.param


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(NUMPY[dtype])


def num_scales(format_name, n, k):
    return -(-n // 128) * -(-k // 128) if format_name == "FP8_PB_WO" else n


def quantize(format_name, w, dtype, *, statistics=True, library=native):
    """Bytes of the codes, scales, both sums and counts of one call."""
    n, k = w.shape
    codes = np.full((n, k), 0x5A, np.uint8)
    scale = np.full(num_scales(format_name, n, k), np.nan, np.float32)
    sums = np.full((2, n), np.nan)
    addresses = [array.ctypes.data for array in sums] if statistics else [0, 0]
    counts = library.quantize(
        format_name, w.ctypes.data, dtype, n, k, [codes.ctypes.data, scale.ctypes.data], *addresses
    )
    return codes, scale, sums, counts


def decoded(format_name, codes, scale):
    n, k = codes.shape
    value = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if format_name != "FP8_PB_WO":
        return value * scale[:, None]
    blocks = scale.reshape(-(-n // 128), -(-k // 128))
    return value * np.repeat(np.repeat(blocks, 128, 0), 128, 1)[:n, :k]


def test_statistics_are_those_of_the_definition(format_name, dtype):
    """Lanes add eight f32 squares at a time, hence 1e-6 and not 1e-14."""
    w = normal((150, 1100), dtype)

    codes, scale, sums, counts = quantize(format_name, w, dtype)

    w_f32 = w.astype(np.float32)
    error = (w_f32 - decoded(format_name, codes, scale)).astype(np.float64)
    np.testing.assert_allclose(sums[0], (error**2).sum(1), rtol=1e-6)
    np.testing.assert_allclose(sums[1], (w_f32.astype(np.float64) ** 2).sum(1), rtol=1e-6)
    assert counts == (0, 0)


@pytest.mark.parametrize("exponent", [-36, -25, 0, 25, 36])
def test_statistics_neither_overflow_nor_underflow(format_name, exponent):
    """Squares of 1e36 or 1e-36 are outside of f32."""
    w = (normal((4, 300), "F32") * 10.0**exponent).astype(np.float32)

    codes, scale, sums, _ = quantize(format_name, w, "F32")

    error = w.astype(np.float64) - decoded(format_name, codes, scale).astype(np.float64)
    np.testing.assert_allclose(sums[0], (error**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(sums[1], (w.astype(np.float64) ** 2).sum(1), rtol=1e-6)


def test_statistics_change_no_byte(format_name, dtype):
    w = normal((200, 1000), dtype)

    with_sums = quantize(format_name, w, dtype)
    without = quantize(format_name, w, dtype, statistics=False)

    assert with_sums[0].tobytes() == without[0].tobytes()
    assert with_sums[1].tobytes() == without[1].tobytes()


def test_nonfinite_elements_are_counted_and_left_out(format_name, dtype):
    w = normal((150, 300), dtype)
    clean = w.copy()
    w[0, :3] = [np.nan, np.inf, -np.inf]
    w[140, 299] = np.nan
    clean[w != w] = clean[np.isinf(w)] = 0

    *_, sums, counts = quantize(format_name, w, dtype)
    *_, clean_sums, clean_counts = quantize(format_name, clean, dtype)

    assert counts == native.Counts(num_nonfinite=4, num_saturated=0)
    assert clean_counts == (0, 0)
    assert sums.tobytes() == clean_sums.tobytes()


@pytest.mark.parametrize("k", [2304, 1000])
def test_slices_of_rows_give_the_same_doubles(format_name, k):
    w = normal((384, k), "BF16")
    whole = quantize(format_name, w, "BF16")
    parts = [quantize(format_name, w[start : start + 128], "BF16") for start in (0, 128, 256)]

    for index in range(3):
        axis = 1 if index == 2 else 0
        joined = np.concatenate([part[index] for part in parts], axis=axis)

        assert joined.tobytes() == whole[index].tobytes()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_weights(format_name, shape):
    _, scale, sums, counts = quantize(format_name, normal(shape, "F32"), "F32")

    assert counts == (0, 0)
    assert (scale == 1.0).all()
    assert (sums == 0.0).all()


@pytest.mark.parametrize("byte", [0x5A, 0xA5])
def test_nothing_outside_the_outputs_is_written(format_name, dtype, byte):
    """Buffers at odd elements of larger ones: only their element type aligns them."""
    n, k = 131, 133
    scales = num_scales(format_name, n, k)
    source = np.zeros(n * k + 1, NUMPY[dtype])
    source[1:] = normal(n * k, dtype)
    expected = quantize(format_name, source[1:].reshape(n, k), dtype)
    sizes = {"codes": n * k, "scale": 4 * scales, "err2": 8 * n, "ref2": 8 * n}
    padded = {name: np.full(size + 128, byte, np.uint8) for name, size in sizes.items()}
    starts = {"codes": 65, "scale": 68, "err2": 72, "ref2": 72}
    at = {name: padded[name].ctypes.data + starts[name] for name in sizes}

    native.quantize(
        format_name,
        source.ctypes.data + source.itemsize,
        dtype,
        n,
        k,
        [at["codes"], at["scale"]],
        at["err2"],
        at["ref2"],
    )

    for name, buffer in padded.items():
        start, stop = starts[name], starts[name] + sizes[name]
        outside = np.concatenate([buffer[:start], buffer[stop:]])

        assert (outside == byte).all(), name
    inside = {name: padded[name][starts[name] : starts[name] + sizes[name]] for name in sizes}
    assert inside["codes"].tobytes() == expected[0].tobytes()
    assert inside["scale"].tobytes() == expected[1].tobytes()
    assert inside["err2"].tobytes() + inside["ref2"].tobytes() == expected[2].tobytes()


def test_dequantize_writes_only_its_output(format_name, dtype):
    w = normal((131, 133), dtype)
    codes, scale, *_ = quantize(format_name, w, dtype)
    out = np.full(w.nbytes + 128, 0x5A, np.uint8)

    native.dequantize(
        format_name, [codes.ctypes.data, scale.ctypes.data], dtype, *w.shape, out.ctypes.data + 64
    )

    expected = decoded(format_name, codes, scale).astype(NUMPY[dtype])
    assert out[64:-64].tobytes() == expected.tobytes()
    assert (out[:64] == 0x5A).all()
    assert (out[-64:] == 0x5A).all()


@pytest.fixture(scope="module", params=["-DQK_NO_CLONES", "-O0"])
def other_build(request, tmp_path_factory):
    """The library for the default instruction set, and one in which nothing is vectorised."""
    spec = importlib.util.spec_from_file_location("hatch_build", HATCH_BUILD)
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    if not hatch_build.compilers():
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("build") / "libqkernels.so"
    hatch_build.compile_library(library, extra=["-DQK_NO_CLONES", request.param])
    return library


def test_every_build_gives_the_same_bytes_and_doubles(format_name, dtype, other_build, monkeypatch):
    w = normal((200, 1300), dtype)
    w[5, 7] = np.nan
    expected = quantize(format_name, w, dtype)
    monkeypatch.setattr(native, "LIBRARY", other_build)

    actual = quantize(format_name, w, dtype)

    for index in range(3):
        assert actual[index].tobytes() == expected[index].tobytes()
    assert actual[3] == expected[3]


def test_flush_to_zero_of_the_process_does_not_reach_the_kernel(format_name):
    """2^-126 / 448 is subnormal: flushed to zero, the scale would be 0 and every code NaN."""
    w = np.full((2, 3), 2.0**-126, np.float32)
    expected = quantize(format_name, w, "F32")
    torch.set_flush_denormal(True)
    try:
        actual = quantize(format_name, w, "F32")
        still_set = float(torch.tensor(2.0**-126) / 448) == 0.0
    finally:
        torch.set_flush_denormal(False)

    assert (expected[1] > 0).all()
    assert actual[1].tobytes() == expected[1].tobytes()
    assert actual[0].tobytes() == expected[0].tobytes()
    assert still_set


def test_threads_do_not_disturb_each_other(format_name):
    weights = [normal((256, 512), "BF16", seed) for seed in range(8)]
    expected = [quantize(format_name, w, "BF16") for w in weights]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            actual = list(pool.map(lambda w: quantize(format_name, w, "BF16"), weights))

            for one, other in zip(actual, expected, strict=True):
                assert [array.tobytes() for array in one[:3]] == [
                    array.tobytes() for array in other[:3]
                ]


@pytest.mark.parametrize("n", [0, 1, 127, 128, 8192, 20001])
def test_count_nonfinite(dtype, n):
    w = normal(n + 1, dtype)
    w[0] = np.nan
    places = sorted({0, n // 3, n - 1} - {-1}) if n else []

    assert native.count_nonfinite(w.ctypes.data + w.itemsize, dtype, n) == 0

    w[1:][places] = [np.nan, -np.inf, np.inf][: len(places)]

    assert native.count_nonfinite(w.ctypes.data + w.itemsize, dtype, n) == len(places)


def test_every_pattern_counts_as_in_numpy(dtype):
    if dtype == "F32":
        patterns = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32).view(np.float32)
    else:
        patterns = np.arange(1 << 16, dtype=np.uint16).view(NUMPY[dtype])
    expected = np.count_nonzero(~np.isfinite(patterns.astype(np.float32)))

    assert native.count_nonfinite(patterns.ctypes.data, dtype, patterns.size) == expected


def test_supports_what_the_library_has(format_name):
    assert native.supports(format_name)
    assert native.supports(format_name.lower())
    assert not native.supports("NVFP9")


def test_the_environment_turns_it_off(monkeypatch):
    monkeypatch.setenv("QKERNELS_NATIVE", "0")

    assert not native.available()
    assert not native.supports("FP8_PB_WO")
    with pytest.raises(KernelError, match="QKERNELS_NATIVE=0 is set"):
        native.count_nonfinite(0, "BF16", 0)


def test_a_missing_library_is_not_available(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")

    assert not native.available()
    with pytest.raises(KernelError, match=r"absent\.so is not available"):
        native.quantize("FP8_PB_WO", 0, "BF16", 0, 0, [0, 0])


def test_unknown_names_are_errors():
    with pytest.raises(KernelError, match="expected a dtype of BF16, F16, F32, got F64"):
        native.count_nonfinite(0, "F64", 0)
    with pytest.raises(KernelError, match="no symbol qk_nvfp9_quantize"):
        native.quantize("NVFP9", 0, "BF16", 0, 0, [0, 0])
    with pytest.raises(KernelError, match="both or neither"):
        native.quantize("FP8_PB_WO", 0, "BF16", 0, 0, [0, 0], 8, 0)


def test_compiling_in_place_names_the_failure(tmp_path):
    """Neither a traceback nor a silent success where the compiler does not work."""
    command = [sys.executable, str(HATCH_BUILD), "-o", str(tmp_path / "never.so")]

    result = subprocess.run(command, env={"CC": "false"}, capture_output=True, text=True)

    assert result.returncode == 1
    assert result.stderr.startswith("hatch_build.py: false: ")
