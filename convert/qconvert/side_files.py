"""The files beside the weights: which are copied, which are left behind, which are written anew."""

from pathlib import Path

from qconvert.errors import ConvertError, some
from qschema.architectures import matching
from qschema.checkpoint import Checkpoint
from qschema.plan import SideFile
from qschema.recipe import Recipe

CONFIG = "config.json"
QUANT_CONFIG = "hf_quant_config.json"
REPORT = "qconvert_report.json"


# weights again, under the names that other libraries give them; training state
_SECOND_COPIES = (
    "consolidated*.safetensors",
    "consolidated*.pth",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "model*.bin",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "rust_model*.ot",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*.tflite",
    "training_args.bin",
    "optimizer*.pt",
    "scheduler*.pt",
    "scaler*.pt",
    "rng_state*.pth",
)


def side_files(checkpoint: Checkpoint, recipe: Recipe) -> list[SideFile]:
    """Return what happens to every file of `checkpoint` that is no shard, in order of its name.

    Raises ConvertError for safetensors files beside the shards that no index names and that are no
    known second copy of the weights: leaving them out might lose a part of the model, copying them
    might give engines weights that they should not read.
    """
    found = [_decide(name, size, recipe) for name, size in checkpoint.files.items()]
    strays = []
    for name in checkpoint.stray_shards:
        side = _decide(name, None, recipe)
        is_known = side.action == "leave" or matching(name, recipe.copy_files) or "/" in name
        if is_known:
            found.append(side)
        else:
            strays.append(name)
    if strays:
        raise ConvertError(
            f"{checkpoint.path}: {some(strays)}: no part of the model that the index or "
            "model.safetensors describes; --copy or --leave it by name, for example "
            f"--leave {strays[0]!r}"
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


def _decide(name: str, size: int | None, recipe: Recipe) -> SideFile:
    if name == CONFIG:
        return SideFile(file=name, action="write", reason="quantization_config is added")
    if name == REPORT:
        return SideFile(file=name, action="write", reason="replaces the source's own")
    left = matching(name, recipe.leave)
    if left:
        return SideFile(file=name, action="leave", reason=f"left by {left!r}", nbytes=size)
    if not matching(name, recipe.copy_files) and matching(Path(name).name, _SECOND_COPIES):
        reason = "a second copy of the weights, or training state"
        return SideFile(file=name, action="leave", reason=reason, nbytes=size)
    return SideFile(file=name, action="copy", reason="not a weight of the model", nbytes=size)
