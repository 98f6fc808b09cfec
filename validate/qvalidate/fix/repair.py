"""What a repair is, and all repairs of one checkpoint. Values only: nothing is read or written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from qschema.safetensors import Entry
from qschema.strict import Finding, Json, Strict
from qvalidate.context import Context

RepairId: TypeAlias = Literal[
    "index-rebuilt",
    "index-corrected",
    "stray-left-out",
    "tensor-renamed",
    "tensor-reshaped",
    "tensor-relabelled",
    "document-made",
    "key-respelt",
    "key-moved",
    "method-corrected",
    "producer-added",
    "algo-corrected",
    "field-corrected",
    "layers-corrected",
    "exclusions-corrected",
    "kv-cache-corrected",
]

_SHOWN = 120


class Repair(Strict):
    """One change. `file` is relative to the checkpoint, `where` a JSON path or a tensor's name.

    `was` and `becomes` are texts for a person; "nothing" where something is added or left out.
    """

    id: RepairId
    file: str
    where: str
    was: str
    becomes: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}::{self.where}" if self.where else self.file
        return f"{place}: {self.id}: {self.was} -> {self.becomes} ({self.reason})"


class Left(Strict):
    """What could not be repaired, by the rule that finds it, and why."""

    rule: str
    file: str
    where: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}::{self.where}" if self.where else self.file
        return f"{place}: {self.rule}: not repaired: {self.reason}"


@dataclass(frozen=True)
class Repairs:
    """All repairs of a checkpoint, and what it is with them.

    `documents` are the JSON files to write, by name; `headers` the shards to write with another
    header: shard -> the tensor's old name -> its new name, dtype and shape, for each that changes.
    `repaired` is the checkpoint after it, with the tensors where they lie before.
    """

    context: Context
    repaired: Context
    repairs: tuple[Repair, ...] = ()
    left: tuple[Left, ...] = ()
    documents: Mapping[str, Json] | None = None
    headers: Mapping[str, Mapping[str, Entry]] | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class FixReport(Strict):
    """The result of one `qvalidate fix`. `after` is of what was made, or would be."""

    document: Literal["qvalidate-fix"] = "qvalidate-fix"
    version: Literal[1] = 1
    checkpoint: str
    # None where nothing was written
    output: str | None
    repairs: list[Repair]
    before: list[Finding]
    after: list[Finding]
    left: list[Left]
    notes: list[str]

    @property
    def exit_code(self) -> int:
        """0 where nothing is left that is an error, else 1."""
        return int(bool(self.left) or any(found.severity == "error" for found in self.after))


def shown(value: Json) -> str:
    """Return a JSON value as one short line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."
