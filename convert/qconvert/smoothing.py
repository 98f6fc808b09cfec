"""AWQ and SmoothQuant: what smoothing does to weights, norms and biases, element by element.

With p the pre_quant_scale of a module, its input is multiplied with p and its weight's columns with
1 / p. Fused siblings read one input, so they get the mean of theirs. A format says what may take p
in (Format.folds_into): the norm before a group, or the rows of the linear before it; where nothing
can, p is written as a tensor. Source: ModelOpt 0.47.0 quantization/model_calib.py:1208-1360,
export/quant_utils.py:1300-1562.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from qconvert.decide import Decision
from qconvert.errors import ConvertError, some
from qconvert.statistics import PRE_QUANT_SCALE, Statistics
from qschema.architectures import (
    LINEAR_BEFORE,
    LINEAR_TYPES,
    NORM_READERS,
    NORM_TYPES,
    experts_of,
    fused_siblings,
)
from qschema.dtypes import HIGH_PRECISION
from qschema.plan import Scaling, Vector
from qschema.safetensors import Stored

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

# vectors in memory at once: those of the steps in hand, not those of the model
_NUM_CACHED = 64


@dataclass(frozen=True)
class Smoothing:
    """What smoothing does to one tensor; `written` is what its module's own tensor of it holds."""

    scalings: list[Scaling] = field(default_factory=list)
    written: Vector | None = None
    # for a tensor that is not quantized
    reason: str = ""


NOT_SMOOTHED = Smoothing()


def plan_smoothing(
    decisions: list[Decision], statistics: Statistics, *, model_type: str | None
) -> Mapping[str, Smoothing]:
    """Return what smoothing does: to a quantized module, to a norm's or a bias's tensor, by name.

    Raises ConvertError for a pre_quant_scale of another size or dtype, of a module whose format or
    dtype can't have one, or of only some of those that engines load as one.
    """
    smoothed = {
        decision.module: decision
        for decision in decisions
        if decision.declared and statistics.has_smoothing(decision.module)
    }
    quantized = {decision.module for decision in decisions if decision.declared}
    for decision in smoothed.values():
        _check(decision, smoothed, quantized, statistics)
    found: dict[str, Smoothing] = {}
    tensors = {decision.tensor.name: decision for decision in decisions}
    for module, decision in smoothed.items():
        inverse = Scaling(axis="columns", factor=Vector(kind="inverse", of=[module]))
        found[decision.module] = Smoothing([inverse], Vector(kind="rounded", of=[module]))
    for module, decision in smoothed.items():
        before = _linear_before(module, decision, smoothed, tensors, model_type)
        if before is not None:
            _fold_into_linear(module, decision, before, tensors, found)
    for group in {fused_siblings(module) for module in smoothed}:
        if len(group) > 1:
            _unite(group, smoothed, tensors, found, model_type)
    return found


def _check(
    decision: Decision,
    smoothed: Mapping[str, Decision],
    quantized: Set[str],
    statistics: Statistics,
) -> None:
    declared, matrix, module = decision.declared, decision.matrix, decision.module
    assert declared is not None
    assert matrix is not None
    vector = statistics.vectors[f"{module}.{PRE_QUANT_SCALE}"]
    problem = ""
    if not declared.specs("smoothing"):
        problem = f"{declared.name} has no tensor to undo it"
    elif decision.tensor.dtype != "BF16":
        problem = f"smoothing is defined for BF16 weights, this one is {decision.tensor.dtype}"
    elif (vector.dtype, vector.shape) != ("F32", (matrix.columns,)):
        problem = (
            f"expected F32 [{matrix.columns}], one number per column of the weight, found "
            f"{vector.dtype} {list(vector.shape)}"
        )
    else:
        group = fused_siblings(module)
        apart = [name for name in group if name in quantized and name not in smoothed]
        if apart:
            problem = f"{some(apart)} read the same input and have none"
    if problem:
        raise ConvertError(f"{vector.file}::{vector.name}: {problem}")


def _linear_before(
    module: str,
    decision: Decision,
    smoothed: Mapping[str, Decision],
    tensors: Mapping[str, Decision],
    model_type: str | None,
) -> Decision | None:
    """Return the linear whose rows can take in the smoothing of `module`, if any."""
    declared = decision.declared
    parent, _, leaf = module.rpartition(".")
    before = smoothed.get(f"{parent}.{LINEAR_BEFORE.get(leaf, '')}")
    if declared is None or "linear" not in declared.folds_into or model_type not in LINEAR_TYPES:
        return None
    if before is None or before.matrix is None or decision.matrix is None:
        return None
    # under grouped-query attention each row of v feeds several columns of o
    if before.matrix.rows != decision.matrix.columns:
        return None
    bias = tensors.get(f"{before.module}.bias")
    return before if bias is None or _is_vector(bias, before.matrix.rows) else None


