"""A checkpoint on disk, from its headers and JSON alone: no weight is read here.

Problems that make the set of tensors ambiguous or incomplete are errors; all of them are reported
at once. What is merely odd (files that no index names) is recorded for the caller to judge.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qschema.safetensors import ShardHeader, Stored, read_header
from qschema.strict import DocumentError, Finding, Json, load_json

SINGLE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
# what is wrong with weights that are here in no other form
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """What the headers and the JSON of a checkpoint say. File names are relative to `path`."""

    path: Path
    config: Mapping[str, Json]
    # in order of their file names
    shards: tuple[ShardHeader, ...]
    tensors: Mapping[str, Stored]
    # the index file's name and metadata; None and {} for a single file
    index: str | None
    index_metadata: Mapping[str, Json]
    # in an indexed shard, but not in the index
    unindexed_tensors: tuple[str, ...]
    # safetensors files that are no shard of this checkpoint
    stray_shards: tuple[str, ...]
    # every other file in order of its name, with its size
    files: Mapping[str, int]
    # what was not looked into: hidden files and folders, and links to folders
    skipped: tuple[str, ...]
    # what its side files say twice and differently, in words
    conflicts: tuple[str, ...]

    def digest(self) -> str:
        """Return a sha256 over the shards' names, sizes and headers."""
        state = hashlib.sha256()
        for shard in self.shards:
            state.update(f"{shard.file.name}\n{shard.file_nbytes}\n".encode())
            state.update(shard.raw)
        return state.hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in the directory `path`.

    Raises DocumentError with every problem found: no such directory, no weights, pickled weights
    only, no or unreadable config.json, damaged headers, an index that names missing shards or
    tensors, a tensor in two shards, two rival sets of weights.
    """
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise DocumentError.of(path, "", "checkpoint-missing", f"{problem}; expected a checkpoint")
    findings: list[Finding] = []
    skipped: list[str] = []
    files = _files(path, skipped, findings)
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise DocumentError([_no_weights(path, files)])
    config = _config(path, findings)
    index, index_metadata, weight_map = _index(path, files, weights, findings)
    chosen = sorted(set(weight_map.values())) if index else _single(path, weights, findings)
    shards = []
    for name in chosen:
        if name not in weights:
            count = sum(1 for shard in weight_map.values() if shard == name)
            findings.append(
                _found(
                    path / (index or ""),
                    "$.weight_map",
                    "index-missing-shard",
                    f"names {name} for {count} tensors, but there is no such file",
                )
            )
            continue
        try:
            shards.append(read_header(path / name))
        except DocumentError as error:
            findings.extend(error.findings)
    tensors = _tensors(shards, findings)
    _agree(path / (index or ""), weight_map, tensors, shards, findings)
    if findings:
        raise DocumentError(findings)
    return Checkpoint(
        path=path,
        config=config,
        shards=tuple(shards),
        tensors=tensors,
        index=index,
        index_metadata=index_metadata,
        unindexed_tensors=tuple(name for name in tensors if index and name not in weight_map),
        stray_shards=tuple(name for name in weights if name not in chosen),
        files={name: size for name, size in files.items() if name not in weights and name != index},
        skipped=tuple(sorted(skipped)),
        conflicts=_conflicts(path, files),
    )


def _files(path: Path, skipped: list[str], findings: list[Finding]) -> dict[str, int]:
    """Return relative name -> size of every file below `path`, in order of their names."""
    found: dict[str, int] = {}

    def unreadable(error: OSError) -> None:
        findings.append(
            _found(Path(error.filename), "", "file-unreadable", error.strerror or str(error))
        )

    for folder, folders, names in os.walk(path, onerror=unreadable):
        for name in list(folders):
            if name.startswith(".") or os.path.islink(Path(folder) / name):
                folders.remove(name)
                skipped.append(f"{(Path(folder) / name).relative_to(path)}/")
        for name in names:
            file = Path(folder) / name
            relative = str(file.relative_to(path))
            if name.startswith("."):
                skipped.append(relative)
                continue
            try:
                status = file.stat()
            except OSError as error:
                unreadable(error)
                continue
            if not stat.S_ISREG(status.st_mode):
                findings.append(_found(file, "", "file-unreadable", "is not a regular file"))
            elif not _is_utf8(relative):
                shown = os.fsencode(relative).decode("utf-8", "backslashreplace")
                message = f"the name {shown} is not UTF-8; rename it"
                findings.append(_found(path, "", "file-name", message))
            else:
                found[relative] = status.st_size
    return dict(sorted(found.items()))


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _conflicts(path: Path, files: Mapping[str, int]) -> tuple[str, ...]:
    """Return the chat templates that are there more than once and differ."""
    templates: dict[str, Json] = {}
    if "chat_template.jinja" in files:
        text = (path / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
        templates["chat_template.jinja"] = text
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            document = load_json(path / name, constants=True) if name in files else None
        except DocumentError:
            # copied as it is; not ours to judge
            continue
        if isinstance(document, dict) and document.get("chat_template") is not None:
            templates[name] = document["chat_template"]
    first = next(iter(templates.values()), None)
    if all(template == first for template in templates.values()):
        return ()
    return (
        f"different chat templates in {', '.join(templates)}: engines differ in which they use",
    )


def _no_weights(path: Path, files: Mapping[str, int]) -> Finding:
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        message = (
            f"holds pickled weights only ({_some(pickles)}); loading them runs code. "
            "Save the model as safetensors first: save_pretrained(..., safe_serialization=True)"
        )
        return _found(path, "", "checkpoint-pickle", message)
    what = f"found {_some(list(files))}" if files else "the directory is empty"
    return _found(path, "", "checkpoint-empty", f"no *.safetensors file; {what}")


def _config(path: Path, findings: list[Finding]) -> Mapping[str, Json]:
    file = path / "config.json"
    if not file.is_file():
        findings.append(_found(file, "", "config-missing", "a checkpoint needs its config.json"))
        return {}
    try:
        # Python writes NaN and Infinity into some of them
        document = load_json(file, constants=True)
    except DocumentError as error:
        findings.extend(error.findings)
        return {}
    if not isinstance(document, dict):
        findings.append(_found(file, "$", "config-type", "expected a JSON object"))
        return {}
    return document


def _index(
    path: Path, files: Mapping[str, int], weights: list[str], findings: list[Finding]
) -> tuple[str | None, Mapping[str, Json], dict[str, str]]:
    """Return the index file's name, metadata and weight_map; (None, {}, {}) for a single file."""
    found = [name for name in files if name.endswith(INDEX_SUFFIX) and "/" not in name]
    if not found:
        return None, {}, {}
    if len(found) > 1:
        findings.append(
            _found(path, "", "index-ambiguous", f"{len(found)} indexes: {_some(found)}; keep one")
        )
    name = found[0]
    try:
        document = load_json(path / name)
    except DocumentError as error:
        findings.extend(error.findings)
        return name, {}, {}
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(weight_map, dict) or not weight_map:
        findings.append(
            _found(path / name, "$.weight_map", "index-weight-map", "expected tensor -> file name")
        )
        return name, {}, {}
    shards: dict[str, str] = {}
    right: set[str] = set()
    for tensor, shard in weight_map.items():
        if isinstance(shard, str) and shard not in right and Path(shard).name == shard:
            right.add(shard)
        if not isinstance(shard, str) or shard not in right:
            findings.append(
                _found(
                    path / name,
                    f"$.weight_map[{tensor!r}]",
                    "index-shard-name",
                    f"expected the name of a file beside the index, found {shard!r}",
                )
            )
            continue
        shards[tensor] = shard
    if SINGLE in weights and SINGLE not in shards.values():
        findings.append(
            _found(
                path,
                "",
                "weights-ambiguous",
                f"{SINGLE} and {name} are two sets of weights; engines differ in which they read, "
                "remove one",
            )
        )
    metadata = document.get("metadata")
    return name, metadata if isinstance(metadata, dict) else {}, shards


