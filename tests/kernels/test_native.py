"""The C kernels on raw addresses: memory, threads, builds and settings, whatever the codec."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from qkernels import native
from qkernels.errors import KernelError

from . import native_calls as calls

HATCH_BUILD = Path(__file__).parents[2] / "hatch_build.py"

pytestmark = pytest.mark.skipif(
    not native.available(), reason="libqkernels.so was not built: python hatch_build.py"
)

normal, quantize = calls.normal, calls.quantize
# sums and bytes for any codec: not amax / 448 of anything
GLOBAL_SCALE = 2.0**-9


@pytest.fixture(params=calls.CODECS.values(), ids=calls.CODECS)
def codec(request):
    return request.param


@pytest.fixture(params=native.DTYPES)
def dtype(request):
    return request.param


def bytes_of(result):
    """All that a call wrote."""
    return [array.tobytes() for array in (*result.outs, result.sums)]


def columns(codec, about):
    """`about`, down to what the codec's groups divide."""
    return about // codec.steps[1] * codec.steps[1]


def test_statistics_are_those_of_the_definition(codec, dtype):
    """Lanes add eight f32 squares at a time, hence 1e-6 and not 1e-14."""
    w = normal((150, columns(codec, 1100)), dtype)

    result = quantize(codec, w, dtype, global_scale=GLOBAL_SCALE)

    w_f64 = w.astype(np.float64)
    restored = calls.restored(codec, result.outs, "F32", GLOBAL_SCALE).astype(np.float64)
    np.testing.assert_allclose(result.sums[0], ((w_f64 - restored) ** 2).sum(1), rtol=2e-6)
    np.testing.assert_allclose(result.sums[1], (w_f64**2).sum(1), rtol=1e-6)


