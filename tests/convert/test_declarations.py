"""The declaration of a format and its kernels say the same, for every format there is."""

from math import lcm

import pytest
import torch

from qkernels import codecs, kernels_for, native
from qschema.formats import Format, find, formats

DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int8: "I8",
}
WRITABLE = [declared for declared in formats().values() if not declared.read_only]
DECLARED = pytest.mark.parametrize("declared", WRITABLE, ids=[found.name for found in WRITABLE])
# the largest number of each kind of code, and one that lies halfway between two codes
HALFWAY = {"E4M3": (448.0, 272.0), "E2M1": (6.0, 5.0)}
INTEGERS = {"INT8": 127.0, "INT4": 7.0}


def shape(declared: Format, *, rows: int, columns: int) -> tuple[int, int]:
    """Return the next larger size that the format can have."""
    n, k = declared.multiple_of_n, declared.multiple_of_k
    return -(-rows // n) * n, -(-columns // k) * k


def test_every_declared_format_has_kernels_and_no_other() -> None:
    assert codecs() == sorted({declared.codec for declared in formats().values()})


def test_kernels_are_those_of_a_declared_format() -> None:
    assert all(find(declared.codec).codec == declared.codec for declared in formats().values())


@DECLARED
def test_native_kernels_were_built_for_it(declared: Format) -> None:
    assert native.supports(declared.codec)


@DECLARED
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 128), (129, 300), (300, 129)])
def test_kernels_return_the_declared_tensors(declared: Format, rows: int, columns: int) -> None:
    """Codes and scales by block or row; of a whole weight, that which the codes depend on."""
    rows, columns = shape(declared, rows=rows, columns=columns)
    kernels = kernels_for(declared.codec)
    found = kernels.quantize_torch(torch.randn(rows, columns))
    if kernels.global_scale is not None:
        (spec,) = declared.specs("global")
        scale = found.pop(kernels.global_scale.suffix)
        assert (kernels.global_scale.suffix, kernels.global_scale.divisor) == (
            spec.suffix,
            spec.divisor,
        )
        assert (DTYPES[scale.dtype], tuple(scale.shape)) == (spec.dtype, ())

    outputs = declared.outputs(rows=rows, columns=columns)
    assert {
        suffix: (DTYPES[tensor.dtype], tuple(tensor.shape)) for suffix, tensor in found.items()
    } == {spec.suffix: outputs[spec.suffix] for spec in declared.specs("codes", "scale")}
    assert list(found) == [spec.suffix for spec in declared.specs("codes", "scale")]


@DECLARED
def test_kernels_need_the_declared_sizes(declared: Format) -> None:
    kernels = kernels_for(declared.codec)

    assert kernels.multiple_of_n == declared.multiple_of_n
    assert kernels.multiple_of_k == declared.multiple_of_k
    assert lcm(kernels.block_rows, declared.block_rows) == declared.block_rows


@DECLARED
def test_blocks_of_rows_are_independent(declared: Format) -> None:
    """What the slicer relies on: rows cut at multiples of block_rows give the same tensors."""
    weight = torch.randn(*shape(declared, rows=300, columns=200))
    kernels = kernels_for(declared.codec)
    scale = torch.tensor(0.01) if kernels.global_scale is not None else None
    whole = kernels.quantize_torch(weight, global_scale=scale)

    cut = declared.block_rows * (300 // declared.block_rows // 2)
    parts = [
        kernels.quantize_torch(part, global_scale=scale) for part in (weight[:cut], weight[cut:])
    ]

    for spec in declared.specs("codes", "scale"):
        joined = torch.cat([part[spec.suffix].view(torch.uint8) for part in parts])
        assert torch.equal(joined, whole[spec.suffix].view(torch.uint8))


@pytest.mark.parametrize(
    "declared",
    [declared for declared in WRITABLE if declared.stackable],
    ids=[declared.name for declared in WRITABLE if declared.stackable],
)
def test_blocks_of_columns_are_independent(declared: Format) -> None:
    """What the slicer relies on for stacks, which are cut at multiples of multiple_of_k."""
    weight = torch.randn(64, 10 * declared.multiple_of_k)
    kernels = kernels_for(declared.codec)
    scale = torch.tensor(0.01)
    whole = kernels.quantize_torch(weight, global_scale=scale)

    cut = 3 * declared.multiple_of_k
    parts = [
        kernels.quantize_torch(part, global_scale=scale)
        for part in (weight[:, :cut], weight[:, cut:])
    ]

    for spec in declared.specs("codes", "scale"):
        joined = torch.cat([part[spec.suffix].view(torch.uint8) for part in parts], dim=1)
        assert torch.equal(joined, whole[spec.suffix].view(torch.uint8))


@pytest.mark.parametrize(
    "declared",
    [declared for declared in WRITABLE if declared.element in HALFWAY],
    ids=[declared.name for declared in WRITABLE if declared.element in HALFWAY],
)
def test_the_error_bound_is_nearly_reached_and_not_exceeded(declared: Format) -> None:
    """272 lies halfway between the codes 256 and 288, 5 between 4 and 6; the largest code in each
    block and row sets its scale to 1."""
    largest, halfway = HALFWAY[declared.element]
    weight = torch.full((256, 256), halfway)
    weight[:, :: declared.multiple_of_k if declared.multiple_of_k > 1 else 128] = largest
    if declared.name == "W4A8_NVFP4_FP8":
        # so that the other blocks' scale is 64, an E4M3 number: 6 * 448 / (6 * 7)
        weight[0, 0] = 7.0
    kernels = kernels_for(declared.codec)

    restored = kernels.dequantize_torch(kernels.quantize_torch(weight), dtype=torch.float32)

    error = ((weight - restored).norm() / weight.norm()).item()
    assert 0.9 * declared.error_bound < error <= declared.error_bound


@pytest.mark.parametrize(
    "declared",
    [declared for declared in WRITABLE if declared.element in INTEGERS],
    ids=[declared.name for declared in WRITABLE if declared.element in INTEGERS],
)
def test_integers_are_off_by_half_a_step_at_most(declared: Format) -> None:
    """Of the largest of a row or block over 127 or 7; ties are off by all of it."""
    largest = INTEGERS[declared.element]
    generator = torch.Generator().manual_seed(1)
    weight = (torch.rand(64, 256, generator=generator) - 0.5) * 2 * largest
    weight[:, ::128] = largest
    weight[:, 1::128] = 2.5
    kernels = kernels_for(declared.codec)

    restored = kernels.dequantize_torch(kernels.quantize_torch(weight), dtype=torch.float32)

    off = (weight - restored).abs()
    assert off.max().item() == 0.5
    assert (off <= 0.5 + declared.error_bound * weight.abs()).all()
