"""What a new header can put right: names, ranks and dtype labels over the same bytes.

A scale that is another number, another grid or another dtype stays as it is. Codes are only ever
rid of leading dimensions of one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from qschema.architectures import experts_of
from qschema.checkpoint import Checkpoint
from qschema.formats import Format
from qschema.safetensors import Entry, Stored
from qvalidate.context import KV_SCALES, Module, codes_spec
from qvalidate.fix.repair import Repair, RepairId
from qvalidate.layout import expected

# format -> another dialect's name of a tensor -> its name here. DeepSeek calls the scale of a block
# its inverse and multiplies with it; SGLang 0.5.23 gives MXFP8's that name when it loads
# (model_loader/loader.py:1052-1060). In other formats the name may mean the reciprocal.
OTHER_NAMES: Mapping[str, Mapping[str, str]] = {
    "FP8_PB_WO": {"weight_scale_inv": "weight_scale"},
    "MXFP8": {"weight_scale_inv": "weight_scale"},
}
# dtypes of the same bytes: an exponent of two plus 127
_SAME_BYTES = frozenset({("F8_E8M0", "U8")})


def mended(module: Module, declared: Format, *, is_mixed: bool) -> Module:
    """Return `module` with the names, dtypes and shapes of the format where its bytes allow it.

    `is_mixed` keeps an expert's weight_scale_inv: vLLM 0.33.0 reads the experts of a mixed
    checkpoint under that name only (quantization/fp8.py:485, :637). What can't be mended stays.
    """
    owned = dict(module.tensors)
    spec = codes_spec(declared)
    codes = owned.get(spec.suffix)
    if codes is not None and not module.is_stack and len(codes.shape) > len(spec.shape):
        owned[spec.suffix] = replace(codes, shape=_unwrapped(codes.shape, len(spec.shape)))
        shapes = expected(replace(module, tensors=dict(owned)), declared)
    else:
        shapes = expected(module, declared)
    if shapes is None:
        return module
    keeps_name = is_mixed and experts_of(module.name) is not None
    for other, suffix in OTHER_NAMES.get(declared.name, {}).items():
        if other in owned and suffix not in owned and not keeps_name:
            renamed = _relabelled(owned[other], *shapes[suffix])
            if (renamed.dtype, renamed.shape) == shapes[suffix]:
                owned[suffix] = renamed
                del owned[other]
    for spec in declared.tensors:
        if spec.role != "codes" and spec.suffix in owned:
            owned[spec.suffix] = _relabelled(owned[spec.suffix], *shapes[spec.suffix])
    return module if owned == module.tensors else replace(module, tensors=owned)


def with_cache_scales(module: Module) -> Module:
    """Return `module` with k_scale and v_scale of one F32 number as scalars."""
    wrapped = {
        suffix: replace(module.tensors[suffix], shape=())
        for suffix in KV_SCALES & module.tensors.keys()
        if _is_wrapped_number(module.tensors[suffix])
    }
    return replace(module, tensors={**module.tensors, **wrapped}) if wrapped else module


def headers_of(
    checkpoint: Checkpoint, modules: Iterable[Module], origin: Mapping[str, str]
) -> dict[str, dict[str, Entry]]:
    """Return shard -> old name -> new name, dtype and shape of each tensor that differs.

    The tensors of `modules` are called as in `checkpoint`, but for those whose old name is in
    `origin`; their new names follow from the module and the suffix.
    """
    found: dict[str, dict[str, Entry]] = {}
    for module in modules:
        for suffix, stored in module.tensors.items():
            old = checkpoint.tensors[origin.get(stored.name, stored.name)]
            entry = Entry(module.tensor_name(suffix), stored.dtype, stored.shape)
            if entry != Entry(old.name, old.dtype, old.shape):
                found.setdefault(old.file.name, {})[old.name] = entry
    return found


def repairs_of(old: Stored, new: Entry) -> list[Repair]:
    """Return the repairs of one tensor: its name, dtype and shape, each by itself."""
    changes: list[tuple[RepairId, str, str, str]] = [
        ("tensor-renamed", old.name, new.name, "the name that engines look for"),
        ("tensor-relabelled", old.dtype, new.dtype, "the same bytes, in the dtype of the format"),
        (
            "tensor-reshaped",
            str(list(old.shape)),
            str(list(new.shape)),
            "the same bytes, in the shape of the format",
        ),
    ]
    return [
        Repair(
            id=repair, file=old.file.name, where=old.name, was=was, becomes=becomes, reason=reason
        )
        for repair, was, becomes, reason in changes
        if was != becomes
    ]


def _unwrapped(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return `shape` without leading ones, as far as it has more than `rank` dimensions."""
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return shape


def _relabelled(stored: Stored, dtype: str, shape: tuple[int, ...]) -> Stored:
    """Return `stored` as `dtype` of `shape` if its bytes are that already, else as it is."""
    if (stored.dtype, stored.shape) == (dtype, shape):
        return stored
    is_same = stored.dtype == dtype or (stored.dtype, dtype) in _SAME_BYTES
    if is_same and _squeezed(stored.shape) == _squeezed(shape):
        return replace(stored, dtype=dtype, shape=shape)
    return stored


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _is_wrapped_number(stored: Stored) -> bool:
    return stored.dtype == "F32" and prod(stored.shape) == 1 and stored.shape not in ((), (1,))
