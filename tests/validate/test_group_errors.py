"""Errors by scale group: one wrong scale is seen, magnitude and what is not finite are no error."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qkernels import kernels_for
from qschema.formats import formats
from qschema.safetensors import Stored
from qvalidate import group_errors
from qvalidate.group_errors import Deviation, deviation, group_steps


def encoded(folder: Path, w_NK: torch.Tensor, algo: str) -> tuple[Stored, dict[str, Stored]]:
    """Store a weight and its quantized tensors."""

    def store(name: str, tensor: torch.Tensor, dtype: str) -> Stored:
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        (folder / name).write_bytes(data)
        return Stored(folder / name, name, dtype, tuple(tensor.shape), 0, len(data))

    declared = formats()[algo]
    outputs = kernels_for(algo).quantize_torch(w_NK)
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    stored = {
        spec.suffix: store(f"out.{spec.suffix}", outputs[spec.suffix], spec.dtype)
        for spec in declared.tensors
    }
    return store("source", w_NK, dtypes[w_NK.dtype]), stored


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("size", [1.4e-45, 1e-44, 1e-43, 1e-41, 1e-38, 1e-20, 1.0, 1e38])
def test_magnitude_is_no_error(tmp_path: Path, algo: str, size: float) -> None:
    w_NK = torch.randn(130, 257, generator=torch.Generator().manual_seed(1)).clamp(-3, 3) * size

    assert deviation(*encoded(tmp_path, w_NK, algo), formats()[algo]).num_beyond == 0


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_subnormal_halves_are_no_error(tmp_path: Path, algo: str, dtype: torch.dtype) -> None:
    bits = torch.randint(1, 6, (130, 257), generator=torch.Generator().manual_seed(2))
    w_NK = bits.to(torch.int16).view(dtype)

    assert deviation(*encoded(tmp_path, w_NK, algo), formats()[algo]).num_beyond == 0


@pytest.mark.parametrize("algo", list(formats()))
def test_what_is_not_finite_is_left_out_and_counted(tmp_path: Path, algo: str) -> None:
    w_NK = torch.randn(130, 257, generator=torch.Generator().manual_seed(3))
    w_NK[0, 0], w_NK[129, 256], w_NK[5, 7] = torch.nan, torch.inf, -torch.inf

    found = deviation(*encoded(tmp_path, w_NK, algo), formats()[algo])

    assert (found.num_beyond, found.num_nonfinite) == (0, 3)


@pytest.mark.parametrize("algo", list(formats()))
def test_a_group_of_zeros_is_decoded_as_zeros(tmp_path: Path, algo: str) -> None:
    w_NK = torch.randn(256, 256, generator=torch.Generator().manual_seed(4))
    w_NK[:128, :128] = 0
    w_NK[0] = 0
    source, outputs = encoded(tmp_path, w_NK, algo)
    assert deviation(source, outputs, formats()[algo]).num_beyond == 0
    data = bytearray(outputs["weight"].file.read_bytes())
    data[7] = 1
    outputs["weight"].file.write_bytes(data)

    found = deviation(source, outputs, formats()[algo])

    assert (found.num_beyond, found.error, found.rows[0]) == (1, np.inf, 0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("N",), (1, 300)),
        (("N", "1"), (1, 300)),
        (("ceil(N/128)", "1", "ceil(K/128)", "1"), (128, 128)),
        (("N", "K/16"), (1, 16)),
        (("1",), (200, 300)),
        ((), (200, 300)),
    ],
)
def test_groups_follow_the_declared_shape(
    shape: tuple[str, ...], expected: tuple[int, int]
) -> None:
    codes, scale = formats()["FP8_PB_WO"].tensors
    tensors = (codes, scale.model_copy(update={"shape": shape}))
    declared = formats()["FP8_PB_WO"].model_copy(update={"tensors": tensors})

    assert group_steps(declared, rows=200, columns=300) == expected


def test_a_group_that_goes_through_all_slices_is_judged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with one scale per tensor: here only the cutting into groups is that."""
    w_NK = torch.randn(256, 256, generator=torch.Generator().manual_seed(5))
    source, outputs = encoded(tmp_path, w_NK, "FP8_PB_WO")
    monkeypatch.setattr(group_errors, "_SLICE_NBYTES", 1)
    monkeypatch.setattr(group_errors, "group_steps", lambda *args, **sizes: (256, 256))
    strict = formats()["FP8_PB_WO"].model_copy(update={"error_bound": 0.001})

    found = deviation(source, outputs, strict)

    assert isinstance(found, Deviation)
    assert (found.num_groups, found.rows, found.columns) == (1, (0, 256), (0, 256))
    assert 0.01 < found.error < 0.0626