@pytest.mark.parametrize("exponent", [-33, -25, 0, 25, 36])
def test_statistics_neither_overflow_nor_underflow(codec, exponent):
    """Squares of 1e36 or 1e-33 are outside of f32."""
    w = (normal((4, columns(codec, 384)), "F32") * 10.0**exponent).astype(np.float32)
    global_scale = float(np.float32(GLOBAL_SCALE * 10.0**exponent))

    result = quantize(codec, w, "F32", global_scale=global_scale)

    w_f64 = w.astype(np.float64)
    restored = calls.restored(codec, result.outs, "F32", global_scale).astype(np.float64)
    np.testing.assert_allclose(result.sums[0], ((w_f64 - restored) ** 2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(result.sums[1], (w_f64**2).sum(1), rtol=1e-6)


def test_statistics_change_no_byte(codec, dtype):
    w = normal((200, columns(codec, 1000)), dtype)

    with_sums = quantize(codec, w, dtype)
    without = quantize(codec, w, dtype, statistics=False)

    assert bytes_of(with_sums)[:-1] == bytes_of(without)[:-1]
    assert np.isnan(without.sums).all()


def test_nonfinite_elements_are_counted_and_left_out(codec, dtype):
    w = normal((150, columns(codec, 384)), dtype)
    clean = w.copy()
    w[0, :3] = [np.nan, np.inf, -np.inf]
    w[140, -1] = np.nan
    clean[~np.isfinite(w)] = 0

    result = quantize(codec, w, dtype)
    expected = quantize(codec, clean, dtype)

    assert result.counts.num_nonfinite == 4
    assert expected.counts.num_nonfinite == 0
    assert result.sums.tobytes() == expected.sums.tobytes()


@pytest.mark.parametrize("k", [8448, 1000])
def test_slices_of_rows_give_the_same_bytes_and_doubles(codec, k):
    """1024 and 8192 columns are read at a time."""
    w = normal((384, columns(codec, k)), "BF16")
    step = codec.block_rows
    starts = [0, 128, 256] if step == 128 else [0, step, 7 * step, 128]

    whole = quantize(codec, w, "BF16")
    parts = [
        quantize(codec, w[start:stop], "BF16")
        for start, stop in zip(starts, [*starts[1:], 384], strict=True)
    ]

    for index in range(len(whole.outs)):
        joined = np.concatenate([part.outs[index] for part in parts])
        assert joined.tobytes() == whole.outs[index].tobytes()
    sums = np.concatenate([part.sums for part in parts], axis=1)
    assert sums.tobytes() == whole.sums.tobytes()
    assert whole.counts == tuple(np.sum([part.counts for part in parts], axis=0))


def test_empty_weights(codec, dtype):
    for n, k in ((0, columns(codec, 256)), (4, 0), (0, 0)):
        result = quantize(codec, normal((n, k), dtype), dtype)

        assert result.counts == (0, 0)
        assert (result.sums == 0.0).all()
    if codec.form.scale == "row":
        assert (quantize(codec, normal((4, 0), dtype), dtype).outs[1] == 1.0).all()


@pytest.mark.parametrize("byte", [0x5A, 0xA5])
def test_nothing_outside_the_outputs_is_written(codec, dtype, byte):
    """Buffers at odd elements of larger ones: only their element type aligns them."""
    row_step, column_step = codec.steps
    n = 131 * row_step
    k = 133 if column_step == 1 else 9 * column_step
    source = np.zeros(n * k + 1, calls.NUMPY[dtype])
    source[1:] = normal(n * k, dtype)
    expected = quantize(codec, source[1:].reshape(n, k), dtype)
    wanted = bytes_of(expected)[:-1] + [row.tobytes() for row in expected.sums]
    items = [array.itemsize for array in expected.outs] + [8, 8]
    padded = [np.full(len(data) + 128, byte, np.uint8) for data in wanted]
    starts = [64 + itemsize for itemsize in items]
    at = [buffer.ctypes.data + start for buffer, start in zip(padded, starts, strict=True)]

    address = source.ctypes.data + source.itemsize
    native.quantize(codec.name, address, dtype, n, k, at[:-2], *at[-2:])

    for buffer, start, data in zip(padded, starts, wanted, strict=True):
        assert (buffer[:start] == byte).all()
        assert buffer[start : start + len(data)].tobytes() == data
        assert (buffer[start + len(data) :] == byte).all()


def test_dequantize_writes_only_its_output(codec, dtype):
    w = normal((2, 133 if codec.steps[1] == 1 else 9 * codec.steps[1]), dtype)
    outs = quantize(codec, w, dtype).outs
    out = np.full(w.nbytes + 128, 0x5A, np.uint8)

    native.dequantize(codec.name, calls.addresses(outs), dtype, *w.shape, out.ctypes.data + 64)

    assert out[64:-64].tobytes() == calls.restored(codec, outs, dtype, 1.0).tobytes()
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


def test_every_build_gives_the_same_bytes_and_doubles(codec, dtype, other_build, monkeypatch):
    w = normal((200, columns(codec, 1300)), dtype)
    w[5, 7] = np.nan
    expected = quantize(codec, w, dtype, global_scale=GLOBAL_SCALE / 8)
    monkeypatch.setattr(native, "LIBRARY", other_build)

    actual = quantize(codec, w, dtype, global_scale=GLOBAL_SCALE / 8)

    assert bytes_of(actual) == bytes_of(expected)
    assert actual.counts == expected.counts


def test_flush_to_zero_of_the_process_does_not_reach_the_kernel(codec):
    """2^-126 / 448 and 2^-9 * 2^-120 are subnormal: flushed to zero, codes would be others."""
    w = np.full((2, 128), 2.0**-126, np.float32)
    w[:, ::3] *= 0.4
    expected = quantize(codec, w, "F32", global_scale=2.0**-120)
    restored = calls.dequantize(codec, expected.outs, "F32", w.shape, 2.0**-120)
    torch.set_flush_denormal(True)
    try:
        actual = quantize(codec, w, "F32", global_scale=2.0**-120)
        again = calls.dequantize(codec, expected.outs, "F32", w.shape, 2.0**-120)
        still_set = float(torch.tensor(2.0**-126) / 448) == 0.0
    finally:
        torch.set_flush_denormal(False)

    assert expected.outs[0].any()
    assert bytes_of(actual) == bytes_of(expected)
    assert again.tobytes() == restored.tobytes()
    assert still_set


def test_threads_do_not_disturb_each_other(codec):
    weights = [normal((128, 512), "BF16", seed) for seed in range(8)]
    expected = [bytes_of(quantize(codec, w, "BF16")) for w in weights]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            actual = pool.map(lambda w: bytes_of(quantize(codec, w, "BF16")), weights)

            assert list(actual) == expected


def test_supports_what_the_library_has(codec):
    assert native.supports(codec.name)
    assert native.supports(codec.name.lower())
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
        native.quantize("FP8", 0, "F64", 0, 0, [0])
    with pytest.raises(KernelError, match="no symbol qk_nvfp9_quantize"):
        native.quantize("NVFP9", 0, "BF16", 0, 0, [0, 0])
    with pytest.raises(KernelError, match="both or neither"):
        native.quantize("FP8_PB_WO", 0, "BF16", 0, 0, [0, 0], 8, 0)
    with pytest.raises(KernelError, match="no symbol qk_nvfp9_dequantize"):
        native.dequantize("NVFP9", [0, 0], "BF16", 0, 0, 0)


def test_compiling_in_place_names_the_failure(tmp_path):
    """Neither a traceback nor a silent success where the compiler does not work."""
    command = [sys.executable, str(HATCH_BUILD), "-o", str(tmp_path / "never.so")]

    result = subprocess.run(command, env={"CC": "false"}, capture_output=True, text=True)

    assert result.returncode == 1
    assert result.stderr.startswith("hatch_build.py: false: ")
