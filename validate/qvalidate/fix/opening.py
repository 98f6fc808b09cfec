"""Opens a checkpoint that is to be repaired, also one that the loader refuses for its index.

There is one loader, and it takes no checkpoint whose shards are not told. Such a one is shown to it
as a view: a temporary folder of symbolic links with an index made from the headers. A second file
that says how the model is quantized, and is not JSON, is left out of the view.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qschema.checkpoint import INDEX_SUFFIX, SINGLE
from qschema.safetensors import ShardHeader, read_header
from qschema.strict import DocumentError, Finding, Json, load_json
from qvalidate.context import Context
from qvalidate.documents import HF_QUANT_CONFIG
from qvalidate.fix.index import index_document
from qvalidate.fix.repair import Repair
from qvalidate.loader import load

_INDEX = f"model{INDEX_SUFFIX}"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})\.safetensors")


@dataclass(frozen=True)
class Opened:
    """A checkpoint that can be repaired, and what had to be done to open it.

    `context` may be of a view. `original` is what the loader made of the checkpoint as it is, None
    where it refused it with the findings `refused`.
    """

    context: Context
    original: Context | None
    refused: tuple[Finding, ...] = ()
    repairs: tuple[Repair, ...] = ()


@contextmanager
def opened_for_repair(path: Path) -> Iterator[Opened]:
    """Yield the checkpoint in `path`; a view of it lives as long as the context manager.

    Raises DocumentError with the loader's findings where one of them can't be repaired: what is not
    there, or which of several files are the model.
    """
    refused: tuple[Finding, ...] = ()
    context = None
    try:
        context = load(path)
    except DocumentError as error:
        refused = tuple(error.findings)
    if context is not None and not _omits_a_shard(context):
        yield Opened(context, context)
        return
    with TemporaryDirectory(prefix="qvalidate-fix-") as folder:
        view = Path(folder) / "view"
        repairs = _make_view(path, view, refused)
        yield Opened(_loaded(view, path), context, refused, repairs)


def _omits_a_shard(context: Context) -> bool:
    """Return whether a file with a number of the shards' set, and new tensors, is not indexed."""
    shards = [shard.file.name for shard in context.checkpoint.shards]
    return any(
        _is_of_set(name, shards)
        and read_header(context.path / name).tensors.keys() - context.checkpoint.tensors.keys()
        for name in context.checkpoint.stray_shards
    )


def _make_view(path: Path, view: Path, refused: tuple[Finding, ...]) -> tuple[Repair, ...]:
    """Make `view` of `path` without what the loader `refused`; return what that repairs.

    Raises DocumentError(refused) where that is not possible.
    """
    indexes = sorted(file.name for file in path.glob(f"*{INDEX_SUFFIX}"))
    if not all(_is_repairable(found, indexes) for found in refused):
        raise DocumentError(list(refused))
    shards = _shards(path, _named(path, indexes), refused)
    files = [shard.file.name for shard in shards]
    tensors = {name: stored for shard in shards for name, stored in shard.tensors.items()}
    wrong = [found for found in refused if Path(found.file).name != HF_QUANT_CONFIG]
    index = indexes[0] if len(indexes) == 1 else _INDEX
    left_out = set(indexes)
    if len(wrong) < len(refused):
        left_out.add(HF_QUANT_CONFIG)
    _link(path, view, left_out)
    needs_index = files != [SINGLE] and (len(files) > 1 or bool(indexes))
    if needs_index:
        document = index_document(tensors, _metadata(path, indexes))
        (view / index).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    if refused and not wrong:
        return ()
    rebuilt = Repair(
        id="index-rebuilt",
        file=index,
        where="",
        was=", ".join(sorted({found.rule for found in wrong})) or "without a numbered shard",
        becomes=f"{len(tensors)} tensors in {len(files)} files" if needs_index else "nothing",
        reason="made from the headers of the shards",
    )
    reason = f"only one index can be, {index} is"
    others = (
        Repair(id="stray-left-out", file=name, where="", was=name, becomes="nothing", reason=reason)
        for name in indexes
        if name != index
    )
    return (rebuilt, *others)


