"""The declaration of a format and its kernels say the same, for every format there is."""

import pytest
import torch

from qkernels import formats as kernel_formats
from qkernels import kernels_for, native
from qschema.formats import Format, formats

DTYPES = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
DECLARED = pytest.mark.parametrize("declared", formats().values(), ids=list(formats()))


def test_every_declared_format_has_kernels_and_no_other() -> None:
    assert kernel_formats() == sorted(formats())


@DECLARED
def test_native_kernels_were_built_for_it(declared: Format) -> None:
    assert native.supports(declared.name)


@DECLARED
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 128), (129, 300), (300, 129)])
def test_kernels_return_the_declared_tensors(declared: Format, rows: int, columns: int) -> None:
    found = kernels_for(declared.name).quantize_torch(torch.randn(rows, columns))

    assert {
        suffix: (DTYPES[tensor.dtype], tuple(tensor.shape)) for suffix, tensor in found.items()
    } == dict(declared.outputs(rows=rows, columns=columns))


@DECLARED
def test_blocks_of_rows_are_independent(declared: Format) -> None:
    """What the slicer relies on: rows cut at multiples of block_rows give the same tensors."""
    weight = torch.randn(300, 200)
    kernels = kernels_for(declared.name)
    whole = kernels.quantize_torch(weight)

    cut = declared.block_rows * (300 // declared.block_rows // 2)
    parts = [kernels.quantize_torch(weight[:cut]), kernels.quantize_torch(weight[cut:])]

    for suffix, tensor in whole.items():
        joined = torch.cat([part[suffix].view(torch.uint8) for part in parts])
        assert torch.equal(joined, tensor.view(torch.uint8))


@DECLARED
def test_the_error_bound_is_nearly_reached_and_not_exceeded(declared: Format) -> None:
    """272 lies halfway between the codes 256 and 288; 448 in each block and row sets scale 1."""
    weight = torch.full((256, 256), 272.0)
    weight[:, ::128] = 448.0
    kernels = kernels_for(declared.name)

    restored = kernels.dequantize_torch(kernels.quantize_torch(weight), dtype=torch.float32)

    error = ((weight - restored).norm() / weight.norm()).item()
    assert 0.9 * declared.error_bound < error <= declared.error_bound
