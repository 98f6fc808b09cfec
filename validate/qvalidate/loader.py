"""From a directory to a Context. Headers and JSON only."""

import re
from collections.abc import Mapping
from pathlib import Path

from qschema.checkpoint import Checkpoint, open_checkpoint
from qschema.dtypes import HIGH_PRECISION
from qschema.safetensors import Stored
from qschema.strict import DocumentError, Json, load_json
from qvalidate.assignment import Assignment, assign
from qvalidate.context import Context, Module
from qvalidate.documents import HF_QUANT_CONFIG, QuantConfig
from qvalidate.targets import ONE_GPU, Deployment

# experts stacked in one tensor, and what ModelOpt puts beside it: `gate_up_proj_weight_scale`
_STACK = re.compile(r"(?:gate|up|gate_up|down)_proj")
_STACKED = re.compile(
    rf"(?P<stack>{_STACK.pattern})(?:_(?P<suffix>weight_scale(?:_2)?|input_scale|bias))?"
)


def load(path: Path, deployment: Deployment = ONE_GPU) -> Context:
    """Return the context of the quantized checkpoint in the directory `path`.


    Raises DocumentError with every reason why the checkpoint can't be read at all: missing or
    damaged shards, an index that names what is not there, JSON that is none.
    """
    checkpoint = open_checkpoint(path)
    in_config = _in_config(checkpoint)
    in_file = _in_file(checkpoint)
    assignment = assign(in_config or in_file, in_file)
    return Context(
        checkpoint=checkpoint,
        in_config=in_config,
        in_file=in_file,
        assignment=assignment,
        modules=_modules(checkpoint.tensors, assignment),
        deployment=deployment,
    )


def _in_config(checkpoint: Checkpoint) -> QuantConfig | None:
    file = str(checkpoint.path / "config.json")
    found: Json = checkpoint.config.get("quantization_config")
    root = "$.quantization_config"
    if found is None:
        text = checkpoint.config.get("text_config")
        found = text.get("quantization_config") if isinstance(text, dict) else None
        root = "$.text_config.quantization_config"
    if found is None:
        return None
    return QuantConfig(file=file, root=root, raw=_object(found, file=file, where=root))


def _in_file(checkpoint: Checkpoint) -> QuantConfig | None:
    path = checkpoint.path / HF_QUANT_CONFIG
    if HF_QUANT_CONFIG not in checkpoint.files:
        return None
    return QuantConfig(
        file=str(path), root="$", raw=_object(load_json(path), file=str(path), where="$")
    )


def _object(found: Json, *, file: str, where: str) -> Mapping[str, Json]:
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise DocumentError.of(file, where, "config-type", f"expected a JSON object, found {kind}")
    return found


def _modules(tensors: Mapping[str, Stored], assignment: Assignment) -> Mapping[str, Module]:
    grouped: dict[str, dict[str, Stored]] = {}
    stacks = _stacks(tensors)
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        parts = _STACKED.fullmatch(leaf)
        if parts is not None and f"{module}.{parts['stack']}" in stacks:
            module, leaf = f"{module}.{parts['stack']}", parts["suffix"] or "weight"
        grouped.setdefault(module, {})[leaf] = stored
    return {
        name: Module(name, owned, assignment.format_of(name), name in stacks)
        for name, owned in sorted(grouped.items())
    }


def _stacks(tensors: Mapping[str, Stored]) -> frozenset[str]:
    """Return the names of the quantized weights of all experts of a layer in one tensor."""
    return frozenset(
        name
        for name, stored in tensors.items()
        if len(stored.shape) == 3
        and name.rpartition(".")[0].endswith(".experts")
        and _STACK.fullmatch(name.rpartition(".")[2])
        and stored.dtype not in HIGH_PRECISION
    )
