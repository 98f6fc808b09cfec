"""Errors by scale group: one wrong scale is seen, magnitude and what is not finite are no error."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from qkernels import kernels_for
from qschema.formats import formats
from qschema.safetensors import Stored
from qvalidate import pairs
from qvalidate.decode import global_spec
from qvalidate.group_errors import Deviation, deviation
from qvalidate.pairs import Pair, Smoothing, fit_columns, fit_rows, group_steps

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# the columns of every test weight but the ragged ones: what all groups divide
K = 256


def store(folder: Path, name: str, tensor: torch.Tensor, dtype: str) -> Stored:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    (folder / name).write_bytes(data)
    return Stored(folder / name, name, dtype, tuple(tensor.shape), 0, len(data))


def encoded(
    folder: Path, w_NK: torch.Tensor, algo: str, *, global_scale: torch.Tensor | None = None
) -> Pair:
    """Store a weight and its quantized tensors."""
    return stored(
        folder,
        w_NK,
        algo,
        kernels_for(formats()[algo].codec).quantize(w_NK, global_scale=global_scale),
    )


def stored(
    folder: Path, w_NK: torch.Tensor, algo: str, tensors: Mapping[str, torch.Tensor]
) -> Pair:
    """Store a weight and the given tensors in the shapes that the format declares."""
    declared = formats()[algo]
    shapes = declared.outputs(rows=w_NK.shape[0], columns=w_NK.shape[1])
    outputs = {
        suffix: store(folder, suffix, tensors[suffix].reshape(shape), dtype)
        for suffix, (dtype, shape) in shapes.items()
        if suffix in tensors
    }
    return Pair(store(folder, "source", w_NK, DTYPES[w_NK.dtype]), outputs, declared)


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("size", [1.4e-45, 1e-44, 1e-43, 1e-41, 1e-38, 1e-20, 1.0, 1e37])
def test_magnitude_is_no_error(tmp_path: Path, algo: str, size: float) -> None:
    w_NK = normal(130, K, 1).clamp(-3, 3) * size

    assert deviation(encoded(tmp_path, w_NK, algo)).num_beyond == 0


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("spread", [1.0, 6.0, 20.0])
def test_rows_of_any_size_beside_each_other_are_no_error(
    tmp_path: Path, algo: str, spread: float
) -> None:
    """Blocks far below the largest of a weight have the smallest scale that can be stored."""
    sizes_N1 = torch.exp2(-spread * torch.rand(130, 1, generator=torch.Generator().manual_seed(6)))
    w_NK = normal(130, K, 7) * sizes_N1 * normal(130, K, 8).abs()

    assert deviation(encoded(tmp_path, w_NK, algo)).num_beyond == 0


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_subnormal_halves_are_no_error(tmp_path: Path, algo: str, dtype: torch.dtype) -> None:
    bits = torch.randint(1, 6, (130, K), generator=torch.Generator().manual_seed(2))
    w_NK = bits.to(torch.int16).view(dtype)

    assert deviation(encoded(tmp_path, w_NK, algo)).num_beyond == 0


@pytest.mark.parametrize("algo", ["FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "W8A16"])
def test_ragged_columns_are_compared(tmp_path: Path, algo: str) -> None:
    pair = encoded(tmp_path, normal(130, 257, 9), algo)

    assert deviation(pair).num_beyond == 0


@pytest.mark.parametrize("algo", list(formats()))
def test_what_is_not_finite_is_left_out_and_counted(tmp_path: Path, algo: str) -> None:
    w_NK = normal(130, K, 3)
    w_NK[0, 0], w_NK[129, 255], w_NK[5, 7] = torch.nan, torch.inf, -torch.inf

    found = deviation(encoded(tmp_path, w_NK, algo))

    assert (found.num_beyond, found.num_nonfinite) == (0, 3)


@pytest.mark.parametrize("algo", list(formats()))
def test_a_group_of_zeros_is_decoded_as_zeros(tmp_path: Path, algo: str) -> None:
    w_NK = normal(256, 256, 4)
    w_NK[:128, :128] = 0
    w_NK[:2] = 0
    pair = encoded(tmp_path, w_NK, algo)
    assert deviation(pair).num_beyond == 0
    codes = pair.outputs["weight"]
    assert isinstance(codes, Stored)
    data = bytearray(codes.file.read_bytes())
    data[7] = 1
    codes.file.write_bytes(data)

    found = deviation(pair)

    assert (found.num_beyond, found.error) == (1, np.inf)
    assert found.rows[0] in (0, 1)


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
    """As with the one scale of FP8."""
    monkeypatch.setattr(pairs, "_SLICE_NBYTES", 1)
    pair = encoded(tmp_path, normal(256, 256, 5), "FP8")
    scale = pair.outputs["weight_scale"]
    assert isinstance(scale, Stored)
    scale.file.write_bytes(np.float32(2 * pair.global_scale).tobytes())

    found = deviation(Pair(pair.weight, pair.outputs, pair.declared))

    assert isinstance(found, Deviation)
    assert (found.num_groups, found.rows, found.columns) == (1, (0, 256), (0, 256))
    assert 0.9 < found.error < 1.1


@pytest.mark.parametrize("algo", ["FP8", "FP8_PB_WO"])
def test_quotients_rounded_to_bf16_first_are_no_error(tmp_path: Path, algo: str) -> None:
    """As ModelOpt's FP8 does it; the worst case is one weight alone, a tie away from its code."""
    ties = torch.tensor([1.0625 - 2.0**-10, 1.1875 - 2.0**-10, 448.0])
    w_NK = ties.repeat(128, 100)[:, :K].contiguous()
    scale = w_NK.abs().max() / 448
    codes = (w_NK / scale).bfloat16().to(torch.float8_e4m3fn)
    scales = torch.full((1, 1, 2, 1), float(scale)) if algo == "FP8_PB_WO" else scale
    pair = stored(tmp_path, w_NK, algo, {"weight": codes, "weight_scale": scales})

    assert deviation(pair).num_beyond == 0


