"""qdiff on numbers: what the weights of both sides stand for, whatever they are stored as."""

import math
import shutil
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import PB_WO
from checkpoints import FIXTURES, MIXED, Draft, draft, f32
from encoded import converted, weight
from qdiff_edits import DOWN, NORM, Edit, Values, after, between, edit_tensor, weights_of

from qkernels import kernels_for
from qschema.checkpoint import open_checkpoint
from qschema.formats import find, formats
from qvalidate.diff import matrices, tensors
from qvalidate.diff.comparison import compare
from qvalidate.diff.result import WeightDiff, WeightError

LLAMA = FIXTURES / "llama"
# by the codes; the random weights of the fixtures lose up to 0.0270, 0.1224, 0.0082 and 0.1353
MOST = {"E4M3": 0.03, "E2M1": 0.13, "INT8": 0.01, "INT4": 0.15}


# model, format -> a checkpoint that is only read
Made = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that converts a fixture into a format, once."""
    return cache(
        lambda model, algo: converted(model, algo, tmp_path_factory.mktemp("made") / "out")
    )


def apart(a: Path, b: Path) -> WeightDiff:
    return weights_of(compare(a, b))


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_converted_weights_are_within_their_format(made: Made, model: str, algo: str) -> None:
    path = made(model, algo)
    result = compare(FIXTURES / model, path)
    found = result.weights
    assert found is not None

    assert len(found.differing) == result.b.num_quantized
    assert {(error.a, error.b) for error in found.differing} == {("BF16", algo)}
    errors = [error.relative_error for error in found.differing]
    assert all(error is not None and 0 < error < MOST[find(algo).element] for error in errors)


def test_quantized_against_its_source_goes_both_ways(made: Made) -> None:
    path = made("llama", "NVFP4")
    forth, back = apart(LLAMA, path), apart(path, LLAMA)

    assert {error.name for error in forth.differing} == {error.name for error in back.differing}
    assert forth.num_equal == back.num_equal == 7


def test_two_formats_of_one_source_are_as_far_as_both_from_it(made: Made) -> None:
    one, other = made("llama", PB_WO), made("llama", "NVFP4")
    totals = [found.total for found in (apart(one, other), apart(LLAMA, one), apart(LLAMA, other))]
    distances = [total.relative_error or 0.0 for total in totals if total is not None]

    assert distances[0] == pytest.approx(math.hypot(distances[1], distances[2]), rel=0.02)


@pytest.mark.parametrize("algo", ["NVFP4", "FP8", "W4A16_AWQ", "MXFP8"])
def test_error_is_that_of_the_kernels(made: Made, algo: str) -> None:
    path = made("llama", algo)
    codec, source = (
        kernels_for(find(algo).codec),
        weight(open_checkpoint(LLAMA).tensors[f"{DOWN}.weight"]),
    )
    decoded = codec.dequantize_torch(codec.quantize(source), dtype=torch.float32).double()
    error = (source.double() - decoded).norm() / source.double().norm()
    found = by_name(apart(LLAMA, path))[DOWN]

    assert found.relative_error == pytest.approx(float(error), rel=1e-6)
    assert found.max_abs == pytest.approx(float((source.double() - decoded).abs().max()), rel=1e-6)


def by_name(found: WeightDiff) -> dict[str, WeightError]:
    return {error.name: error for error in found.differing}


def test_doubled_scale_is_one_module_off_by_all_of_it(tmp_path: Path) -> None:
    edit = edit_tensor(f"{DOWN}.weight_scale", lambda scale: scale * 2, "<f4")
    result = after(tmp_path, edit)
    (error,) = weights_of(result).differing

    assert (error.name, error.relative_error, error.what) == (DOWN, 1.0, "weight")
    assert (error.a, error.b) == ("FP8_PB_WO", "FP8_PB_WO")
    assert result.areas == ("weights",)


def test_changed_norm_is_a_weight_like_any_other(tmp_path: Path) -> None:
    result = after(tmp_path, edit_tensor(NORM, lambda bits: bits + 1, "<u2"))
    (error,) = weights_of(result).differing

    assert (error.name, error.what, error.a) == ("model.norm", "weight", "BF16")
    assert result.areas == ("weights",)


def test_same_numbers_in_other_bytes_are_the_same(tmp_path: Path) -> None:
    """Block scales of E4M3 a power of two lower, the scale of the whole weight twice as large."""

    def move(made: Draft) -> None:
        edit_tensor(f"{DOWN}.weight_scale", lambda scale: scale - 8, "u1")(made)
        edit_tensor(f"{DOWN}.weight_scale_2", lambda scale: scale * 2, "<f4")(made)

    result = after(tmp_path, move, algo="NVFP4")

    assert result.areas == ()
    assert result.tensors.changed == [f"{DOWN}.weight_scale", f"{DOWN}.weight_scale_2"]
    assert weights_of(result).differing == []


def test_wider_dtype_of_the_same_numbers_is_no_other_weight(tmp_path: Path) -> None:
    def widen(made: Draft) -> None:
        _, shape, data = made.tensor(NORM)
        wide = (np.frombuffer(data, "<u2").astype("<u4") << 16).tobytes()
        made.put(NORM, ("F32", shape, wide))

    assert weights_of(after(tmp_path, widen)).differing == []


def smoothed(made: Draft, factor: float) -> None:
    """Give down_proj a pre_quant_scale, and weights that are as much smaller."""
    _, shape, _ = made.tensor(f"{DOWN}.weight")
    value = np.array([factor], "<f4").view("<u4") >> 16
    scale = np.full(2 * shape[1], value, "<u2").tobytes()
    made.put(f"{DOWN}.pre_quant_scale", ("BF16", (2 * shape[1],), scale), beside=f"{DOWN}.weight")
    edit_tensor(f"{DOWN}.weight_scale_2", lambda whole: whole / factor, "<f4")(made)


def test_smoothing_is_multiplied_back(tmp_path: Path) -> None:
    assert (
        weights_of(after(tmp_path, lambda made: smoothed(made, 2.0), algo="NVFP4_AWQ")).differing
        == []
    )


def test_smoothing_without_its_weight_is_a_difference(tmp_path: Path) -> None:
    def half_done(made: Draft) -> None:
        smoothed(made, 2.0)
        edit_tensor(f"{DOWN}.weight_scale_2", lambda whole: whole * 2, "<f4")(made)

    (error,) = weights_of(after(tmp_path, half_done, algo="NVFP4_AWQ")).differing

    assert (error.name, error.relative_error) == (DOWN, 1.0)


def test_smoothing_in_a_norm_is_said_in_a_note(tmp_path: Path) -> None:
    edit = edit_tensor(NORM, lambda bits: bits + 1, "<u2")
    result = after(tmp_path, edit, algo="NVFP4_AWQ")

    assert [note for note in result.notes if "smoothing" in note]


def test_nan_on_one_side_is_counted(tmp_path: Path) -> None:
    def spoil(scale: Values) -> Values:
        spoilt = scale.copy()
        spoilt[0] = np.nan
        return spoilt

    (error,) = weights_of(
        after(tmp_path, edit_tensor(f"{DOWN}.weight_scale", spoil, "<f4"))
    ).differing

    assert error.num_nonfinite == 128 * 128
    assert error.relative_error == 0.0
    assert not error.is_within(1.0)


def test_nan_on_both_sides_is_the_same(tmp_path: Path) -> None:
    def extra(first: float) -> Edit:
        tensor = ("F32", (3,), f32(first, math.nan, math.inf))
        return lambda made: made.put("model.extra", tensor, beside=NORM)

    (error,) = weights_of(between(tmp_path, extra(1.0), extra(2.0))).differing

    assert (error.name, error.what) == ("model.extra", "tensor")
    assert (error.num_nonfinite, error.relative_error, error.max_abs) == (0, 1.0, 1.0)


def test_weight_of_zeros_has_no_relative_error(tmp_path: Path) -> None:
    zeros = edit_tensor(f"{DOWN}.weight", np.zeros_like, "u1")
    (error,) = weights_of(between(tmp_path, zeros, lambda made: None)).differing

    assert error.relative_error is None
    assert not error.is_within(1e9)


def test_other_numbers_beside_weights_are_told_apart(tmp_path: Path) -> None:
    edit = edit_tensor(f"{DOWN}.input_scale", lambda scale: scale * 1.5, "<f4")
    found = weights_of(after(tmp_path, edit, algo="FP8"))
    (error,) = found.differing

    assert (error.name, error.what) == (f"{DOWN}.input_scale", "tensor")
    assert error.relative_error == pytest.approx(0.5)
    assert (found.total, found.kinds) == (None, [])


def test_sums_are_over_all_elements(made: Made) -> None:
    found = apart(LLAMA, made("llama", "NVFP4"))
    source = open_checkpoint(LLAMA).tensors
    norms = {
        error.name: float(weight(source[f"{error.name}.weight"]).double().norm())
        for error in found.differing
    }
    whole = math.hypot(*norms.values())
    distance = math.hypot(
        *(norms[error.name] * (error.relative_error or 0) for error in found.differing)
    )
    assert found.total is not None

    assert found.total.relative_error == pytest.approx(distance / whole)
    assert {layer.name: layer.count for layer in found.layers} == {
        "model.layers.0": 7,
        "model.layers.1": 7,
    }
    assert {kind.name: kind.count for kind in found.kinds}["mlp.down_proj"] == 2
    assert found.total.worst == found.differing[0].name
    assert found.total.max_abs == max(error.max_abs for error in found.differing)


def test_a_mixed_checkpoint_has_each_module_in_its_format(made: Made) -> None:
    found = apart(LLAMA, made("llama", MIXED))
    labels = {error.name.split(".")[3]: error.b for error in found.differing}

    assert labels == {"self_attn": "FP8", "mlp": "NVFP4"}


@pytest.mark.parametrize("algo", [PB_WO, "NVFP4", "W4A16_AWQ"])
def test_slices_change_nothing(made: Made, algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = "llama_odd" if algo == PB_WO else "llama"
    source, path = FIXTURES / model, made(model, algo)
    whole = by_name(apart(source, path))
    monkeypatch.setattr(matrices, "_SLICE_ELEMENTS", 1)
    monkeypatch.setattr(matrices, "_CHUNK_ELEMENTS", 1000)
    cut = by_name(apart(source, path))

    assert whole.keys() == cut.keys()
    for name, error in whole.items():
        assert cut[name].max_abs == error.max_abs
        assert cut[name].relative_error == pytest.approx(error.relative_error, rel=1e-12)


def test_torch_decodes_what_native_kernels_decode(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made("llama", "NVFP4")
    native = apart(LLAMA, path)
    monkeypatch.setenv("QKERNELS_NATIVE", "0")

    assert apart(LLAMA, path) == native


def test_memory_does_not_grow_with_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 MiB on each side, in slices of 64 KiB and of 64 Ki elements."""
    monkeypatch.setattr(matrices, "_SLICE_ELEMENTS", 1 << 16)
    monkeypatch.setattr(tensors, "_SLICE_NBYTES", 1 << 16)
    paths = []
    for index in (1, 2):
        made = draft("llama", PB_WO)
        data = np.full(2 << 20, index, "<f4").tobytes()
        made.put("model.extra.weight", ("F32", (2048, 1024), data), beside=NORM)
        paths.append(made.write(tmp_path / str(index)))
    tracemalloc.start()
    try:
        (error,) = apart(paths[0], paths[1]).differing
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert error.relative_error == 1.0
    assert peak < 4 << 20


