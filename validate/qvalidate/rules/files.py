"""The files around the tensors: strays, the index, the tokenizer, remote code."""

from collections.abc import Iterator

from qschema.strict import Json
from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule, some

# any one of them is a tokenizer
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


@rule(
    "stray-safetensors",
    severity="error",
    summary="a safetensors file is no part of the model",
    text="""It is no shard of this model: a leftover, an adapter, another model. Tools that
    read every *.safetensors of the folder take it for weights; engines that follow the index, if
    there is one, skip it. In a subfolder it is only noted.""",
)
def stray_safetensors(context: Context) -> Iterator[Spot]:
    index = context.checkpoint.index
    what = f"is not in {index}" if index else "is not the model's only file"
    for name in context.checkpoint.stray_shards:
        file = str(context.path / name)
        if "/" in name:
            yield Spot(file, "", "lies in a subfolder, and is not read", "note")
        else:
            yield Spot(file, "", f"{what}; remove it, or move it to a folder of its own")


@rule(
    "unindexed-tensor",
    severity="error",
    summary="a tensor is in a shard but not in the index",
    text="""Readers that follow the index never see it, readers that go through the shards
    do.""",
    effects={"vllm": "unknown"},
)
def unindexed_tensor(context: Context) -> Iterator[Spot]:
    for name in context.checkpoint.unindexed_tensors:
        shard = context.checkpoint.tensors[name].file
        yield Spot(str(shard), name, f"is not in {context.checkpoint.index}")


@rule(
    "index-total-size",
    severity="warning",
    summary="the index's total_size is not the size of the tensors",
    text="""metadata.total_size is the number of bytes of all tensors. Engines use it to plan
    memory at most; a wrong one is a sign that the index was copied from another checkpoint.""",
)
def index_total_size(context: Context) -> Iterator[Spot]:
    checkpoint = context.checkpoint
    if checkpoint.index is None or "total_size" not in checkpoint.index_metadata:
        return
    found = checkpoint.index_metadata["total_size"]
    expected = sum(stored.nbytes for stored in checkpoint.tensors.values())
    if found != expected:
        file = str(context.path / checkpoint.index)
        message = f"says {found!r}, the {len(checkpoint.tensors)} tensors take {expected} bytes"
        yield Spot(file, "$.metadata.total_size", message)


@rule(
    "tokenizer-missing",
    severity="warning",
    summary="the checkpoint has no tokenizer",
    text="""Engines start from the directory alone; without a tokenizer they serve token ids
    at most.""",
)
def tokenizer_missing(context: Context) -> Iterator[Spot]:
    if not any(name in context.checkpoint.files for name in TOKENIZERS):
        yield Spot(str(context.path), "", f"has none of {', '.join(TOKENIZERS)}")


@rule(
    "auto-map-target-missing",
    severity="warning",
    summary="config.json's auto_map names Python code that is not there",
    text="""auto_map says which class in which file of the checkpoint to load
    ("modeling_x.XModel"). With the file missing, trust_remote_code fails, or fetches it from
    the hub.""",
)
def auto_map_target_missing(context: Context) -> Iterator[Spot]:
    found = context.checkpoint.config.get("auto_map")
    for key, target in (found if isinstance(found, dict) else {}).items():
        missing = [f"{name}.py" for name in _sources(target) if f"{name}.py" not in _here(context)]
        if missing:
            message = f"names {target!r}, but there is no {some(missing)}"
            yield Spot(context.config_file, f"$.auto_map.{key}", message)


def _here(context: Context) -> set[str]:
    return set(context.checkpoint.files)


def _sources(target: Json) -> list[str]:
    """Return the modules of "module.Class" or ["module.Class", null]; none of other repos."""
    names = target if isinstance(target, list) else [target]
    return [
        name.rpartition(".")[0]
        for name in names
        if isinstance(name, str) and "." in name and "--" not in name
    ]
