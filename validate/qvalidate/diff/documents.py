"""Two JSON documents, path by path. What is only spelt differently is told apart from the rest."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from qschema.strict import DocumentError, Json, json_path, load_json
from qvalidate.context import Context
from qvalidate.diff.result import JsonChange

CONFIG = "config.json"
GENERATION = "generation_config.json"
QUANTIZATION_KEY = "quantization_config"
# who wrote the file, not what it says
_PROVENANCE = frozenset({"transformers_version", "_name_or_path", "_commit_hash", "producer"})
# transformers 5 writes the second for the first
_OLD_DTYPE, _DTYPE = "torch_dtype", "dtype"


class Absent(Enum):
    """The value of a key that is not there, which null is not."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT
Value: TypeAlias = "Json | Absent"
Place: TypeAlias = tuple[int | str, ...]
# place, value in A, value in B
Change: TypeAlias = tuple[Place, Value, Value]


@dataclass
class Documents:
    """What two documents, or several pairs of them, differ in."""

    changes: list[JsonChange] = field(default_factory=list)
    spelling: list[str] = field(default_factory=list)


def config_diff(a: Context, b: Context) -> Documents:
    """Return what differs in config.json, its quantization apart, and in generation_config.json.

    A file that only one side has, or that is no JSON, is left to the comparison of files.
    """
    found = Documents()
    ours, theirs = (_without_quantization(side.checkpoint.config) for side in (a, b))
    _add(found, CONFIG, ours, theirs)
    if pair := json_pair(a, b, GENERATION):
        _add(found, GENERATION, *pair)
    return found


def json_pair(a: Context, b: Context, name: str) -> tuple[Json, Json] | None:
    """Return the JSON of the file `name` on both sides, None unless both have it and it is JSON."""
    if name not in a.checkpoint.files or name not in b.checkpoint.files:
        return None
    try:
        return load_json(a.path / name, constants=True), load_json(b.path / name, constants=True)
    except DocumentError:
        return None


def differences(a: Value, b: Value, place: Place = ()) -> Iterator[Change]:
    """Yield every place where `a` and `b` differ: objects by key, lists of one length by index.

    1 and 1.0 are the same number; NaN is the same as NaN.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key, ABSENT), b.get(key, ABSENT), (*place, key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, (*place, index))
    elif not _is_same(a, b):
        yield place, a, b


def as_change(change: Change, *, file: str, root: Place = ()) -> JsonChange:
    """Return a change of the document in `file` whose own root is at `root`."""
    place, a, b = change
    return JsonChange(file=file, where=json_path((*root, *place)), a=_text(a), b=_text(b))


def _add(found: Documents, file: str, a: Json, b: Json) -> None:
    changes = list(differences(a, b))
    dtypes = {change[0]: change for change in changes}
    for change in changes:
        *parent, key = change[0] or ("",)
        if key in _PROVENANCE:
            found.spelling.append(f"{file}: {json_path(change[0])}: {_arrow(change)}")
        elif key in (_OLD_DTYPE, _DTYPE) and _is_dtype_renamed(dtypes, tuple(parent)):
            if key == _DTYPE:
                where = json_path(tuple(parent))
                found.spelling.append(f"{file}: {where}: {_OLD_DTYPE} and {_DTYPE} are one key")
        else:
            found.changes.append(as_change(change, file=file))


def _is_dtype_renamed(changes: Mapping[Place, Change], parent: Place) -> bool:
    """Whether one side has the value of torch_dtype under the name dtype."""
    old, new = changes.get((*parent, _OLD_DTYPE)), changes.get((*parent, _DTYPE))
    if old is None or new is None:
        return False
    return (old[1] == new[2] and old[2] is ABSENT and new[1] is ABSENT) or (
        old[2] == new[1] and old[1] is ABSENT and new[2] is ABSENT
    )


def _without_quantization(config: Mapping[str, Json]) -> dict[str, Json]:
    found = {key: value for key, value in config.items() if key != QUANTIZATION_KEY}
    text = found.get("text_config")
    if isinstance(text, dict):
        found["text_config"] = {
            key: value for key, value in text.items() if key != QUANTIZATION_KEY
        }
    return found


def _is_same(a: Value, b: Value) -> bool:
    if isinstance(a, bool) != isinstance(b, bool):
        # 1 is True for Python
        return False
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return a == b


def _text(value: Value) -> str | None:
    return None if value is ABSENT else json.dumps(value, ensure_ascii=False)


def _arrow(change: Change) -> str:
    return f"{_text(change[1]) or 'absent'} -> {_text(change[2]) or 'absent'}"
