"""The compiled Triton kernels at real sizes. The small tables elsewhere run on a GPU too."""

import pytest
import torch

from qkernels import native

from . import weights

pytestmark = pytest.mark.gpu

BATCHES = [(128, 768, 2048), (3, 130, 256), (5, 6, 128)]


def random_weight(shape, dtype=torch.bfloat16):
    """Normal numbers, made by rows: the f32 ones of a large weight would not fit beside it."""
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.empty(shape, dtype=dtype, device="cuda")
    rows = w.view(-1, shape[-1])
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        part.copy_(torch.randn(part.shape, generator=generator, device="cuda", dtype=dtype) * 0.02)
    return w


def given_scale(codec, tensors):
    """Keyword arguments to quantize part of a weight as the whole was."""
    whole = codec.global_scale
    return {"global_scale": tensors[whole.suffix]} if whole else {}


def rows_of(codec, tensors, start, stop, k):
    """The tensors of rows start to stop of a matrix."""
    before, after = codec.shapes(start, k), codec.shapes(stop, k)
    part = {name: tensors[name][before[name][1][0] : after[name][1][0]] for name in after}
    return part | {name: tensors[name] for name in tensors if name not in part}


@pytest.mark.parametrize("shape", [(8192, 28672), (4096, 4096), (1000, 70000), (5, 100), (300, 1)])
def test_triton_equals_torch_and_native(codec, shape, same_bits, same_tensors):
    w = random_weight(weights.fitting(codec, shape))
    w[0, 0], w[-1, -1] = torch.nan, -torch.inf

    actual = codec.quantize_triton(w)

    same_tensors(actual, codec.quantize_torch(w))
    same_bits(codec.dequantize_triton(actual), codec.dequantize_torch(actual))
    if native.supports(codec.name):
        on_cpu = {name: tensor.cpu() for name, tensor in actual.items()}
        same_tensors(actual, codec.quantize_native(w.cpu()))
        same_bits(codec.dequantize_triton(actual), codec.dequantize_native(on_cpu))


@pytest.mark.parametrize(
    "shape", [(2048, 4096), (292, 28672), (9, 70001), (8192, 128), (40000, 16), (300, 1)]
)
def test_triton_and_torch_count_and_add_the_same(codec, dtype, shape):
    w = random_weight(weights.fitting(codec, shape), dtype)
    w[0, 0], w[-1, -1] = torch.nan, -torch.inf
    whole = {"global_scale": torch.tensor(3e-5, device="cuda")} if codec.global_scale else {}
    tensors = codec.quantize_triton(w, **whole)

    actual, expected = codec.row_stats_triton(w, tensors), codec.row_stats_torch(w, tensors)

    torch.testing.assert_close(actual.err2_N, expected.err2_N, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(actual.ref2_N, expected.ref2_N, rtol=1e-13, atol=0.0)
    assert int(actual.num_nonfinite) == int(expected.num_nonfinite) == 2
    assert int(actual.num_saturated) == int(expected.num_saturated)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_given_buffers_are_all_the_memory_there_is(codec):
    w = random_weight((2048, 4096))
    tensors = codec.quantize_triton(w)
    stats = codec.row_stats_triton(w, tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        codec.quantize_into_triton(w, tensors)
        codec.row_stats_into_triton(w, tensors, stats)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_numbers_past_2_to_the_31(codec, same_bits, same_tensors):
    """65536 x 33024 has 2.16e9 elements: a 32-bit offset would wrap in the last rows."""
    n, k = 65536, 33024
    w = random_weight((n, k))
    w[n - 1, k - 1] = 1.5

    actual = codec.quantize_triton(w)
    decoded = codec.dequantize_triton(actual)

    assert codec.amax_triton(w).item() == 1.5
    for start in (0, n // 2, n - 512, n - 128):
        stop = start + 128
        expected = codec.quantize_torch(w[start:stop], **given_scale(codec, actual))
        same_tensors(rows_of(codec, actual, start, stop, k), expected)
        same_bits(decoded[start:stop], codec.dequantize_torch(expected))


@pytest.mark.parametrize("shape", BATCHES)
def test_a_batch_is_its_matrices(codec, shape, same_bits, same_tensors):
    w = random_weight(weights.fitting(codec, shape))
    w[1] *= 300.0
    w[2] = 0.0

    actual = codec.quantize_triton(w)
    decoded = codec.dequantize_triton(actual)

    for place, matrix in enumerate(w):
        expected = codec.quantize_triton(matrix)
        same_tensors({name: tensor[place] for name, tensor in actual.items()}, expected)
        same_bits(decoded[place], codec.dequantize_triton(expected))


@pytest.mark.parametrize("exponent", [-37, -30, 0, 3, 30])
def test_both_paths_give_the_same_bytes(
    codec, dtype, exponent, monkeypatch, same_bits, same_tensors
):
    """The short path of ordinary tiles against the step by step one, at every scale."""
    from qkernels import _triton_launch

    w = random_weight((1024, 4096), torch.float32) * 10.0**exponent
    w = w.to(dtype).nan_to_num(0.0, 0.0, 0.0)
    w[3, 3] = -0.0
    w[5, :512] = -0.0
    actual = codec.quantize_triton(w)
    decoded = codec.dequantize_triton(actual, dtype=dtype)

    monkeypatch.setattr(_triton_launch, "_has_short_path", lambda device: False)
    expected = codec.quantize_triton(w)

    same_tensors(actual, expected)
    same_bits(decoded, codec.dequantize_triton(expected, dtype=dtype))


def test_launches_on_the_device_and_stream_of_the_tensor(codec, same_tensors):
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        w = torch.randn(256, 512, device=device).bfloat16()
    with torch.cuda.device(0), torch.cuda.stream(stream):
        actual = codec.quantize_triton(w)
    stream.synchronize()

    same_tensors(actual, codec.quantize_torch(w))


# torch says so whenever the mode is set
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_row_stats_do_not_wait_for_the_device(codec):
    w = random_weight((4096, 8192))
    tensors = codec.quantize_triton(w)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = codec.row_stats(w, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert 0.0 < float(actual.err2_N.sum() / actual.ref2_N.sum()) < 0.05
