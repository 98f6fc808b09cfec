"""What the reference kernels for vLLM compute, and what they refuse, without a vLLM."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qkernels import kernels_for
from qvalidate.engines import reference_vllm_math
from qvalidate.engines.reference_vllm_math import (
    dequantized_blocks,
    dequantized_mxfp8,
    dequantized_nvfp4,
    rounded_fp8,
    rounded_nvfp4,
)

ONE = torch.tensor(1.0)


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_nvfp4_weights_decode_as_our_codec_says() -> None:
    codec = kernels_for("nvfp4")
    stored = codec.quantize(weights(24, 64))

    found = dequantized_nvfp4(stored["weight"], stored["weight_scale"], stored["weight_scale_2"])

    assert torch.equal(found, codec.dequantize(stored, dtype=torch.float32))


def test_mxfp8_weights_decode_as_our_codec_says() -> None:
    codec = kernels_for("mxfp8")
    stored = codec.quantize(weights(24, 64))

    found = dequantized_mxfp8(stored["weight"], stored["weight_scale"])

    assert torch.equal(found, codec.dequantize(stored, dtype=torch.float32))


@pytest.mark.parametrize("num_n", [256, 200])
def test_blocks_decode_as_our_codec_says_also_a_part_of_one(num_n: int) -> None:
    codec = kernels_for("fp8_pb_wo")
    stored = codec.quantize(weights(num_n, 256))

    found = dequantized_blocks(stored["weight"], stored["weight_scale"][:, 0, :, 0], 128)

    assert torch.equal(found, codec.dequantize(stored, dtype=torch.float32))


def test_ties_between_e2m1_values_go_to_the_even_code() -> None:
    # a block whose largest magnitude is 6 has scale 1
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])

    found = rounded_nvfp4(torch.cat([ties, -ties])[None], ONE)

    assert found.tolist() == [torch.cat([expected, -expected]).tolist()]


def test_each_block_of_16_has_its_own_scale() -> None:
    values = torch.ones(1, 32)
    values[0, 16:] = 1 / 128
    values[0, ::16] *= 6

    assert torch.equal(rounded_nvfp4(values, ONE), values)


def test_block_scales_saturate_at_448_times_the_global_scale() -> None:
    values = torch.full((1, 16), 6000.0)

    assert rounded_nvfp4(values, ONE).unique().tolist() == [448.0 * 6]


def test_block_of_zeros_and_one_too_small_for_a_scale_become_zeros() -> None:
    values = torch.zeros(1, 32)
    values[0, 16:] = 1e-4

    assert rounded_nvfp4(values, ONE).count_nonzero() == 0


def test_shape_is_kept_for_values_in_three_dimensions() -> None:
    values = weights(2, 3, 32)

    flat = rounded_nvfp4(values.view(6, 32), ONE)

    assert torch.equal(rounded_nvfp4(values, ONE), flat.view(2, 3, 32))


def test_fp8_rounds_to_even_and_saturates() -> None:
    # between 16 and 32 E4M3 counts in steps of 2
    values = torch.tensor([17.0, 19.0, 18.5, 1000.0, -1000.0])

    found = rounded_fp8(values * 0.5, torch.tensor(0.5))

    assert found.tolist() == [8.0, 10.0, 9.0, 224.0, -224.0]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as vLLM's interpreter finds it, beside a vLLM 9.9 that has a platform only."""
    monkeypatch.setitem(sys.modules, "reference_vllm_math", reference_vllm_math)
    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.__dict__.update(__version__="9.9", __path__=[])
    platforms.__dict__.update(
        current_platform=SimpleNamespace(is_cpu=lambda: True),
        PlatformEnum=SimpleNamespace(CPU="cpu"),
    )
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return import_module("qvalidate.engines.reference_vllm")


def test_vllm_without_a_name_that_is_replaced_is_an_error_with_that_name(
    reference: ModuleType,
) -> None:
    expected = r"do not know vLLM 9\.9: no vllm\._custom_ops\.scaled_fp8_quant"
    with pytest.raises(reference.ReferenceKernelError, match=expected):
        reference.install()


def test_vllm_on_a_gpu_is_refused(reference: ModuleType) -> None:
    sys.modules["vllm.platforms"].__dict__["current_platform"].is_cpu = lambda: False

    with pytest.raises(reference.ReferenceKernelError, match="are for vLLM on a CPU"):
        reference.install()


def test_engine_in_a_process_of_its_own_is_refused(
    reference: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")

    with pytest.raises(reference.ReferenceKernelError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        reference.install()


def test_nothing_counts_as_used_before_it_is(reference: ModuleType) -> None:
    assert reference.used() == []
