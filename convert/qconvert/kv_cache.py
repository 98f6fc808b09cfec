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
# a tensor that every attention layer has one of, by the end of its name
_ATTENTION = (
    ".k_proj.weight",
    ".qkv_proj.weight",
    ".kv_a_proj_with_mqa.weight",
    ".kv_b_proj.weight",
)


def kv_constants(
    checkpoint: Checkpoint,
    recipe: Recipe,
    statistics: Statistics,
    *,
    dropped: Set[str] = frozenset(),
) -> list[Constant]:
    """Return the scales (and biases) of the KV cache that `recipe` asks for.

    A layer whose keys' projection is among the tensors `dropped` gets none; without statistics of
    the cache there are none at all, and engines take 1.0. Raises ConvertError for statistics of
    modules that the checkpoint does not have, or of only some of its attention layers.
    """
    if recipe.kv_cache is None or not statistics.amax.kv_cache:
        return []
    all_files = _attention_files(checkpoint, frozenset())
    files = _attention_files(checkpoint, dropped)
    known = statistics.amax.kv_cache
    unknown = [name for name in known if name not in all_files]
    # a vision tower has no cache, and calibration runs no layer that predicts further tokens
    missing = [
        name
        for name in files
        if name not in known and keep_reason(name, config=checkpoint.config) is None
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
        if name not in files:
            continue
        for letter, value in (("k", amax.k), ("v", amax.v)):
            if quotient(value, _DIVISOR) == 0.0:
                raise ConvertError(
                    f"{statistics.file}: $.kv_cache[{name!r}].{letter} is {value:g}: no key or "
                    "value was seen, calibrate again"
                )
            constants += _constants(name, letter, value, files[name], recipe, statistics)
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


def _attention_files(checkpoint: Checkpoint, dropped: Set[str]) -> Mapping[str, str]:
    """Return attention module -> the file that holds its keys' projection, if not `dropped`."""
    return {
        name[: name.index(suffix)]: tensor.file.name
        for name, tensor in checkpoint.tensors.items()
        for suffix in _ATTENTION
        if name.endswith(suffix) and ".self_attn" in name and name not in dropped
    }


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
