"""What codecs refuse: every method of every codec says what it expected and what it got."""

import re

import pytest
import torch

from qkernels.errors import KernelError

from . import oracle, weights

METHODS = ("", "_torch", "_triton", "_native")
SCALED = [name for name, form in oracle.FORMATS.items() if form.divisor]
UNSCALED = [name for name, form in oracle.FORMATS.items() if not form.divisor]


def refuses(method, *args, match, **kwargs):
    with pytest.raises(KernelError, match=match):
        method(*args, **kwargs)


@pytest.fixture(params=METHODS)
def quantize(codec, request):
    return getattr(codec, f"quantize{request.param}")


@pytest.fixture(params=METHODS)
def dequantize(codec, request):
    return getattr(codec, f"dequantize{request.param}")


@pytest.fixture
def tensors(codec):
    """Of a weight of 4 x 256."""
    return codec.quantize_torch(weights.normal((4, 256), torch.bfloat16))


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 128, 128)], ids=str)
def test_a_weight_of_another_rank(quantize, shape):
    match = rf"of shape \(N, K\) or \(E, N, K\), got shape {re.escape(str(shape))}"

    refuses(quantize, torch.ones(shape), match=match)


@pytest.mark.parametrize("wrong", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_weight_of_another_dtype(quantize, wrong):
    refuses(
        quantize, torch.ones(2, 128).to(wrong), match=f"dtype of .*, got {re.escape(str(wrong))}"
    )


MULTIPLES = {
    ("NVFP4", "K"): 16,
    ("W4A8_NVFP4_FP8", "K"): 32,
    ("MXFP8", "K"): 32,
    ("MXFP4", "K"): 32,
    ("W4A16_AWQ", "K"): 128,
    ("W4A16_AWQ", "N"): 2,
}


@pytest.mark.parametrize("batch", [(), (2,)], ids=["matrix", "batch"])
def test_sizes_that_are_no_multiples(codec, quantize, batch):
    """Other codecs take any size: their shapes in the tables are not rounded up."""
    k = MULTIPLES.get((codec.name, "K"), 1)
    n = MULTIPLES.get((codec.name, "N"), 1)

    assert weights.fitting(codec, (1, 1)) == (n, k)
    if k > 1:
        wrong = torch.ones(*batch, 2, 128 + k // 2)
        refuses(quantize, wrong, match=f"expected K in multiples of {k}, got {128 + k // 2}")
    if n > 1:
        refuses(quantize, torch.ones(*batch, 3, 128), match=f"N in multiples of {n}, got 3")


@pytest.mark.parametrize("codec", UNSCALED, indirect=True)
def test_a_global_scale_that_the_codec_has_not(codec, quantize):
    match = f"{codec.name} has no scale of the whole weight"

    refuses(quantize, torch.ones(2, 128), global_scale=torch.tensor(1.0), match=match)


@pytest.mark.parametrize("codec", SCALED, indirect=True)
@pytest.mark.parametrize(
    ("shape", "scale", "match"),
    [
        ((2, 128), torch.ones(1), r"shape \(\), got dtype torch\.float32 and shape \(1,\)"),
        ((2, 128), torch.tensor(1.0).double(), r"dtype float32 .*, got dtype torch\.float64"),
        ((3, 2, 128), torch.tensor(1.0), r"shape \(3,\), got .* shape \(\)"),
        ((3, 2, 128), torch.ones(2), r"shape \(3,\), got .* shape \(2,\)"),
        ((3, 2, 128), torch.ones(3, 1), r"shape \(3,\), got .* shape \(3, 1\)"),
    ],
)
def test_a_global_scale_of_another_dtype_or_shape(quantize, shape, scale, match):
    refuses(quantize, torch.ones(shape), global_scale=scale, match=match)


@pytest.mark.parametrize("wrong", [torch.float64, torch.int8], ids=str)
def test_an_output_of_another_dtype(dequantize, tensors, wrong):
    refuses(dequantize, tensors, dtype=wrong, match=f"got {re.escape(str(wrong))}")


def test_missing_and_unknown_tensors(codec, dequantize, tensors):
    names = re.escape(str(sorted(tensors)))
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        refuses(dequantize, rest, match=f"expected the tensors {names}, got")
    extra = {**tensors, "input_scale": torch.tensor(1.0)}
    refuses(dequantize, extra, match=f"expected the tensors {names}, got .*input_scale")


def test_tensors_of_another_dtype(dequantize, tensors):
    for name, tensor in tensors.items():
        wrong = {**tensors, name: tensor.to(torch.float64)}
        refuses(dequantize, wrong, match=rf"expected {name} of dtype .* got dtype torch\.float64")


def test_tensors_of_another_shape(dequantize, tensors):
    for name in set(tensors) - {"weight"}:
        tensor = tensors[name]
        for shape in ((1, *tensor.shape), (*tensor.shape, 1)):
            wrong = {**tensors, name: tensor.reshape(shape)}
            refuses(dequantize, wrong, match=rf"expected {name} .*shape .*{re.escape(str(shape))}")


def test_scales_of_another_weight(codec, dequantize, tensors):
    """More rows and more columns, by a multiple of everything."""
    for shape in ((132, 256), (4, 512)):
        other = codec.quantize_torch(torch.ones(shape))
        wrong = {**tensors, "weight_scale": other["weight_scale"]}
        if other["weight_scale"].shape != tensors["weight_scale"].shape:
            refuses(dequantize, wrong, match="expected weight_scale of dtype")


def test_codes_of_another_rank(dequantize, tensors):
    wrong = {**tensors, "weight": tensors["weight"][0]}

    refuses(dequantize, wrong, match=r"expected weight of shape \(N, K\) or \(E, N, K\), got")


@pytest.mark.parametrize(
    "codec", ["NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "MXFP8", "W4A16_AWQ"], indirect=True
)
def test_codes_of_no_multiple(codec, dequantize, tensors):
    wrong = {**tensors, "weight": tensors["weight"][:, :4].contiguous()}

    refuses(dequantize, wrong, match=f"expected K in multiples of {codec.multiple_of_k}, got")


def test_tensors_on_two_devices(dequantize, tensors):
    for name in set(tensors) - {"weight"}:
        wrong = {**tensors, name: tensors[name].to("meta")}
        refuses(dequantize, wrong, match=f"expected {name} on cpu beside weight, got meta")


def test_the_library_takes_tensors_on_the_cpu(codec, tensors):
    match = "expected a tensor on the CPU, got one on meta"
    elsewhere = {name: tensor.to("meta") for name, tensor in tensors.items()}

    refuses(codec.quantize_native, torch.ones(2, 128, device="meta"), match=match)
    refuses(codec.dequantize_native, elsewhere, match=match)


def test_row_stats_of_another_weight(codec, tensors):
    for shape in ((2, 256), (6, 256), (4, 128), (4, 384)):
        refuses(codec.row_stats, torch.ones(shape), tensors, match="shape")


def test_row_stats_of_a_batch(codec, tensors):
    batch = codec.quantize_torch(torch.ones(2, 4, 256))

    refuses(codec.row_stats, torch.ones(2, 4, 256), batch, match=r"shape \(N, K\), got")
    refuses(codec.row_stats, torch.ones(4, 256), batch, match="shape")
