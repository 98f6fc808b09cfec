"""What the rules look at: one quantized checkpoint, its tensors grouped by module, no weights.

A `Context` is a value. Rules only read it; the one thing it reads from disk after loading is the
bytes of the scale tensors, once, when a rule first asks for them.
"""

import re
from collections.abc import Iterator, Mapping
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
from qvalidate.assignment import Assignment
from qvalidate.documents import QuantConfig
from qvalidate.scales import Scale, ScaleRole, all_stats
from qvalidate.targets import ONE_GPU, Deployment

LM_HEAD = "lm_head"
KV_SCALES = frozenset({"k_scale", "v_scale"})
# how transformers and the engines call the dialects that are not ModelOpt's
_OTHER_DIALECTS = frozenset(
    {
        "aqlm",
        "auto-round",
        "awq",
        "bitsandbytes",
        "compressed-tensors",
        "eetq",
        "fbgemm_fp8",
        "fp8",
        "gguf",
        "gptq",
        "higgs",
        "hqq",
        "mxfp4",
        "mxfp8",
        "nvfp4",
        "quanto",
        "quark",
        "torchao",
        "w4afp8",
        "w8a8_int8",
    }
)
# keep_reason() of modules that are no Linear, so that no list needs to name them
_NO_LINEAR = frozenset({"embedding", "norm"})


@dataclass(frozen=True)
class Module:
    """One module by its checkpoint name, with the tensors it owns by their last name.

    `declared` is the format that the obeyed config gives it. A stack holds all experts of a layer:
    it is named like its codes, which count as its `weight`.
    """

    name: str
    tensors: Mapping[str, Stored]
    declared: Format | None = None
    is_stack: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether its weight is stored as codes, which is anything but a 16- or 32-bit float."""
        weight = self.tensors.get("weight")
        return weight is not None and weight.dtype not in HIGH_PRECISION

    @property
    def file(self) -> str:
        """The file of its weight, or of any tensor it has."""
        return str(self.tensors.get("weight", next(iter(self.tensors.values()))).file)

    @property
    def weight_name(self) -> str:
        """The name of the tensor that holds its weight."""
        return self.tensor_name("weight")

    def tensor_name(self, suffix: str) -> str:
        """Return what its tensor `suffix` is called, whether it is there or not."""
        if self.is_stack:
            return self.name if suffix == "weight" else f"{self.name}_{suffix}"
        return f"{self.name}.{suffix}" if self.name else suffix

    def codes(self, declared: Format) -> Stored | None:
        """Return the tensor that holds its codes in the format `declared`."""
        return self.tensors.get(codes_spec(declared).suffix)


@dataclass(frozen=True)
class Context:
    """One checkpoint as the rules see it.

    `obeyed` is the quantization config that engines follow: config.json's `quantization_config`,
    and hf_quant_config.json only without it. `assignment` says which formats it names.
    """

    checkpoint: Checkpoint
    in_config: QuantConfig | None
    in_file: QuantConfig | None
    assignment: Assignment
    modules: Mapping[str, Module]
    # how it is to be deployed; rules about that say nothing about one GPU of no known kind
    deployment: Deployment = ONE_GPU

    @property
    def obeyed(self) -> QuantConfig | None:
        return self.in_config or self.in_file

    @property
    def dialect(self) -> str | None:
        """The `quant_method` of another dialect than ModelOpt's, None for that and for no known."""
        method = self.obeyed.method if self.obeyed else None
        return method if method in _OTHER_DIALECTS else None

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
    def encoded(self) -> tuple[tuple[Module, Format], ...]:
        """The quantized modules whose format is known, each with its format."""
        return tuple(
            (module, module.declared)
            for module in self.quantized.values()
            if module.declared is not None
        )

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
            # of a vision part, keep_reason() does not say that it is an embedding
            is_embedding = "embed" in module.rpartition(".")[2]
            reason = keep_reason(module, config=self.checkpoint.config)
            if not is_embedding and reason not in _NO_LINEAR:
                found[module] = stored
        return found

    @cached_property
    def scales(self) -> tuple[Scale, ...]:
        """What the scales beside the quantized weights, and of the KV cache, hold.

        Reads their bytes. Tensors of another dtype than the declared one are left out.
        """
        wanted = [(stored, role) for stored, dtype, role in self._scales() if stored.dtype == dtype]
        return tuple(
            Scale(role=role, stats=stats)
            for (_, role), stats in zip(wanted, all_stats(wanted), strict=True)
            if stats is not None
        )

    @cached_property
    def numbers(self) -> Mapping[str, float]:
        """The scales that are one finite number, by the tensor's name."""
        found = (scale.stats for scale in self.scales)
        return {
            stats.stored.name: stats.minimum
            for stats in found
            if stats.count == 1 and stats.minimum == stats.maximum
        }

    def _scales(self) -> Iterator[tuple[Stored, str, ScaleRole]]:
        for module, declared in self.encoded:
            for spec in declared.tensors:
                stored = module.tensors.get(spec.suffix)
                if stored is not None and spec.role != "codes":
                    yield stored, spec.dtype, spec.role
        for module in self.modules.values():
            for suffix in KV_SCALES & module.tensors.keys():
                yield module.tensors[suffix], "F32", "kv"

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
