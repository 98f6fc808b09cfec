"""The numbers that vectors of a plan stand for: their rounding, and what is held of them."""

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from qconvert.errors import ConvertError
from qconvert.smoothing import Vectors
from qschema.plan import Vector

from .conversion import measured
from .test_smoothing import F32, bf16

# every kind of rounding to bf16: exact, ties to even both ways, up, down, a carry, the extremes
EDGES = np.array(
    [
        *(0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF),
        *(0x3FFFFFFF, 0x3F7FFFFF, 0x3EAAAAAB, 0x00800000, 0x7E800000),
    ],
    np.uint32,
).view(np.float32)


def resolved(folder: Path, **modules: F32) -> Vectors:
    vectors = {f"{name}.pre_quant_scale": torch.tensor(p) for name, p in modules.items()}
    return Vectors(measured(folder, vectors=vectors))


def test_vectors_are_those_of_numpy_and_ml_dtypes(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    a = np.concatenate([EDGES, np.exp(generator.normal(0, 3, 500)).astype(np.float32)])
    b, c = (np.exp(generator.normal(0, 1, len(a))).astype(np.float32) for _ in range(2))
    found = resolved(tmp_path, a=a, b=b, c=c)

    inverse = found.numbers(Vector(kind="inverse", of=["a"]))
    rounded = Vector(kind="rounded", of=["a"])
    two, three = Vector(kind="mean", of=["a", "b"]), Vector(kind="mean", of=["a", "b", "c"])

    assert np.array_equal(inverse, np.float32(1) / a)
    assert np.array_equal(found.numbers(rounded), bf16(a))
    assert np.array_equal(found.numbers(two), bf16((bf16(a) + bf16(b)) / np.float32(2)))
    total = bf16(a) + bf16(b) + bf16(c)
    assert np.array_equal(found.numbers(three), bf16(total / np.float32(3)))
    assert found.bf16(rounded) == a.astype(ml_dtypes.bfloat16).tobytes()
    for vector in (rounded, two, three):
        assert found.numbers(vector).dtype == np.float32
        assert np.isfinite(found.numbers(vector)).all()


def test_vectors_of_other_layers_do_not_stay_in_memory(tmp_path: Path) -> None:
    """256 of them have 16 MiB."""
    found = resolved(tmp_path, **{str(place): np.ones(1 << 14, np.float32) for place in range(256)})
    tracemalloc.start()

    for place in range(256):
        found.numbers(Vector(kind="inverse", of=[str(place)]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 6 << 20


def test_vectors_that_were_cut_short_are_refused(tmp_path: Path) -> None:
    found = resolved(tmp_path, a=EDGES)
    path = tmp_path / "vectors.safetensors"
    path.write_bytes(path.read_bytes()[:-4])

    with pytest.raises(
        ConvertError, match=r"a\.pre_quant_scale: the file changed after its header"
    ):
        found.numbers(Vector(kind="inverse", of=["a"]))