def _fold_into_linear(
    module: str,
    decision: Decision,
    before: Decision,
    tensors: Mapping[str, Decision],
    found: dict[str, Smoothing],
) -> None:
    own = Vector(kind="rounded", of=[module])
    found[decision.module] = replace(found[decision.module], written=None)
    earlier = found[before.module]
    rows = Scaling(axis="rows", factor=own)
    found[before.module] = replace(earlier, scalings=[*earlier.scalings, rows])
    bias = f"{before.module}.bias"
    if bias in tensors:
        columns = Scaling(axis="columns", factor=own)
        found[bias] = Smoothing([columns], reason=f"takes in the smoothing of {module}")


def _unite(
    group: tuple[str, ...],
    smoothed: Mapping[str, Decision],
    tensors: Mapping[str, Decision],
    found: dict[str, Smoothing],
    model_type: str | None,
) -> None:
    """Give the members of a group the mean of their smoothing, and that to their norm if it may."""
    members = [name for name in group if name in smoothed]
    if len(members) < 2:
        return
    mean = Vector(kind="mean", of=members)
    norm = _norm_before(members, smoothed, tensors, model_type)
    for name in members:
        to_mean = Scaling(axis="columns", factor=Vector(kind="rounded", of=[name]), divisor=mean)
        found[name] = Smoothing(
            [*found[name].scalings, to_mean], None if norm is not None else mean
        )
    if norm is not None:
        reason = f"takes in the smoothing of {', '.join(members)}"
        found[norm] = Smoothing([Scaling(axis="columns", factor=mean)], reason=reason)


def _norm_before(
    members: list[str],
    smoothed: Mapping[str, Decision],
    tensors: Mapping[str, Decision],
    model_type: str | None,
) -> str | None:
    """Return the norm tensor that feeds `members` and nothing else, None if there is none."""
    if model_type not in NORM_TYPES or experts_of(members[0]):
        return None
    formats = [smoothed[name].declared for name in members]
    if not all(declared and "norm" in declared.folds_into for declared in formats):
        return None
    for norm, readers in NORM_READERS.items():
        layer = members[0].removesuffix(f".{readers[0]}")
        if members == [f"{layer}.{reader}" for reader in readers]:
            name = f"{layer}.{norm}.weight"
            kept, matrix = tensors.get(name), smoothed[members[0]].matrix
            if kept is None or matrix is None or not _is_vector(kept, matrix.columns):
                return None
            return name if kept.tensor.dtype == "BF16" else None
    return None


def _is_vector(decision: Decision, size: int) -> bool:
    """Return whether a tensor has one number for each of `size` rows or columns."""
    return decision.tensor.shape == (size,) and decision.tensor.dtype in HIGH_PRECISION


class Vectors:
    """The numbers that vectors of a plan stand for, read from the statistics. Thread safe."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._resolve = lru_cache(_NUM_CACHED)(self._compute)

    @property
    def stored_tensors(self) -> Mapping[str, Stored]:
        """Where the tensors lie that the numbers are read from."""
        return self._statistics.vectors

    def numbers(self, vector: Vector) -> "F32":
        """Return the numbers of `vector` as float32."""
        return self._resolve(vector.kind, tuple(vector.of))

    def stored(self, name: str) -> bytes:
        """Return the bytes of the tensor `name` of the statistics."""
        found = self._statistics.vectors[name]
        with open(found.file, "rb") as file:
            file.seek(found.offset)
            data = file.read(found.nbytes)
        if len(data) != found.nbytes:
            raise ConvertError(f"{found.file}::{name}: the file changed after its header was read")
        return data

    def bf16(self, vector: Vector) -> bytes:
        """Return the numbers of `vector`, which are bf16 numbers, as BF16 bytes."""
        import numpy as np

        return (self.numbers(vector).view(np.uint32) >> 16).astype("<u2").tobytes()

    def _compute(self, kind: str, of: tuple[str, ...]) -> "F32":
        import numpy as np

        scales = [self._scale(module) for module in of]
        if kind == "inverse":
            return np.float32(1.0) / scales[0]
        total = _to_bf16(scales[0])
        if kind == "mean":
            for scale in scales[1:]:
                total = total + _to_bf16(scale)
            total = _to_bf16(total / np.float32(len(scales)))
        return total

    def _scale(self, module: str) -> "F32":
        import numpy as np

        name = f"{module}.{PRE_QUANT_SCALE}"
        scale = np.frombuffer(self.stored(name), "<f4")
        # beyond, the inverse or the sum of siblings is no finite f32 number
        if not ((scale >= 2.0**-126) & (scale <= 2.0**126)).all():
            file = self._statistics.vectors[name].file
            raise ConvertError(
                f"{file}::{name}: expected finite numbers above 0, from 2^-126 to 2^126"
            )
        return scale


def _to_bf16(x: "F32") -> "F32":
    """Return finite numbers rounded to bf16, nearest even, as float32."""
    import numpy as np

    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