def test_weight_without_its_scale_is_not_compared(tmp_path: Path) -> None:
    found = weights_of(after(tmp_path, lambda made: made.pop(f"{DOWN}.weight_scale")))

    assert [(item.name, item.reason) for item in found.not_compared] == [
        (DOWN, "it has no weight_scale, in B")
    ]


def test_undeclared_format_on_one_side_is_not_compared(tmp_path: Path) -> None:
    found = weights_of(after(tmp_path, name_another_format))

    assert len(found.not_compared) == 14
    assert found.not_compared[0].reason == "its format is not declared, in B"


def test_undeclared_format_on_both_sides_is_compared_by_bytes(tmp_path: Path) -> None:
    def change(made: Draft) -> None:
        name_another_format(made)
        edit_tensor(f"{DOWN}.weight", lambda codes: codes ^ 1, "u1")(made)

    result = between(tmp_path, name_another_format, change)

    assert [item.name for item in weights_of(result).not_compared] == [DOWN]
    assert result.tensors.undecoded == [f"{DOWN}.weight"]
    assert result.areas == ("tensors",)


def name_another_format(made: Draft) -> None:
    for config in made.each_config():
        config["quant_algo"] = "FP6_NEW"


def test_scale_of_another_rank_holds_the_same_numbers(tmp_path: Path) -> None:
    def flatten(made: Draft) -> None:
        _, shape, data = made.tensor(f"{DOWN}.weight_scale")
        flat = tuple(size for size in shape if size != 1)
        made.put(f"{DOWN}.weight_scale", ("F32", flat, data))

    found = weights_of(after(tmp_path, flatten))

    assert (found.differing, found.not_compared) == ([], [])


def test_other_sizes_are_not_compared(tmp_path: Path) -> None:
    def grow(made: Draft) -> None:
        made.put(f"{DOWN}.weight", ("BF16", (2, 2), bytes(8)))
        made.pop(f"{DOWN}.weight_scale")

    found = weights_of(after(tmp_path, grow))

    assert [item.reason for item in found.not_compared] == ["is [256, 384] in A, [2, 2] in B"]


def test_equal_weights_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> Values:
        raise AssertionError("decoded")

    monkeypatch.setattr(matrices, "dequantize", refuse)

    assert after(tmp_path, lambda made: made.quantize_cache("FP8")).tensors.changed == []


def test_hard_links_are_the_same_without_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "a")
    linked = Path(shutil.copytree(path, tmp_path / "b", copy_function=_link))

    def refuse(*args: object) -> bytearray:
        raise AssertionError("read")

    monkeypatch.setattr(tensors, "read", refuse)

    assert compare(path, linked).areas == ()


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
