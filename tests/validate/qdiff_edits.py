"""Pairs of checkpoints that differ by one edit, for the tests of qdiff."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from checkpoints import Draft, draft

from qvalidate.diff.comparison import compare
from qvalidate.diff.result import DiffResult, WeightDiff

Edit: TypeAlias = Callable[[Draft], object]
Values: TypeAlias = npt.NDArray[Any]
DOWN = "model.layers.0.mlp.down_proj"
NORM = "model.norm.weight"


def between(
    tmp_path: Path, before: Edit, after: Edit, *, model: str = "llama", algo: str = "FP8_PB_WO"
) -> DiffResult:
    """Return what differs between one checkpoint after the one edit and after the other."""
    paths = []
    for name, edit in (("a", before), ("b", after)):
        made = draft(model, algo)
        edit(made)
        paths.append(made.write(tmp_path / name))
    return compare(*paths)


def after(
    tmp_path: Path, edit: Edit, *, model: str = "llama", algo: str = "FP8_PB_WO"
) -> DiffResult:
    """Return what differs between a checkpoint and the same one after `edit`."""
    return between(tmp_path, lambda made: None, edit, model=model, algo=algo)


def weights_of(result: DiffResult) -> WeightDiff:
    """Return the part of a result that is about weights."""
    assert result.weights is not None
    return result.weights


def edit_tensor(name: str, edit: Callable[[Values], Values], dtype: str) -> Edit:
    """Return the edit that gives the tensor `name` other values of numpy's `dtype`."""

    def apply(made: Draft) -> None:
        kind, shape, data = made.tensor(name)
        values = edit(np.frombuffer(data, dtype)).astype(dtype)
        made.put(name, (kind, shape, values.tobytes()))

    return apply
