"""`model.safetensors.index.json`: which shard holds which tensor.

    {"metadata": {"total_size": 123, ...}, "weight_map": {"lm_head.weight": "model-00001-of-..."}}

Source: transformers 5.23.0 utils/hub.py:960-985 (`metadata` and `weight_map` are read without a
default); huggingface_hub 2.4.0 serialization (total_size, total_parameters). Shard names are
joined to a directory by every reader, so a name that leads elsewhere is an error here.
"""

import re
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field

from qschema.strict import Verbatim, violation

_SHARD_NAME = r"^[^/\\\x00-\x1f]+\.safetensors$"


def _beside(name: str) -> str:
    if not re.fullmatch(_SHARD_NAME, name):
        raise violation(
            "index-shard-name",
            "expected the name of a .safetensors file beside the index, without a path",
        )
    return name


ShardName: TypeAlias = Annotated[
    str, AfterValidator(_beside), Field(json_schema_extra={"pattern": _SHARD_NAME})
]
TensorName: TypeAlias = Annotated[str, Field(min_length=1)]


class IndexMetadata(Verbatim):
    """Totals. `total_size` counts tensor bytes; packed sub-byte weights made it a fraction once."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str | int | float | bool | None]

    total_size: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)] | None = None
    total_parameters: int | None = Field(default=None, ge=0)


class Index(Verbatim):
    """The index of a sharded checkpoint."""

    metadata: IndexMetadata
    weight_map: dict[TensorName, ShardName] = Field(min_length=1)

    def shards(self) -> list[str]:
        """Return the names of the shards, in alphabetical order."""
        return sorted(set(self.weight_map.values()))