def rescaled(folder: Path, algo: str, factor: float) -> Pair:
    """Store a weight in codes that are right for scales `factor` times those of the largest |w|."""
    declared = formats()[algo]
    codec, w_NK = kernels_for(declared.codec), normal(128, K, 10)
    tensors = codec.quantize_torch(w_NK)
    name = "weight_scale_2" if "weight_scale_2" in tensors else "weight_scale"
    wider = {**tensors, name: tensors[name] * factor}
    scales_NK = codec.scales(wider, *w_NK.shape)
    limits = {"INT4": (-8, 7), "INT8": (-128, 127)}
    if declared.element in limits:
        codes_NK = (w_NK / scales_NK).round().clamp(*limits[declared.element]).to(torch.int8)
        bytes_NK = codes_NK.view(torch.uint8) & 15
        packed = bytes_NK[0::2] | bytes_NK[1::2] << 4 if declared.element == "INT4" else codes_NK
    else:
        from qkernels import _e2m1

        packed = _e2m1.pack(_e2m1.encode(w_NK, scales_NK.expand_as(w_NK)))
    return stored(folder, w_NK, algo, {**wider, "weight": packed})


@pytest.mark.parametrize("algo", ["NVFP4", "W4A8_NVFP4_FP8", "W4A16_AWQ", "W8A16"])
@pytest.mark.parametrize("factor", [0.6, 0.8, 0.95, 1.0, 1.2, 1.5])
def test_a_search_may_clip_or_widen(tmp_path: Path, algo: str, factor: float) -> None:
    """awq_clip and MSE sweeps clip, four-over-six takes scales that are half larger."""
    assert deviation(rescaled(tmp_path, algo, factor)).num_beyond == 0


@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_AWQ", "W8A16"])
@pytest.mark.parametrize("factor", [0.3, 16.0])
def test_scales_far_from_their_weights_are_found(tmp_path: Path, algo: str, factor: float) -> None:
    """Though each code is the nearest one for its scale."""
    found = deviation(rescaled(tmp_path, algo, factor))

    assert found.num_beyond > found.num_groups / 2


@pytest.mark.parametrize("algo", ["NVFP4", "FP8"])
def test_a_scale_shared_with_a_larger_sibling_is_no_error(tmp_path: Path, algo: str) -> None:
    w_NK = normal(128, K, 11)
    codec = kernels_for(algo)
    scale = codec.quantize_torch(w_NK * 100)[codec.global_scale.suffix]  # type: ignore[union-attr]

    assert deviation(encoded(tmp_path, w_NK, algo, global_scale=scale)).num_beyond == 0


