"""The KV cache of a checkpoint: which scales it gets, and what the documents say of it.

Names and formula: ModelOpt 0.47.0 export/unified_export_hf.py:1015-1016, quant_utils.py:1118-1137:
`<attention>.k_proj.k_scale` = amax / 448 for FP8 and for NVFP4.
"""

from collections.abc import Mapping, Set

from qconvert.errors import ConvertError, some
from qconvert.scalars import quotient
from qconvert.statistics import Statistics
from qschema.architectures import keep_reason
from qschema.checkpoint import Checkpoint
from qschema.dtypes import nbytes
from qschema.plan import Constant, Output
from qschema.recipe import Recipe

_DIVISOR = 448.0
# by the end of their names: tensors that make keys, of which an attention layer has some, and those
# that make values
_TOGETHER = (".qkv_proj.weight", ".kv_a_proj_with_mqa.weight", ".kv_b_proj.weight")
_KEYS = (".k_proj.weight", *_TOGETHER)
_VALUES = (".v_proj.weight", *_TOGETHER)


def kv_constants(
    checkpoint: Checkpoint,
    recipe: Recipe,
    statistics: Statistics,
    *,
    dropped: Set[str] = frozenset(),
) -> list[Constant]:
    """Return the scales (and biases) of the KV cache that `recipe` asks for.

    Keys get none where their projection is among the tensors `dropped`, nor do values; without
    statistics of the cache there are none at all, and engines take 1.0. Raises ConvertError for
    statistics of modules that the checkpoint does not have, or of only some of its layers.
    """
    if recipe.kv_cache is None or not statistics.amax.kv_cache:
        return []
    layers = _attention_layers(checkpoint, dropped)
    known = statistics.amax.kv_cache
    unknown = [name for name in known if name not in layers]
    # a vision tower has no cache, and calibration runs no layer that predicts further tokens
    missing = [
        name
        for name, files in layers.items()
        if files and name not in known and keep_reason(name, config=checkpoint.config) is None
    ]
    if unknown or missing:
        problem = (
            f"{some(unknown)}: no attention layer of the checkpoint"
            if unknown
            else f"nothing for {some(missing)}"
        )
        raise ConvertError(f"{statistics.file}: $.kv_cache: {problem}; calibrate this checkpoint")
    constants = []
    for name, amax in sorted(known.items()):
        for letter, file in layers[name].items():
            value = amax.k if letter == "k" else amax.v
            if quotient(value, _DIVISOR) == 0.0:
                raise ConvertError(
                    f"{statistics.file}: $.kv_cache[{name!r}].{letter} is {value:g}: no key or "
                    "value was seen, calibrate again"
                )
            constants += _constants(name, letter, value, file, recipe, statistics)
    return constants


def kv_notes(recipe: Recipe, constants: list[Constant]) -> list[str]:
    """Return what a person should know about the KV cache."""
    if recipe.kv_cache is None or constants:
        return []
    return [
        f"KV cache {recipe.kv_cache} without statistics: no scales are written, engines use 1.0"
    ]


def _constants(
    name: str, letter: str, amax: float, file: str, recipe: Recipe, statistics: Statistics
) -> list[Constant]:
    owner = f"{name}.{letter}_proj"
    reason = f"{recipe.kv_cache} cache of {name}"
    found = [
        Constant(
            output=_output(f"{owner}.{letter}_scale", "F32", (), file),
            value=quotient(amax, _DIVISOR),
            reason=reason,
        )
    ]
    bias = statistics.vectors.get(f"{name}.{letter}_bias")
    if (recipe.kv_cache == "NVFP4_AFFINE") != (bias is not None):
        found_word = "no" if bias is None else "a"
        raise ConvertError(
            f"{statistics.file}: {found_word} {name}.{letter}_bias in its vectors, which go with "
            f"the KV cache NVFP4_AFFINE and only with it; the recipe says {recipe.kv_cache}"
        )
    if bias is not None:
        if bias.dtype != "BF16" or len(bias.shape) != 4 or bias.shape[::2] != (1, 1):
            raise ConvertError(
                f"{bias.file}::{bias.name}: expected BF16 [1, KV heads, 1, head size], found "
                f"{bias.dtype} {list(bias.shape)}"
            )
        output = _output(f"{owner}.{letter}_bias", bias.dtype, bias.shape, file)
        found.append(Constant(output=output, vector=bias.name, reason=reason))
    return found


def _attention_layers(checkpoint: Checkpoint, dropped: Set[str]) -> Mapping[str, Mapping[str, str]]:
    """Return attention module -> "k" and "v", if their projections stay -> the file for scales."""
    keys = _projections(checkpoint, _KEYS)
    values = _projections(checkpoint, _VALUES)
    layers = {}
    for name, of_keys in keys.items():
        # where keys are values too, no other projection makes values
        projections = {"k": of_keys, "v": values.get(name, of_keys)}
        kept = {
            letter: [file for tensor, file in found if tensor not in dropped]
            for letter, found in projections.items()
        }
        files = [*kept["v"], *kept["k"]]
        layers[name] = {letter: files[-1] for letter, found in kept.items() if found}
    return layers


def _projections(
    checkpoint: Checkpoint, suffixes: tuple[str, ...]
) -> Mapping[str, list[tuple[str, str]]]:
    """Return attention module -> name and file of its tensors that end so."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, tensor in checkpoint.tensors.items():
        for suffix in suffixes:
            if name.endswith(suffix) and ".self_attn" in name:
                module = name[: name.index(suffix)]
                found.setdefault(module, []).append((name, tensor.file.name))
    return found


def _output(name: str, dtype: str, shape: tuple[int, ...], file: str) -> Output:
    return Output(
        name=name,
        file=file,
        dtype=dtype,
        shape=list(shape),
        offset=8,
        nbytes=nbytes(dtype, shape),
        suffix=name.rpartition(".")[2],
    )
