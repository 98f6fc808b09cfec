"""One quantization config while it is changed, key by key, with a repair noted for each change."""

from copy import deepcopy
from dataclasses import dataclass, field

from qschema.strict import Json
from qvalidate.documents import QuantConfig
from qvalidate.fix.repair import Repair, RepairId, shown


@dataclass
class Document:
    """`raw` is the object at the JSON path `root` of `file`, which is a name in the checkpoint."""

    file: str
    root: str
    raw: dict[str, Json]
    repairs: list[Repair] = field(default_factory=list)

    @property
    def config(self) -> QuantConfig:
        """What it says now."""
        return QuantConfig(file=self.file, root=self.root, raw=self.raw)

    @property
    def body(self) -> dict[str, Json]:
        """The object that holds quant_algo."""
        nested = self.raw.get("quantization")
        return nested if isinstance(nested, dict) else self.raw

    @property
    def is_nested(self) -> bool:
        return self.body is not self.raw

    def put(
        self, owner: dict[str, Json], key: str, value: Json, *, repair: RepairId, reason: str
    ) -> None:
        """Set `key` of `owner`, a part of `raw`, if it is not that already."""
        if key in owner and type(owner[key]) is type(value) and owner[key] == value:
            return
        was = shown(owner[key]) if key in owner else "nothing"
        owner[key] = value
        self._note(owner, key, was=was, becomes=shown(value), repair=repair, reason=reason)

    def drop(self, owner: dict[str, Json], key: str, *, repair: RepairId, reason: str) -> None:
        """Remove `key` of `owner`, a part of `raw`, if it is there."""
        if key in owner:
            was = shown(owner.pop(key))
            self._note(owner, key, was=was, becomes="nothing", repair=repair, reason=reason)

    def _note(
        self,
        owner: dict[str, Json],
        key: str,
        *,
        was: str,
        becomes: str,
        repair: RepairId,
        reason: str,
    ) -> None:
        where = f"{self.root}{self._below(owner)}.{key}"
        self.repairs.append(
            Repair(id=repair, file=self.file, where=where, was=was, becomes=becomes, reason=reason)
        )

    def _below(self, owner: dict[str, Json]) -> str:
        """Return the JSON path from the root to `owner`."""
        if owner is self.raw:
            return ""
        middle = ".quantization" if self.is_nested else ""
        layers = self.body.get("quantized_layers")
        if not isinstance(layers, dict) or owner is self.body:
            return middle
        names = (f".{name}" for name, entry in layers.items() if entry is owner)
        return f"{middle}.quantized_layers{next(names, '')}"


def opened(config: QuantConfig, *, file: str) -> Document:
    """Return `config`, which stands in `file`, as a document that can be changed."""
    return Document(file=file, root=config.root, raw=deepcopy(dict(config.raw)))