@pytest.mark.parametrize("algo", ["NVFP4_AWQ", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_smoothing_is_taken_out_of_the_source_first(tmp_path: Path, algo: str) -> None:
    w_NK, factors_K = normal(128, K, 12), torch.exp2(normal(1, K, 13))[0]
    pair = encoded(tmp_path, w_NK / factors_K, algo)
    source = store(tmp_path, "original", w_NK, "F32")

    smoothed = Pair(source, pair.outputs, pair.declared, Smoothing(columns=factors_K.numpy()))

    assert deviation(smoothed).num_beyond == 0
    assert deviation(Pair(source, pair.outputs, pair.declared)).num_beyond > 0


def test_factors_of_rows_are_fitted(tmp_path: Path) -> None:
    """Row 5 has none, row 6 is lost in a scale that is too coarse for it."""
    w_NK, factors_N = normal(128, K, 14), torch.exp2(normal(1, 128, 15))[0]
    w_NK[5], w_NK[6] = 0, w_NK[6] * 2.0**-22
    pair = encoded(tmp_path, w_NK * factors_N[:, None], "NVFP4")
    source = store(tmp_path, "original", w_NK, "F32")

    fit = fit_rows(Pair(source, pair.outputs, pair.declared))
    smoothing = Smoothing(rows=fit.factors)

    assert fit.factors[5] == fit.factors[6] == 1.0
    assert np.flatnonzero(~fit.is_sure).tolist() == [5, 6]
    np.testing.assert_allclose(fit.factors[fit.is_sure], factors_N.numpy()[fit.is_sure], rtol=0.05)
    assert deviation(Pair(source, pair.outputs, pair.declared, smoothing)).num_beyond == 0


def test_factors_of_columns_are_fitted(tmp_path: Path) -> None:
    w_NK, factors_K = normal(128, K, 14), torch.exp2(normal(1, K, 15))[0]
    pair = encoded(tmp_path, w_NK * factors_K, "FP8_PER_CHANNEL_PER_TOKEN")
    source = store(tmp_path, "original", w_NK, "F32")

    fit = fit_columns(Pair(source, pair.outputs, pair.declared))

    assert fit.is_sure.all()
    np.testing.assert_allclose(fit.factors, factors_K.numpy(), rtol=0.02)


def test_declaration_says_whether_a_scale_of_the_weight_is_part_of_the_codes() -> None:
    """W4A8_AWQ's weight_scale_2 is not: its codes are those of W4A16_AWQ."""
    for declared in formats().values():
        has_one = kernels_for(declared.codec).global_scale is not None
        assert (global_spec(declared) is not None) == has_one, declared.name
    declared = formats()["W4A8_AWQ"]
    specs = tuple(spec.model_copy(update={"scales_codes": True}) for spec in declared.tensors)
    found = global_spec(declared.model_copy(update={"tensors": specs}))

    assert found is not None
    assert found.suffix == "weight_scale_2"


@pytest.mark.parametrize("algo", list(formats()))
def test_half_a_scale_is_no_clipping(tmp_path: Path, algo: str) -> None:
    """What is below the largest code must be where it was, however large what is beyond it is."""
    w_NK = normal(128, K, 4)
    pair = encoded(tmp_path, w_NK, algo)
    halved(pair)

    found = deviation(pair)
    assert found.num_beyond == found.num_groups


def halved(pair: Pair) -> None:
    """Divide all that the codes are multiplied with by two, in place."""
    spec = global_spec(pair.declared) or pair.declared.specs("scale")[0]
    source = pair.outputs[spec.suffix]
    assert isinstance(source, Stored)
    data = source.file.read_bytes()
    if source.dtype == "F32":
        source.file.write_bytes((np.frombuffer(data, "<f4") / 2).astype("<f4").tobytes())
    else:
        source.file.write_bytes(bytes(exponent - 1 for exponent in data))


def test_one_wrong_row_is_not_lost_in_a_large_group(tmp_path: Path) -> None:
    """It is 0.04 of the norm of 1000 rows that share a scale; 0.06 of the norm would be allowed."""
    pair = encoded(tmp_path, normal(1000, K, 9), "FP8")
    codes = pair.outputs["weight"]
    assert isinstance(codes, Stored)
    data = codes.file.read_bytes()
    codes.file.write_bytes(data[: 2 * K] + data[3 * K : 4 * K] + data[3 * K :])

    found = deviation(pair)
    assert (found.rows, found.num_beyond, found.num_groups) == ((2, 3), 1, 1)
    assert 1 < found.error < 2
