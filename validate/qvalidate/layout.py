"""Which tensors a module must have, from its format and the shape of its codes.

N  rows out    K  columns in    E  experts of a stack, whose tensors are [E, *reversed dims]
"""

from collections.abc import Mapping
from typing import TypeAlias

from qschema.formats import Format, TensorSpec
from qschema.formats.declare import resolve
from qschema.safetensors import Stored
from qvalidate.context import Module, codes_spec

Shapes: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]


def sizes(module: Module, declared: Format) -> tuple[int, int] | None:
    """Return (rows, columns) of the Linear, of each expert's in a stack.

    None where there are no codes, or not of the declared rank.
    """
    codes = module.codes(declared)
    if codes is None:
        return None
    spec = codes_spec(declared)
    if not module.is_stack:
        return axes(spec, codes.shape)
    return axes(spec, tuple(reversed(codes.shape[1:])))


def expected(module: Module, declared: Format) -> Shapes | None:
    """Return suffix -> (dtype, shape) of what the module owns, what it may do without included.

    None where its codes tell no sizes, or sizes that the format can't have.
    """
    found = sizes(module, declared)
    if found is None or misfit(module, declared):
        return None
    rows, columns = found
    codes = module.codes(declared)
    experts = codes.shape[:1] if codes is not None and module.is_stack else ()
    return {
        spec.suffix: (spec.dtype, _shape(spec, rows, columns, experts)) for spec in declared.tensors
    }


def as_declared(module: Module, declared: Format) -> Mapping[str, Stored] | None:
    """Return the tensors of the format that the module owns, by suffix; None unless all are right.

    An input scale may be missing: the weight means the same without it.
    """
    shapes = expected(module, declared)
    if shapes is None:
        return None
    found: dict[str, Stored] = {}
    for spec in declared.tensors:
        stored = module.tensors.get(spec.suffix)
        if stored is None and (not spec.required or spec.role == "input"):
            continue
        if stored is None or (stored.dtype, stored.shape) != shapes[spec.suffix]:
            return None
        found[spec.suffix] = stored
    return found


def misfit(module: Module, declared: Format) -> str | None:
    """Return why the module's rows and columns can't be in the format, None if they can."""
    found = sizes(module, declared)
    if found is None:
        return None
    rows, columns = found
    return declared.obstacle(rows=rows, columns=columns, dtype=declared.source_dtypes[0])


def axes(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (rows, columns) of the Linear whose `spec` has `shape`, None if the rank differs."""
    if len(shape) != len(spec.shape):
        return None
    found = {"N": 0, "K": 0}
    for dim, size in zip(spec.shape, shape, strict=True):
        axis, _, divisor = dim.partition("/")
        if axis in found:
            found[axis] = size * int(divisor or 1)
    return found["N"], found["K"]


def _shape(spec: TensorSpec, rows: int, columns: int, experts: tuple[int, ...]) -> tuple[int, ...]:
    shape = resolve(spec.shape, rows=rows, columns=columns)
    # one number for the whole weight is one for all experts
    return (*experts, *reversed(shape)) if experts and shape else shape
