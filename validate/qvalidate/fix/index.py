"""The index, from the headers of the shards; and the weight files that are no part of the model."""

from collections.abc import Mapping

from qschema.checkpoint import Checkpoint
from qschema.safetensors import Stored
from qschema.strict import Json
from qvalidate.fix.repair import Repair


def index_document(tensors: Mapping[str, Stored], metadata: Mapping[str, Json]) -> dict[str, Json]:
    """Return the index of `tensors`, in order of their names; total_size is counted."""
    total = sum(stored.nbytes for stored in tensors.values())
    weight_map: dict[str, Json] = {name: tensors[name].file.name for name in sorted(tensors)}
    return {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}


def index_repairs(
    before: Checkpoint, after: Checkpoint
) -> tuple[dict[str, Json] | None, list[Repair]]:
    """Return the index to write, None where it is right or not needed, and its repairs.

    `after` has the tensors by the names that they will have.
    """
    name = before.index
    if name is None:
        return None, []
    wanted = index_document(after.tensors, before.index_metadata)
    total = sum(stored.nbytes for stored in after.tensors.values())
    changes = [
        (f"$.weight_map[{tensor!r}]", "nothing", before.tensors[tensor].file.name, "is in a shard")
        for tensor in before.unindexed_tensors
    ]
    changes += [
        (f"$.weight_map[{old!r}]", repr(old), repr(new), "was renamed")
        for old, new in zip(before.tensors, after.tensors, strict=True)
        if old != new
    ]
    found = before.index_metadata.get("total_size", None if before.index_metadata else "nothing")
    if found is not None and found != total:
        reason = "is the size of all tensors in bytes"
        changes.append(("$.metadata.total_size", str(found), str(total), reason))
    repairs = [
        Repair(
            id="index-corrected", file=name, where=where, was=was, becomes=becomes, reason=reason
        )
        for where, was, becomes, reason in changes
    ]
    return (wanted if repairs else None), repairs


def stray_repairs(checkpoint: Checkpoint) -> list[Repair]:
    """Return a repair for each weight file beside the shards; those in subfolders stay."""
    reason = "is no shard of the model, and some readers take it for weights"
    return [
        Repair(id="stray-left-out", file=name, where="", was=name, becomes="nothing", reason=reason)
        for name in checkpoint.stray_shards
        if "/" not in name
    ]
