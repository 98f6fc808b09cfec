"""config.json and the side files against the source's: what makes right weights another model.

Nothing here reads a weight. What a conversion may change in config.json is left out, and files that
the source lacks, or that are no part of what an engine reads (README, license), are not looked at.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from qschema.checkpoint import Checkpoint
from qschema.strict import DocumentError, Finding, Json, load_json

# written anew by a conversion, or about the library that saved the model
_OWN_KEYS = frozenset(
    {
        "_name_or_path",
        "compression_config",
        "dtype",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
    }
)
_SIDE_FILES = (
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "merges.txt",
    "*preprocessor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.*",
    "tokenizer_config.json",
    "vocab.*",
)


def side_findings(checkpoint: Checkpoint, source: Checkpoint) -> Iterator[Finding]:
    """Yield, as warnings, what config.json and the side files say otherwise than the source's."""
    here, there = ({**found.config} for found in (checkpoint, source))
    yield from _keys(here, there, str(checkpoint.path / "config.json"), "$")
    for name in source.files:
        if not any(fnmatchcase(name, pattern) for pattern in _SIDE_FILES):
            continue
        file = checkpoint.path / name
        if name not in checkpoint.files:
            yield _finding(checkpoint.path, name, "side-file-missing", f"{source.path} has it")
        elif _content(file) != _content(source.path / name):
            yield _finding(file, "", "side-file-differs", f"is not the one in {source.path}")


def _keys(here: Json, there: Json, file: str, where: str) -> Iterator[Finding]:
    """Yield the keys with another value, those of objects one by one."""
    if isinstance(here, dict) and isinstance(there, dict):
        for key in sorted({*here, *there} - _OWN_KEYS):
            yield from _keys(here.get(key), there.get(key), file, f"{where}.{key}")
    elif here != there:
        message = f"is {here!r:.60}, in the source {there!r:.60}"
        yield _finding(Path(file), where, "config-differs", message)


def _content(file: Path) -> "Json | bytes":
    """Return what the file says: JSON without its layout, other files as they are."""
    if file.suffix == ".json":
        try:
            return load_json(file, constants=True)
        except DocumentError:
            pass
    return file.read_bytes()


def _finding(file: Path, where: str, rule: str, message: str) -> Finding:
    return Finding(file=str(file), where=where, rule=rule, message=message, severity="warning")