def _single(path: Path, weights: list[str], findings: list[Finding]) -> list[str]:
    top = [name for name in weights if "/" not in name]
    if SINGLE in top:
        return [SINGLE]
    if len(top) == 1:
        return top
    findings.append(
        _found(
            path,
            "",
            "index-missing",
            f"{len(top)} safetensors files ({_some(top)}) and no *{INDEX_SUFFIX} that says which "
            "of them are the model",
        )
    )
    return []


def _tensors(shards: list[ShardHeader], findings: list[Finding]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for shard in shards:
        for name, stored in shard.tensors.items():
            if name in tensors:
                findings.append(
                    _found(
                        shard.file,
                        name,
                        "tensor-duplicate",
                        f"is also in {tensors[name].file.name}",
                    )
                )
            tensors[name] = stored
    return tensors


def _agree(
    index: Path,
    weight_map: Mapping[str, str],
    tensors: Mapping[str, Stored],
    shards: list[ShardHeader],
    findings: list[Finding],
) -> None:
    read = {shard.file.name for shard in shards}
    for name, shard in weight_map.items():
        if shard not in read:
            # reported with its shard
            continue
        if name not in tensors:
            findings.append(
                _found(index, name, "index-missing-tensor", f"should be in {shard}, is in no shard")
            )
        elif tensors[name].file.name != shard:
            findings.append(
                _found(
                    index,
                    name,
                    "index-wrong-shard",
                    f"should be in {shard}, is in {tensors[name].file.name}",
                )
            )


def _found(file: Path, where: str, rule: str, message: str) -> Finding:
    return Finding(file=str(file), where=where, rule=rule, message=message)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 5 else shown
