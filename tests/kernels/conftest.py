"""What the kernel tests share: devices, codecs, implementations, weights and comparisons.

Without a CUDA GPU the Triton kernels run in Triton's interpreter; with one, the same tests run the
compiled kernels.
"""

import os
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import native
from qkernels.codec import Codec

from . import weights

if not torch.cuda.is_available():
    # read when triton is imported, which qkernels does not do before a *_triton function is called
    os.environ["TRITON_INTERPRET"] = "1"

# weights are small: a second thread costs more than it brings, most where cores are shared
torch.set_num_threads(1)

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
Tensors = dict[str, Tensor]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this folder's GPU tests, by name, where there is no GPU."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(params=qkernels.codecs())
def codec(request: pytest.FixtureRequest) -> Codec:
    """Every codec."""
    return qkernels.kernels_for(request.param)


@pytest.fixture(params=["torch", "triton", "native"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Suffix of the methods under test; without a kernel of a codec they fail, not skip."""
    if request.param == "native" and not native.available():
        pytest.skip("libqkernels.so was not built: python hatch_build.py")
    return str(request.param)


@pytest.fixture
def device(implementation: str) -> torch.device:
    """Where the implementation under test runs."""
    cuda = implementation != "native" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


@pytest.fixture
def quantize(codec: Codec, implementation: str, device: torch.device) -> Callable[..., Tensors]:
    """The codec's method on its device; numpy, of Triton's interpreter, warns of overflow."""
    method = getattr(codec, f"quantize_{implementation}")

    def run(w: Tensor, **kwargs: Tensor) -> Tensors:
        with np.errstate(all="ignore"):
            return method(w.to(device), **kwargs)

    return run


@pytest.fixture
def dequantize(codec: Codec, implementation: str, device: torch.device) -> Callable[..., Tensor]:
    """The codec's method on its device."""
    method = getattr(codec, f"dequantize_{implementation}")

    def run(tensors: Mapping[str, Tensor], **kwargs: torch.dtype) -> Tensor:
        with np.errstate(all="ignore"):
            return method({name: tensor.to(device) for name, tensor in tensors.items()}, **kwargs)

    return run


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A source or output dtype."""
    return DTYPES[request.param]


@pytest.fixture(params=weights.WEIGHTS)
def weight(request: pytest.FixtureRequest, codec: Codec, dtype: torch.dtype) -> Tensor:
    """One weight of every kind in the table, on the CPU."""
    return weights.make(request.param, codec, dtype)


@pytest.fixture(params=weights.SHAPES)
def shaped_weight(request: pytest.FixtureRequest, codec: Codec, dtype: torch.dtype) -> Tensor:
    """One weight of every shape in the table, on the CPU."""
    return weights.make(request.param, codec, dtype)


@pytest.fixture
def normal_weight(codec: Codec, dtype: torch.dtype) -> Tensor:
    """An ordinary weight with ragged edges where the codec has any: 257 x 300 at least."""
    return weights.make("normal", codec, dtype)


@pytest.fixture
def same_bits() -> Callable[[Tensor, Tensor], None]:
    """Asserts the same shape, dtype, strides and bytes."""

    def check(actual: Tensor, expected: Tensor) -> None:
        actual, expected = actual.cpu(), expected.cpu()
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        assert actual.is_contiguous()
        if actual.numel() == 0:
            return
        assert actual.stride() == expected.stride()
        raw = actual.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)
        different = (raw[0] != raw[1]).nonzero().view(-1) // actual.element_size()
        assert len(different) == 0, (
            f"{len(different)} of {actual.numel() * actual.element_size()} bytes differ, first of "
            f"elements {different[:5].tolist()} of shape {tuple(actual.shape)}: "
            f"{actual.view(-1)[different[:5]].tolist()}, "
            f"expected {expected.view(-1)[different[:5]].tolist()}"
        )

    return check


@pytest.fixture
def same_tensors(same_bits: Callable[[Tensor, Tensor], None]) -> Callable[[Tensors, Tensors], None]:
    """Asserts the same names in the same order, each with the same bits."""

    def check(actual: Tensors, expected: Tensors) -> None:
        assert list(actual) == list(expected)
        for suffix in reversed(expected):
            same_bits(actual[suffix], expected[suffix])

    return check


@pytest.fixture(params=[0x5A, 0xA5], ids=["5a", "a5"])
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty returns with a byte, so that a missed store shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        tensor.untyped_storage().fill_(request.param)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
