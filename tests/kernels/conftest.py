"""What the kernel tests share: devices, implementations, weights, and ml_dtypes as the oracle.

Without a CUDA GPU the Triton kernels run in Triton's interpreter; with one, the same tests run the
compiled kernels.
"""

import os
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkernels import native

if not torch.cuda.is_available():
    # read when triton is imported, which qkernels does not do before a *_triton function is called
    os.environ["TRITON_INTERPRET"] = "1"

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
INT_VIEW = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips this folder's GPU tests, by name, where there is no GPU."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(params=["torch", "triton", "native"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Suffix of the functions under test."""
    if request.param == "native" and not native.available():
        pytest.skip("libqkernels.so was not built: python hatch_build.py")
    return str(request.param)


@pytest.fixture
def device(implementation: str) -> torch.device:
    """Where the implementation under test runs."""
    cuda = implementation != "native" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A source or output dtype."""
    return DTYPES[request.param]


def _bits(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random patterns of a dtype, NaN and Inf among them."""
    info = torch.iinfo(INT_VIEW[dtype])
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(info.min, info.max + 1, shape, generator=generator)
    return bits.to(INT_VIEW[dtype]).view(dtype)


def _normal(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)


def _finite_bits(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    w = _bits(shape, dtype, 2)
    return w.where(w.isfinite(), 0.0)


def _nonfinite(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """NaN of both signs and several payloads, and both infinities, in and between finite blocks."""
    w = _normal(shape, dtype)
    w[3, 5], w[3, 6], w[140, 7], w[141, 139] = torch.inf, -torch.inf, torch.nan, -torch.nan
    special = _bits((1, 4096), dtype, 3)
    special = special[~special.isfinite()][:9]
    w[20, : len(special)] = special
    w[30] = torch.nan
    return w


def _outlier(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    w = _normal(shape, dtype)
    w[7, 9] = torch.finfo(dtype).max
    return w


def _negative_underflow(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    w = torch.full(shape, -1e-4).to(dtype)
    w[:, 0] = 448.0
    w[5] = -0.0
    return w


def _tiny(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Subnormals of the source, so that amax counts as the smallest normal number."""
    return _bits(shape, dtype, 4).abs().clamp(max=torch.finfo(dtype).tiny / 2).nan_to_num(0.0)


def _zero_block(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    w = _normal(shape, dtype)
    w[:130, :130] = 0.0
    w[2, 2] = -0.0
    return w


def _strided(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return _normal((2 * shape[1], 3 * shape[0]), dtype)[::2, ::3].T


ODD = (150, 140)
WEIGHTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "normal": lambda dtype: _normal((257, 300), dtype),
    "aligned": lambda dtype: _normal((256, 128), dtype),
    "finite_bits": lambda dtype: _finite_bits(ODD, dtype),
    "nonfinite": lambda dtype: _nonfinite(ODD, dtype),
    "only_nan": lambda dtype: torch.full(ODD, torch.nan, dtype=dtype),
    "only_inf": lambda dtype: torch.full(ODD, -torch.inf, dtype=dtype),
    "outlier": lambda dtype: _outlier(ODD, dtype),
    "negative_underflow": lambda dtype: _negative_underflow(ODD, dtype),
    "tiny": lambda dtype: _tiny(ODD, dtype),
    "zeros": lambda dtype: torch.zeros(ODD, dtype=dtype),
    "negative_zeros": lambda dtype: torch.full(ODD, -0.0, dtype=dtype),
    "zero_block": lambda dtype: _zero_block((150, 270), dtype),
    "one_row": lambda dtype: _normal((1, 300), dtype),
    "one_column": lambda dtype: _normal((300, 1), dtype),
    "one_element": lambda dtype: _normal((1, 1), dtype),
    "no_rows": lambda dtype: torch.empty(0, 130, dtype=dtype),
    "no_columns": lambda dtype: torch.empty(130, 0, dtype=dtype),
    "transposed": lambda dtype: _normal((140, 150), dtype).T,
    "part_of_a_row": lambda dtype: _normal((5, 300), dtype)[3:4, 5:145],
    "strided": lambda dtype: _strided(ODD, dtype),
}


@pytest.fixture(params=WEIGHTS)
def weight(request: pytest.FixtureRequest, dtype: torch.dtype) -> Tensor:
    """One weight of every kind in the table, on the CPU."""
    return WEIGHTS[request.param](dtype)


@pytest.fixture
def normal_weight(dtype: torch.dtype) -> Tensor:
    """An ordinary weight with ragged edges: 257 x 300."""
    return WEIGHTS["normal"](dtype)


@pytest.fixture
def e4m3_bytes() -> Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.uint8]]:
    """The oracle: codes of w / scale by numpy's f32 division and ml_dtypes' conversion.

    ml_dtypes turns what is above 464 and infinities into NaN, hence the clip; the sign of a NaN
    that went through a division is the CPU's affair, hence the explicit NaN.
    """

    def encode(w: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.uint8]:
        is_nan = np.isnan(w)
        with np.errstate(over="ignore"):
            quotient = np.where(is_nan, np.float32(0.0), w) / scale
        codes = np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        signed_nan = np.where(np.signbit(w), 0xFF, 0x7F).astype(np.uint8)
        return np.where(is_nan, signed_nan, codes)

    return encode


@pytest.fixture
def scale_of() -> Callable[[NDArray[np.float32], torch.dtype], np.float32]:
    """The oracle: scale of the elements of one block or row, f32."""

    def scale(w: NDArray[np.float32], dtype: torch.dtype) -> np.float32:
        amax = np.abs(w[np.isfinite(w)]).max(initial=np.float32(0.0))
        if amax == 0.0:
            return np.float32(1.0)
        return np.float32(max(amax, np.float32(torch.finfo(dtype).tiny))) / np.float32(448.0)

    return scale


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
        different = (actual.view(torch.uint8) != expected.view(torch.uint8)).nonzero()
        assert len(different) == 0, (
            f"{len(different)} bytes differ, first at {different[:5].tolist()}"
        )

    return check


@pytest.fixture(params=[0x5A, 0xA5], ids=["5a", "a5"])
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty returns with a byte, so that a missed store shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        tensor.view(torch.uint8).fill_(request.param)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def tie_table() -> tuple[Tensor, Tensor]:
    """f32 numbers [128, 128] and their codes, written down from the e4m3 definition.

    All 127 magnitudes, the 126 midpoints between neighbours and the f32 numbers next to each
    midpoint, of both signs, padded with zeros. Each row begins with 448, so that every scale is
    exactly 1.0. A midpoint goes to the even code, what is beside it to the nearer code.
    """
    small = [code * 2.0**-9 for code in range(8)]
    value = torch.tensor(small + [(8 + c % 8) * 2.0 ** (c // 8 - 10) for c in range(8, 127)])
    lower = torch.arange(126)
    middle = (value[:-1] + value[1:]) / 2
    below, above = middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9))
    numbers = torch.cat([value, below, middle, above])
    codes = torch.cat([torch.arange(127), lower, lower + lower % 2, lower + 1])
    numbers, codes = torch.cat([numbers, -numbers]), torch.cat([codes, codes + 0x80])
    w = torch.zeros(128, 127)
    expected = torch.zeros(128, 127, dtype=torch.uint8)
    w.view(-1)[: len(numbers)] = numbers
    expected.view(-1)[: len(codes)] = codes.to(torch.uint8)
    first = torch.full((128, 1), 448.0)
    first_code = torch.full((128, 1), 0x7E, dtype=torch.uint8)
    return torch.cat([first, w], dim=1), torch.cat([first_code, expected], dim=1)


# largest magnitudes of a table of patterns: scale 1, an ordinary one, and both ends of each dtype
AMAXES = {
    torch.bfloat16: (448.0, 0.0712890625, 3.3895313892515355e38, 2.0**-120, 2.0**-126),
    torch.float16: (448.0, 0.07122802734375, 65504.0, 2.0**-14),
}


@pytest.fixture(
    params=[(dtype, amax) for dtype, amaxes in AMAXES.items() for amax in amaxes],
    ids=lambda param: f"{str(param[0]).removeprefix('torch.')}-{param[1]:.3g}",
)
def all_patterns(request: pytest.FixtureRequest) -> Tensor:
    """Every pattern of a 16-bit dtype up to a magnitude, which begins each row; 517 x 128."""
    dtype, amax = request.param
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    patterns = patterns.where(patterns.abs() <= amax, 0.0)
    w = torch.zeros(517, 127, dtype=dtype)
    w.view(-1)[: len(patterns)] = patterns
    return torch.cat([torch.full((517, 1), amax, dtype=dtype), w], dim=1)
