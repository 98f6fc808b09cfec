"""The quotient of the Triton kernels' short path, which no table of codes shows."""

import pytest
import torch


def launch_quotient(w, scale, narrow):
    """Quotients by both functions; skips where fma rounds twice."""
    import triton
    import triton.language as tl

    from qkernels import _triton_numbers

    @triton.jit
    def kernel(
        w_ptr, scale_ptr, out_ptr, quotient: tl.constexpr, NARROW: tl.constexpr, N: tl.constexpr
    ):
        at = tl.arange(0, N)
        w = tl.load(w_ptr + at)
        scale = tl.load(scale_ptr + at)
        tl.store(out_ptr + at, quotient(w, scale, tl.div_rn(1.0, scale), NARROW))

    @triton.jit
    def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr):
        tl.store(out_ptr, tl.fma(tl.load(x_ptr), tl.load(y_ptr), tl.load(z_ptr)))

    x, y, z, fused = (
        torch.tensor([value], device=w.device) for value in (1 + 2.0**-23, 1 - 2.0**-23, -1.0, 0.0)
    )
    fma_kernel[(1,)](x, y, z, fused)
    if fused.item() == 0.0:
        pytest.skip("this Triton's interpreter rounds fma twice; compiled kernels do not")
    outs = []
    for quotient in (_triton_numbers.quotient, _triton_numbers.quotient_without_minus_zero):
        outs.append(torch.empty_like(w))
        kernel[(1,)](w, scale, outs[-1], quotient, narrow, w.numel())
    return outs


def spread(mantissa_w, mantissa_scale, generator):
    """Numbers w and scales of these mantissas, quotients of 2^-10 to 2^10, both signs."""
    n = len(mantissa_w)
    exponent = torch.randint(28, 226, (n,), generator=generator)
    offset = torch.randint(-10, 11, (n,), generator=generator)
    scale = (mantissa_scale | exponent << 23).int().view(torch.float32)
    w = (mantissa_w | (exponent + offset).clamp(1, 254) << 23).int().view(torch.float32)
    w[1::2] *= -1
    w[:4] = torch.tensor([0.0, -0.0, 448.0, -448.0])
    return w, scale


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
def test_the_quotient_by_remainders_is_the_ieee_quotient(source):
    """Dense mantissas, all-ones mantissas and short ones."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    mantissa_w, mantissa_scale = torch.randint(0, 1 << 23, (2, 1 << 16), generator=generator)
    mantissa_w[::2] &= 0x7F0000
    mantissa_scale[::3] |= 0x7FFF00
    # as many bits as the source has
    mantissa_w &= {"float32": 0x7FFFFF, "float16": 0x7FE000, "bfloat16": 0x7F0000}[source]
    w, scale = (x.to(device) for x in spread(mantissa_w, mantissa_scale, generator))

    actual, without_minus_zero = launch_quotient(w, scale, source != "float32")

    expected = w / scale
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
    expected[1] = 0.0
    assert torch.equal(without_minus_zero.view(torch.int32), expected.view(torch.int32))


@pytest.mark.gpu
def test_one_step_is_exact_for_all_16_bit_significands():
    """2^33 pairs: the 2^10 significands of f16, bf16's 2^7 among them, by the 2^23 of scales.

    Powers of two change nothing inside the range of the short path.
    """
    import triton
    import triton.language as tl

    from qkernels import _triton_numbers

    @triton.jit
    def kernel(num_different_ptr, quotient: tl.constexpr, N: tl.constexpr):
        mantissa = tl.program_id(0) * N + tl.arange(0, N)
        scale = (mantissa | 0x3F800000).to(tl.float32, bitcast=True)
        inverse = tl.div_rn(1.0, scale)
        different = tl.zeros([N], dtype=tl.int32)
        for significand in range(1024):
            w = (0x3F800000 + (significand << 13)).to(tl.float32, bitcast=True)
            y = quotient(w, scale, inverse, True).to(tl.int32, bitcast=True)
            different += tl.where(y == tl.div_rn(w, scale).to(tl.int32, bitcast=True), 0, 1)
        tl.atomic_add(num_different_ptr, tl.sum(different, axis=0))

    num_different = torch.zeros(2, dtype=torch.int32, device="cuda")
    for place, quotient in enumerate(
        (_triton_numbers.quotient, _triton_numbers.quotient_without_minus_zero)
    ):
        kernel[((1 << 23) // 512,)](num_different[place:], quotient, 512)

    assert num_different.tolist() == [0, 0]
