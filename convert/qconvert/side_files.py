"""The files beside the weights: which are copied, which are left behind, which are written anew."""

from fnmatch import fnmatchcase

from qconvert.errors import ConvertError, some
from qschema.checkpoint import OTHER_WEIGHTS, PICKLES, Checkpoint
from qschema.plan import SideFile
from qschema.recipe import Recipe

CONFIG = "config.json"
QUANT_CONFIG = "hf_quant_config.json"
REPORT = "qconvert_report.json"


def side_files(checkpoint: Checkpoint, recipe: Recipe) -> list[SideFile]:
    """Return what happens to every file of `checkpoint` that is no shard, in order of its name.

    Raises ConvertError for safetensors files that belong to no index and are not a known second
    copy of the weights: leaving them out might lose a part of the model.
    """
    found = [_decide(name, size, recipe) for name, size in checkpoint.files.items()]
    strays = []
    for name in checkpoint.stray_shards:
        reason = _leave_reason(name, recipe)
        if reason is None:
            strays.append(name)
        else:
            found.append(SideFile(file=name, action="leave", reason=reason))
    if strays:
        raise ConvertError(
            f"{checkpoint.path}: {some(strays)}: not named by the index or beside "
            "model.safetensors, so it is unclear whether the model needs it; add it to the index, "
            f"or leave it behind with --leave {strays[0]!r}"
        )
    found += [
        SideFile(file=name, action="leave", reason="hidden, or a link to a folder")
        for name in checkpoint.skipped
    ]
    written = {QUANT_CONFIG: "the quantization", REPORT: "what was done"}
    if checkpoint.index:
        written[checkpoint.index] = "made from the new headers"
    known = {side.file for side in found}
    found += [
        SideFile(file=name, action="write", reason=reason)
        for name, reason in written.items()
        if name not in known
    ]
    return sorted(found, key=lambda side: side.file)


def _decide(name: str, size: int, recipe: Recipe) -> SideFile:
    if name == CONFIG:
        return SideFile(file=name, action="write", reason="quantization_config is added")
    if name == REPORT:
        return SideFile(file=name, action="write", reason="replaces the source's own")
    reason = _leave_reason(name, recipe)
    if reason is not None:
        return SideFile(file=name, action="leave", reason=reason, nbytes=size)
    return SideFile(file=name, action="copy", reason="not a weight", nbytes=size)


def _leave_reason(name: str, recipe: Recipe) -> str | None:
    for pattern in recipe.leave:
        if fnmatchcase(name, pattern):
            return f"left by {pattern!r}"
    if name.endswith((*PICKLES, *(f"{suffix}.index.json" for suffix in PICKLES))):
        return "pickled, another container of the weights"
    if name.endswith(OTHER_WEIGHTS):
        return "another container of the weights"
    if name.endswith(".safetensors") and name.rpartition("/")[2].startswith("consolidated"):
        return "a second copy of the weights under Mistral's or Meta's names"
    return None
