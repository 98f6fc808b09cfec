"""From a directory to a Context. Headers and JSON only."""

from collections.abc import Mapping
from pathlib import Path

from qschema.checkpoint import Checkpoint, open_checkpoint
from qschema.formats import Format, UnknownFormatError, find
from qschema.safetensors import Stored
from qschema.strict import DocumentError, Json, load_json
from qvalidate.context import Context, Module
from qvalidate.documents import HF_QUANT_CONFIG, QuantConfig


def load(path: Path) -> Context:
    """Return the context of the quantized checkpoint in the directory `path`.

    Raises DocumentError with every reason why the checkpoint can't be read at all: missing or
    damaged shards, an index that names what is not there, JSON that is none.
    """
    checkpoint = open_checkpoint(path)
    in_config = _in_config(checkpoint)
    in_file = _in_file(checkpoint)
    obeyed = in_config or in_file
    return Context(
        checkpoint=checkpoint,
        in_config=in_config,
        in_file=in_file,
        declared=_declared(obeyed.algo if obeyed else None),
        modules=_modules(checkpoint.tensors),
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


def _declared(algo: str | None) -> Format | None:
    try:
        return find(algo) if algo else None
    except UnknownFormatError:
        return None


def _modules(tensors: Mapping[str, Stored]) -> Mapping[str, Module]:
    grouped: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        grouped.setdefault(module, {})[leaf] = stored
    return {name: Module(name=name, tensors=owned) for name, owned in sorted(grouped.items())}