def _is_repairable(found: Finding, indexes: Sequence[str]) -> bool:
    """Return whether another index, or no hf_quant_config.json, would do without `found`."""
    if found.rule.startswith(("json-", "config-type")):
        return Path(found.file).name in (*indexes, HF_QUANT_CONFIG)
    return found.rule.startswith("index-") or found.rule == "weights-ambiguous"


def _loaded(view: Path, path: Path) -> Context:
    """Return the context of `view`; errors name the files of `path`, which it shows."""
    try:
        return load(view)
    except DocumentError as error:
        named = [
            found.model_copy(update={"file": found.file.replace(str(view), str(path), 1)})
            for found in error.findings
        ]
        raise DocumentError(named) from None


def _shards(path: Path, named: Mapping[str, str], refused: Sequence[Finding]) -> list[ShardHeader]:
    """Return the headers of the model's shards.

    Raises DocumentError, with what was `refused`, where the files don't tell, and where a named
    tensor is in none: nothing says whether it is lost, or its entry is old.
    """
    headers: dict[str, ShardHeader] = {}
    damaged: list[Finding] = []
    for file in sorted(path.glob("*.safetensors")):
        try:
            headers[file.name] = read_header(file)
        except DocumentError as error:
            # no shard, or the reason why the shards are not complete
            damaged += error.findings
    if named:
        chosen = [name for name, header in headers.items() if header.tensors.keys() & named.keys()]
        chosen += [name for name in headers if name not in chosen and _is_of_set(name, chosen)]
    else:
        chosen = _complete_set(list(headers))
    stored = [name for shard in chosen for name in headers[shard].tensors]
    is_rival = SINGLE not in chosen and (path / SINGLE).exists()
    if not chosen or is_rival or named.keys() - set(stored):
        raise DocumentError([*refused, *damaged])
    if len(set(stored)) < len(stored):
        message = f"some tensors are in two of {', '.join(sorted(chosen))}; remove the wrong file"
        twice = Finding(file=str(path), where="", rule="tensor-duplicate", message=message)
        raise DocumentError([*refused, twice])
    return [headers[name] for name in sorted(chosen)]


def _complete_set(names: Sequence[str]) -> list[str]:
    """Return the files numbered 1 to N of N, [] where there is no such set or more than one."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            key = (found["stem"], int(found["total"]))
            sets.setdefault(key, {})[int(found["number"])] = name
    complete = [
        list(members.values())
        for (_, total), members in sets.items()
        if sorted(members) == list(range(1, total + 1))
    ]
    if len(complete) == 1:
        return complete[0]
    return [SINGLE] if SINGLE in names and not complete else []


def _is_of_set(name: str, shards: Sequence[str]) -> bool:
    """Return whether `name` is numbered like the `shards`, and of as many."""
    own = _NUMBERED.fullmatch(name)
    others = (_NUMBERED.fullmatch(shard) for shard in shards)
    return own is not None and any(
        other and (other["stem"], other["total"]) == (own["stem"], own["total"]) for other in others
    )


def _named(path: Path, indexes: Sequence[str]) -> dict[str, str]:
    """Return the weight_map of the index, of several that of the usual name."""
    document = _document(path, indexes)
    found = document.get("weight_map")
    entries = found.items() if isinstance(found, dict) else ()
    return {name: str(shard) for name, shard in entries}


def _metadata(path: Path, indexes: Sequence[str]) -> Mapping[str, Json]:
    found = _document(path, indexes).get("metadata")
    return found if isinstance(found, dict) else {}


def _document(path: Path, indexes: Sequence[str]) -> Mapping[str, Json]:
    name = indexes[0] if len(indexes) == 1 else _INDEX
    if name not in indexes:
        return {}
    try:
        document = load_json(path / name)
    except (DocumentError, OSError):
        return {}
    return document if isinstance(document, dict) else {}


def _link(path: Path, view: Path, left_out: set[str]) -> None:
    """Make `view` a folder of links to the files of `path`, but for the top ones in `left_out`."""
    view.mkdir()
    for folder, folders, names in os.walk(path):
        inside = Path(folder).relative_to(path)
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = [name for name in folders if name not in links]
        for name in folders:
            (view / inside / name).mkdir()
        # a link to a folder too, so that the loader names it
        for name in [*names, *links]:
            if not (inside == Path() and name in left_out):
                (view / inside / name).symlink_to((Path(folder) / name).resolve())
