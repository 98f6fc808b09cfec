"""What AWQ and SmoothQuant took out of each weight, so that it can be compared. Needs numpy.

A smoothed weight w / p is stored; where p went tells how to compare:

    pre_quant_scale of the module   p itself
    the norm before it              p is the stored norm over the source's
    the Linear before it            up_proj's rows have down_proj's p, v_proj's rows o_proj's: the
                                    factors are fitted to up_proj and then hold for down_proj,
                                    whose columns are asked only where a row does not tell

Source: ModelOpt 0.47.0 export/quant_utils.py:1300-1562.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qschema.architectures import LINEAR_BEFORE
from qschema.dtypes import HIGH_PRECISION
from qschema.safetensors import Stored
from qvalidate.context import Context, Module
from qvalidate.decode import read, widen
from qvalidate.layout import as_declared, sizes
from qvalidate.pairs import Pair, Smoothing, fit_columns, fit_rows
from qvalidate.sources import Origin

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

_LAYER = re.compile(r"(?P<layer>.*\blayers\.\d+)\.(?P<parent>.*)\.(?P<leaf>[^.]+)")
# leaf -> the norms that may come before it, the first that is there; below the layer or the parent
_NORMS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"),
        ("{layer}.input_layernorm",),
    ),
    **dict.fromkeys(
        ("gate_proj", "up_proj", "gate_up_proj"),
        ("{layer}.pre_feedforward_layernorm", "{layer}.post_attention_layernorm"),
    ),
    "q_b_proj": ("{layer}.{parent}.q_a_layernorm",),
    "kv_b_proj": ("{layer}.{parent}.kv_a_layernorm",),
}
# leaf -> the Linear after it, whose smoothing its rows may have taken in
_LINEAR_AFTER = {before: leaf for leaf, before in LINEAR_BEFORE.items()}
# norms that multiply with 1 + weight
_OFFSET = "gemma"


class UnknownSmoothingError(ValueError):
    """The weight was smoothed by what the two checkpoints do not tell."""


@dataclass(frozen=True)
class Smoothings:
    """What was taken out of the weights of `context`, by comparing with `source`."""

    context: Context
    source: Origin

    def of(self, module: Module, pair: Pair) -> Smoothing | None:
        """Return what was taken out of the weight of `module`, None in formats without smoothing.

        Raises UnknownSmoothingError if it can't be told.
        """
        spec = next(iter(pair.declared.specs("smoothing")), None)
        if spec is None:
            return None
        parent, _, leaf = module.name.rpartition(".")
        columns = self._columns(module, spec.suffix)
        before = self.context.quantized.get(f"{parent}.{LINEAR_BEFORE.get(leaf)}")
        if columns is None and before is not None:
            columns = self._fitted(before, module, pair, spec.suffix)
        if columns is not None and len(columns) != pair.columns:
            raise UnknownSmoothingError(f"found {len(columns)} factors for {pair.columns} columns")
        after = self.context.quantized.get(f"{parent}.{_LINEAR_AFTER.get(leaf)}")
        if after is None or not self._may_fold(module, after, spec.suffix):
            return Smoothing(columns=columns)
        fit = fit_rows(Pair(pair.weight, pair.outputs, pair.declared, Smoothing(columns)))
        return Smoothing(columns=columns, rows=fit.factors)

    @cached_property
    def folded(self) -> Mapping[str, tuple[str, ...]]:
        """Norm's weight -> the modules whose smoothing it has taken in."""
        found: dict[str, list[str]] = {}
        for module, declared in self.context.encoded:
            spec = next(iter(declared.specs("smoothing")), None)
            norm = self._norm(module) if spec and spec.suffix not in module.tensors else None
            if norm is not None and self._differs(norm):
                found.setdefault(norm, []).append(module.name)
        return {norm: tuple(modules) for norm, modules in found.items()}

    @cached_property
    def _is_seen(self) -> bool:
        """Whether anything here was smoothed at all."""
        return bool(self.folded) or any(
            spec.suffix in module.tensors
            for module, declared in self.context.encoded
            for spec in declared.specs("smoothing")
        )

    def _columns(self, module: Module, suffix: str) -> "F32 | None":
        stored = module.tensors.get(suffix)
        if stored is not None:
            return _positive(_values(stored), stored.name)
        norm = self._norm(module)
        if norm not in self.folded or norm is None:
            return None
        import numpy as np

        offset = np.float32((self.context.model_type or "").startswith(_OFFSET))
        here = _values(self.context.checkpoint.tensors[norm]) + offset
        with np.errstate(all="ignore"):
            ratio: F32 = here / (_values(self.source.tensors[norm]) + offset)
        return _positive(ratio, norm)

    def _may_fold(self, before: Module, after: Module, suffix: str) -> bool:
        """Whether the rows of `before` may have taken in the smoothing of `after`."""
        if before.declared is not after.declared or suffix in after.tensors or not self._is_seen:
            return False
        rows = self.source.tensors.get(before.weight_name)
        columns = self.source.tensors.get(after.weight_name)
        if rows is None or columns is None or before.declared is None:
            return False
        is_pair = len(columns.shape) == 2 and rows.shape[:1] == columns.shape[1:]
        return is_pair and sizes(before, before.declared) == rows.shape

    def _fitted(self, before: Module, after: Module, pair: Pair, suffix: str) -> "F32 | None":
        """Return the factors that the rows of `before` have taken in, None if they can't have.

        Where a row does not tell, being zeros or too small for its codes, the column of `after`
        does, which is `pair`.
        """
        import numpy as np

        declared = before.declared
        if declared is None or not self._may_fold(before, after, suffix):
            return None
        outputs = as_declared(before, declared)
        if outputs is None:
            raise UnknownSmoothingError(f"{before.name}, which holds the smoothing, is malformed")
        smoothing = Smoothing(self._columns(before, suffix))
        weight = self.source.tensors[before.weight_name]
        fit = fit_rows(Pair(weight, outputs, declared, smoothing))
        if fit.is_sure.all():
            return fit.factors
        own = fit_columns(Pair(pair.weight, pair.outputs, pair.declared))
        return np.where(fit.is_sure, fit.factors, 1 / own.factors)

    def _norm(self, module: Module) -> str | None:
        match = _LAYER.fullmatch(module.name)
        for pattern in _NORMS.get(match["leaf"], ()) if match else ():
            name = f"{pattern.format(**match.groupdict())}.weight" if match else ""
            if name in self.context.checkpoint.tensors:
                return name
        return None

    def _differs(self, norm: str) -> bool:
        stored, original = self.context.checkpoint.tensors[norm], self.source.tensors.get(norm)
        if original is None or (stored.dtype, stored.shape) != (original.dtype, original.shape):
            return False
        if stored.dtype not in HIGH_PRECISION:
            return False
        return read(stored, 0, stored.nbytes) != read(original, 0, original.nbytes)


def _values(stored: Stored) -> "F32":
    return widen(read(stored, 0, stored.nbytes), stored.dtype)


def _positive(values: "F32", name: str) -> "F32":
    import numpy as np

    if not (np.isfinite(values) & (values > 0)).all():
        raise UnknownSmoothingError(
            f"what {name} tells of the smoothing is not positive everywhere"
        )
    return values
