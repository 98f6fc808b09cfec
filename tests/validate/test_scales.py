"""The statistics of scale tensors, by every dtype that can hold them and across pieces."""

import math
import struct
from array import array
from pathlib import Path

import pytest
import torch
from checkpoints import write_safetensors

from qschema.safetensors import Stored, read_header
from qvalidate import scales
from qvalidate.scales import E4M3, E8M0, scalar, scale_stats

VALUES = [0.5, -2.0, 0.0, 3.0, math.inf, math.nan]


def store(path: Path, dtype: str, data: bytes, count: int) -> Stored:
    file = path / "x.safetensors"
    write_safetensors(file, {"pad": ("U8", (3,), b"abc"), "x": (dtype, (count,), data)})
    return read_header(file).tensors["x"]


def encode(dtype: str, values: list[float]) -> bytes:
    if dtype == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{ {'F16': 'e', 'F32': 'f', 'F64': 'd'}[dtype] }", *values)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_every_kind_of_value_is_counted(dtype: str, tmp_path: Path) -> None:
    stats = scale_stats(store(tmp_path, dtype, encode(dtype, VALUES), len(VALUES)))

    assert stats is not None
    assert (stats.count, stats.num_nan, stats.num_inf) == (6, 1, 1)
    assert (stats.num_zero, stats.num_negative, stats.num_denormal) == (1, 1, 0)
    assert (stats.minimum, stats.maximum) == (-2.0, 3.0)


def test_pieces_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 scales in pieces of 64 bytes, with the odd ones in the first and in the last piece."""
    monkeypatch.setattr(scales, "_PIECE_NBYTES", 64)
    values = array("f", [1.0] * 1000)
    values[0], values[999], values[998] = math.nan, -1.0, 7.0
    stats = scale_stats(store(tmp_path, "F32", values.tobytes(), 1000))

    assert stats is not None
    assert (stats.count, stats.num_nan, stats.num_negative) == (1000, 1, 1)
    assert (stats.minimum, stats.maximum) == (-1.0, 7.0)


def test_denormal_begins_below_the_smallest_normal(tmp_path: Path) -> None:
    values = [2.0**-126, 2.0**-127, 2.0**-149]
    stats = scale_stats(store(tmp_path, "F32", encode("F32", values), 3))

    assert stats is not None
    assert (stats.num_denormal, stats.num_zero) == (2, 0)


def test_infinities_of_both_signs_are_not_one_nan(tmp_path: Path) -> None:
    """inf + -inf is NaN in a sum; it must not be counted as one."""
    values = [math.inf, -math.inf, 1.0]
    stats = scale_stats(store(tmp_path, "F32", encode("F32", values), 3))

    assert stats is not None
    assert (stats.num_nan, stats.num_inf, stats.minimum) == (0, 2, 1.0)


def test_every_e4m3_scale_is_what_torch_makes_of_it(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).double()
    stats = scale_stats(store(tmp_path, "F8_E4M3", bytes(codes), 256))

    assert torch.equal(torch.tensor(E4M3).double().nan_to_num(), expected.nan_to_num())
    assert stats is not None
    assert (stats.count, stats.num_nan, stats.num_inf) == (256, 2, 0)
    assert (stats.num_zero, stats.num_negative, stats.num_denormal) == (2, 126, 0)
    assert (stats.minimum, stats.maximum) == (-448.0, 448.0)


def test_every_e8m0_scale_is_a_power_of_two(tmp_path: Path) -> None:
    """2^-127 is no denormal where scales are exponents; 255 is NaN."""
    stats = scale_stats(store(tmp_path, "U8", bytes(range(256)), 256))

    assert E8M0[127] == 1.0
    assert stats is not None
    assert (stats.count, stats.num_nan, stats.num_zero) == (256, 1, 0)
    assert (stats.num_negative, stats.num_denormal) == (0, 0)
    assert (stats.minimum, stats.maximum) == (2.0**-127, 2.0**127)


def test_pieces_of_bytes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "_PIECE_NBYTES", 7)
    stats = scale_stats(store(tmp_path, "F8_E4M3", bytes([0, 0x38, 0x7F, 0xB8, 0x40] * 20), 100))

    assert stats is not None
    assert (stats.count, stats.num_nan, stats.num_zero, stats.num_negative) == (100, 20, 20, 20)
    assert (stats.minimum, stats.maximum) == (-1.0, 2.0)


def test_codes_are_not_read(tmp_path: Path) -> None:
    assert scale_stats(store(tmp_path, "I8", b"ab", 2)) is None
    assert scale_stats(store(tmp_path, "U8", b"ab", 2), role="input") is None


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_scalar_is_the_one_number(dtype: str, tmp_path: Path) -> None:
    assert scalar(store(tmp_path, dtype, encode(dtype, [0.5]), 1)) == 0.5
    (tmp_path / "two").mkdir()
    assert scalar(store(tmp_path / "two", dtype, encode(dtype, [0.5, 1.0]), 2)) is None


def test_empty_tensor_has_no_extremes(tmp_path: Path) -> None:
    stats = scale_stats(store(tmp_path, "F32", b"", 0))

    assert stats is not None
    assert (stats.count, stats.minimum, stats.maximum) == (0, math.inf, -math.inf)
