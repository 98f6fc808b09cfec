"""Shared by the converter's tests: the fixture checkpoints and small ones made on the spot."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .interrupted import converted, stop_after

__all__ = ["converted", "stop_after"]

CHECKPOINTS = Path(__file__).parents[2] / "fixtures" / "checkpoints"


@pytest.fixture
def llama() -> Path:
    """Return the sharded, untied Llama checkpoint."""
    return CHECKPOINTS / "llama"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of checkpoints from tensors: one file, or shards with an index."""

    def build(
        tensors: Mapping[str, torch.Tensor] | None = None,
        *,
        shards: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        config: Mapping[str, object] | None = None,
        name: str = "in",
    ) -> Path:
        path = tmp_path / name
        path.mkdir()
        found = {"model_type": "llama", "num_hidden_layers": 99, "tie_word_embeddings": False}
        (path / "config.json").write_text(json.dumps({**found, **(config or {})}))
        if tensors is not None:
            save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        if shards is not None:
            weight_map = {}
            for file, members in shards.items():
                save_file(dict(members), path / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(members, file)
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    return build
