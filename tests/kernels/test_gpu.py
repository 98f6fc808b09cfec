"""The compiled Triton kernels at real sizes. The small tables of the format tests run on a GPU
too."""

from dataclasses import replace

import pytest
import torch

import qkernels
from qkernels import native

pytestmark = pytest.mark.gpu


@pytest.fixture(params=qkernels.formats())
def kernels(request):
    return qkernels.kernels_for(request.param)


def random_weight(n, k, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.empty(n, k, dtype=dtype, device="cuda")
    for start in range(0, n, 4096):
        part = w[start : start + 4096]
        part.copy_(torch.randn(part.shape, generator=generator, device="cuda", dtype=dtype) * 0.02)
    return w


@pytest.mark.parametrize("shape", [(8192, 28672), (4096, 4096), (1000, 70000), (5, 100)])
def test_triton_equals_torch_and_native(kernels, shape, same_bits):
    w = random_weight(*shape)
    w[0, 0], w[shape[0] - 1, shape[1] - 1] = torch.nan, -torch.inf

    actual = kernels.quantize_triton(w)

    references = [kernels.quantize_torch(w)]
    if native.available():
        references.append(kernels.quantize_native(w.cpu()))
    for expected in references:
        same_bits(actual["weight"], expected["weight"])
        same_bits(actual["weight_scale"], expected["weight_scale"])
    same_bits(kernels.dequantize_triton(actual), kernels.dequantize_torch(actual))


def test_numbers_past_2_to_the_31(kernels, same_bits):
    """65536 x 33024 has 2.16e9 elements: a 32-bit offset would wrap in the last rows."""
    n, k = 65536, 33024
    w = random_weight(n, k)

    actual = kernels.quantize_triton(w)
    decoded = kernels.dequantize_triton(actual)

    for start in (0, n // 2, n - 512, n - 128):
        stop = start + 128
        expected = kernels.quantize_torch(w[start:stop])
        scale = actual["weight_scale"]
        rows = len(expected["weight_scale"])
        scale_start = start * scale.shape[0] // n
        same_bits(actual["weight"][start:stop], expected["weight"])
        same_bits(scale[scale_start : scale_start + rows], expected["weight_scale"])
        same_bits(decoded[start:stop], kernels.dequantize_torch(expected))


@pytest.mark.parametrize("exponent", [-37, -30, 0, 30])
def test_both_paths_give_the_same_bytes(dtype, exponent):
    """The short path with remainders against the step by step one, at every scale it may take."""
    from qkernels import _triton_fp8

    w = random_weight(1024, 4096, torch.float32) * 10.0**exponent
    w = w.to(dtype).nan_to_num(0.0, 0.0, 0.0)
    w[3, 3] = -0.0
    for quantize, config, num_scales in (
        (_triton_fp8.quantize_blocks, _triton_fp8.block_config(w.device), 256),
        (_triton_fp8.quantize_rows, _triton_fp8.row_config(w.device, 4096), 1024),
    ):
        outs = []
        for fast, reread in ((config.fast, True), (config.fast, False), (False, False)):
            codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device="cuda")
            scale = torch.empty(num_scales, dtype=torch.float32, device="cuda")
            quantize(w, codes, scale, config=replace(config, fast=fast, reread=reread))
            outs.append((codes.view(torch.uint8), scale))
        for codes, scale in outs[1:]:
            assert torch.equal(codes, outs[0][0])
            assert torch.equal(scale, outs[0][1])


def test_launches_on_the_device_and_stream_of_the_tensor(kernels, same_bits):
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        w = torch.randn(256, 512, device=device).bfloat16()
    with torch.cuda.device(0), torch.cuda.stream(stream):
        actual = kernels.quantize_triton(w)
    stream.synchronize()

    same_bits(actual["weight"], kernels.quantize_torch(w)["weight"])


# torch says so whenever the mode is set
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_row_stats_do_not_wait_for_the_device(kernels):
    w = random_weight(4096, 8192)
    tensors = kernels.quantize_triton(w)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = kernels.row_stats(w, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert 0.0 < float(actual.err2_N.sum() / actual.ref2_N.sum()) < 1e-3
