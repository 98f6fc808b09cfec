"""Parts of the Triton kernels that no table of codes shows in the interpreter."""

import pytest
import torch


def launch_quotient(w, scale):
    """Quotients by the short path's remainder steps, and whether fma rounds once here."""
    import triton
    import triton.language as tl

    from qkernels import _triton_e4m3

    @triton.jit
    def kernel(w_ptr, scale_ptr, out_ptr, quotient: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        w = tl.load(w_ptr + at)
        scale = tl.load(scale_ptr + at)
        tl.store(out_ptr + at, quotient(w, scale, tl.div_rn(1.0, scale)))

    @triton.jit
    def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr):
        tl.store(out_ptr, tl.fma(tl.load(x_ptr), tl.load(y_ptr), tl.load(z_ptr)))

    x, y, z, fused = (
        torch.tensor([value], device=w.device) for value in (1 + 2.0**-23, 1 - 2.0**-23, -1.0, 0.0)
    )
    fma_kernel[(1,)](x, y, z, fused)
    out = torch.empty_like(w)
    kernel[(1,)](w, scale, out, _triton_e4m3.quotient, w.numel())
    return out, fused.item() != 0.0


def test_the_quotient_by_remainders_is_the_ieee_quotient():
    """Dense mantissas, all-ones mantissas and short ones, quotients of 2^-10 to 2^10."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    n = 1 << 16
    mantissa_w, mantissa_scale = torch.randint(0, 1 << 23, (2, n), generator=generator)
    mantissa_w[::2] &= 0x7F0000
    mantissa_scale[::3] |= 0x7FFF00
    exponent = torch.randint(28, 226, (n,), generator=generator)
    offset = torch.randint(-10, 11, (n,), generator=generator)
    scale = (mantissa_scale | exponent << 23).int().view(torch.float32)
    w = (mantissa_w | (exponent + offset).clamp(1, 254) << 23).int().view(torch.float32)
    w[1::2] *= -1
    w[:4] = torch.tensor([0.0, -0.0, 448.0, -448.0])
    w, scale = w.to(device), scale.to(device)

    actual, is_fused = launch_quotient(w, scale)

    if not is_fused:
        pytest.skip("this Triton's interpreter rounds fma twice; compiled kernels do not")
    assert torch.equal(actual.view(torch.int32), (w / scale).view(torch.int32))
