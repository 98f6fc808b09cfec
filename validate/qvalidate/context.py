"""What the rules look at: one quantized checkpoint, its tensors grouped by module, no weights.

A `Context` is a value. Rules only read it; the one thing it reads from disk after loading is the
bytes of the scale tensors, once, when a rule first asks for them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import cached_property
from pathlib import Path

from qschema.architectures import has_tied_head, keep_reason, text_config
from qschema.checkpoint import Checkpoint
from qschema.dtypes import HIGH_PRECISION
from qschema.formats import Format, TensorSpec
from qschema.safetensors import Stored
from qschema.strict import Json
from qvalidate.documents import QuantConfig
from qvalidate.scales import ScaleStats, scale_stats

LM_HEAD = "lm_head"
# keep_reason() of modules that are no Linear, so that no list needs to name them
_NO_LINEAR = frozenset({"embedding", "norm"})


@dataclass(frozen=True)
class Module:
    """One module by its checkpoint name, with the tensors it owns by their last name."""

    name: str
    tensors: Mapping[str, Stored]

    @property
    def is_quantized(self) -> bool:
        """Whether its weight is stored as codes, which is anything but a 16- or 32-bit float."""
        weight = self.tensors.get("weight")
        return weight is not None and weight.dtype not in HIGH_PRECISION

    @property
    def file(self) -> str:
        """The file of its weight, or of any tensor it has."""
        return str(self.tensors.get("weight", next(iter(self.tensors.values()))).file)

    def codes(self, declared: Format) -> Stored | None:
        """Return the tensor that holds its codes in the format `declared`."""
        spec = codes_spec(declared)
        return self.tensors.get(spec.suffix)


@dataclass(frozen=True)
class Context:
    """One checkpoint as the rules see it.

    `obeyed` is the quantization config that engines follow: config.json's `quantization_config`,
    and hf_quant_config.json only without it. `declared` is the format it names, None if no format
    is declared under that name.
    """

    checkpoint: Checkpoint
    in_config: QuantConfig | None
    in_file: QuantConfig | None
    declared: Format | None
    modules: Mapping[str, Module]

    @property
    def obeyed(self) -> QuantConfig | None:
        return self.in_config or self.in_file

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def config_file(self) -> str:
        return str(self.path / "config.json")

    @property
    def model_type(self) -> str | None:
        found = self.checkpoint.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def exclude(self) -> tuple[str, ...]:
        """The obeyed list of modules left alone (`ignore`, `exclude_modules`)."""
        return self.obeyed.exclude if self.obeyed else ()

    @property
    def is_tied(self) -> bool:
        """Whether lm_head is the embedding and has no weight of its own."""
        return has_tied_head(self.checkpoint.config)

    @cached_property
    def quantized(self) -> Mapping[str, Module]:
        """The modules whose weight is stored as codes."""
        return {name: module for name, module in self.modules.items() if module.is_quantized}

    @cached_property
    def unquantized(self) -> Mapping[str, Stored]:
        """Module -> weight of every Linear in source precision, stacked experts included."""
        found: dict[str, Stored] = {}
        for name, stored in self.checkpoint.tensors.items():
            owner, _, leaf = name.rpartition(".")
            is_stack = len(stored.shape) == 3 and owner.endswith(".experts")
            is_matrix = len(stored.shape) == 2 and leaf == "weight"
            if stored.dtype not in HIGH_PRECISION or not (is_stack or is_matrix):
                continue
            module = name if is_stack else owner
            if keep_reason(module, config=self.checkpoint.config) not in _NO_LINEAR:
                found[module] = stored
        return found

    @cached_property
    def scales(self) -> Mapping[str, ScaleStats]:
        """What the scale tensors of the quantized modules hold, by name. Reads their bytes."""
        if self.declared is None:
            return {}
        suffixes = [spec.suffix for spec in self.declared.tensors if spec.role == "scale"]
        found = (
            (module.tensors[suffix].name, scale_stats(module.tensors[suffix]))
            for module in self.quantized.values()
            for suffix in suffixes
            if suffix in module.tensors
        )
        return {name: stats for name, stats in found if stats is not None}

    def excluded_by(self, module: str) -> str | None:
        """Return a pattern that names `module` or a module above it, None without one.

        This is what the list says by itself (shell wildcards over the checkpoint's names), which is
        not what every engine makes of it.
        """
        parts = module.split(".")
        for depth in range(len(parts), 0, -1):
            name = ".".join(parts[:depth])
            if name in self._exact:
                return name
            # one expression over all wildcards: almost every name matches none of them
            if self._wild is not None and self._wild.match(name):
                return next(pattern for pattern in self.exclude if fnmatchcase(name, pattern))
        return None

    @cached_property
    def _exact(self) -> frozenset[str]:
        return frozenset(self.exclude)

    @cached_property
    def _wild(self) -> re.Pattern[str] | None:
        wild = [translate(pattern) for pattern in self.exclude if set(pattern) & set("*?[")]
        return re.compile("|".join(wild)) if wild else None


def positive_int(config: Mapping[str, Json], *keys: str) -> int | None:
    """Return the first of `keys` that is a positive whole number in the language model's config."""
    text = text_config(config)
    values = (text.get(key) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), None)


def codes_spec(declared: Format) -> TensorSpec:
    """Return the declaration of the tensor that holds the codes."""
    return next(spec for spec in declared.tensors if spec.role == "codes")


def axes(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (rows, columns) of the Linear whose `spec` has `shape`, None if the rank differs."""
    if len(shape) != len(spec.shape):
        return None
    sizes = {"N": 0, "K": 0}
    for dim, size in zip(spec.shape, shape, strict=True):
        axis, _, divisor = dim.partition("/")
        if axis in sizes:
            sizes[axis] = size * int(divisor or 1)
    return sizes["N"], sizes["K"]
