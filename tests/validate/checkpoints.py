"""Quantized checkpoints for the tests, made from the fixtures by the format declarations alone.

The codes are random bytes and the scales random positive numbers: the rules look at names, dtypes,
shapes and scales, not at what a model would say. Nothing here is the converter's.
"""

import json
import random
import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

from qschema.architectures import keep_reason
from qschema.checkpoint import open_checkpoint
from qschema.formats import Format, TensorSpec, find
from qschema.safetensors import Entry, Stored, layout, read_header

FIXTURES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}

# the two NaN of E4M3 become zero
_NO_NAN = bytes(0 if code & 0x7F == 0x7F else code for code in range(256))

Tensor = tuple[str, tuple[int, ...], bytes]
# format, source weight, all tensors of the source -> suffix -> tensor
Encode = Callable[[Format, Stored, Mapping[str, Stored]], Mapping[str, Tensor]]
MIXED = "MIXED_PRECISION"
ATTENTION_FP8 = {"*self_attn*": "FP8", "*": "NVFP4"}


@dataclass
class Draft:
    """A checkpoint in memory: faults are planted here, then `write` puts it on disk."""

    config: dict[str, object]
    hf_quant_config: dict[str, object]
    # shard -> name -> (dtype, shape, bytes)
    shards: dict[str, dict[str, Tensor]]
    index: str | None
    # relative name -> bytes
    files: dict[str, bytes] = field(default_factory=dict)
    unindexed: set[str] = field(default_factory=set)
    total_size: int | None = None

    @property
    def quantization(self) -> dict[str, object]:
        found = self.config["quantization_config"]
        assert isinstance(found, dict)
        return found

    @property
    def nested(self) -> dict[str, object]:
        found = self.hf_quant_config["quantization"]
        assert isinstance(found, dict)
        return found

    def each_config(self) -> tuple[dict[str, object], dict[str, object]]:
        """Return the flat and the nested object that hold quant_algo."""
        return self.quantization, self.nested

    @property
    def exclude(self) -> list[str]:
        found = self.quantization["ignore"]
        assert isinstance(found, list)
        return found

    def set_exclude(self, patterns: list[str]) -> None:
        """Set the list in both documents."""
        self.quantization["ignore"] = list(patterns)
        self.nested["exclude_modules"] = list(patterns)

    def shard_of(self, name: str) -> str:
        return next(shard for shard, tensors in self.shards.items() if name in tensors)

    def tensor(self, name: str) -> Tensor:
        return self.shards[self.shard_of(name)][name]

    def put(self, name: str, tensor: Tensor, *, beside: str | None = None) -> None:
        """Set the tensor `name`; a new one goes into the shard of the tensor `beside`."""
        self.shards[self.shard_of(beside or name)][name] = tensor

    def pop(self, name: str) -> Tensor:
        return self.shards[self.shard_of(name)].pop(name)

    def pop_module(self, module: str) -> None:
        """Remove all tensors of `module` and of what lies below it."""
        for tensors in self.shards.values():
            for name in [name for name in tensors if name.startswith(f"{module}.")]:
                del tensors[name]

    def dequantize(self, module: str) -> None:
        """Make `module` an unquantized bf16 Linear, without its scale."""
        _, shape, _ = self.tensor(f"{module}.weight")
        self.put(f"{module}.weight", ("BF16", shape, bytes(2 * prod(shape))))
        self.pop(f"{module}.weight_scale")

    def quantize_cache(self, algo: str) -> None:
        """Say in both documents that the KV cache is quantized, and give every layer its scales."""
        scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
        self.quantization["kv_cache_scheme"] = scheme if algo == "FP8" else algo
        self.nested["kv_cache_quant_algo"] = algo
        suffixes = ("scale", "bias") if algo == "NVFP4_AFFINE" else ("scale",)
        for tensors in self.shards.values():
            for name in [
                name for name in tensors if name.endswith(("k_proj.weight", "v_proj.weight"))
            ]:
                module, letter = name.removesuffix(".weight"), name.removesuffix("_proj.weight")[-1]
                for suffix in suffixes:
                    made: Tensor = ("F32", (), f32(0.25))
                    if suffix == "bias":
                        made = ("BF16", (1, 2, 1, 64), bytes(2 * 128))
                    tensors[f"{module}.{letter}_{suffix}"] = made

    def stack_experts(self, declared: Format) -> None:
        """Replace the experts of every layer by two stacks [E, K, N] of four experts each."""
        owners = {
            name.partition(".experts.")[0]: shard
            for shard, tensors in self.shards.items()
            for name in tensors
            if ".experts." in name
        }
        for owner, shard in owners.items():
            self.pop_module(f"{owner}.experts")
            for leaf, shape in (("gate_up_proj", (256, 256)), ("down_proj", (256, 128))):
                name = f"{owner}.experts.{leaf}"
                self.shards[shard].update(stacked(name, declared, shape, experts=4))

    def dequantize_all(self) -> None:
        for tensors in list(self.shards.values()):
            for name in [name for name in tensors if name.endswith(".weight_scale")]:
                self.dequantize(name.removesuffix(".weight_scale"))

    def quantize(self, module: str, declared: Format) -> None:
        """Make the unquantized Linear `module` a quantized one."""
        _, shape, _ = self.tensor(f"{module}.weight")
        for suffix, tensor in quantized(declared, shape, seed=module).items():
            self.put(f"{module}.{suffix}", tensor, beside=f"{module}.weight")

    def write(self, path: Path) -> Path:
        path.mkdir()
        weight_map: dict[str, str] = {}
        for shard, tensors in self.shards.items():
            write_safetensors(path / shard, tensors)
            weight_map |= {name: shard for name in tensors if name not in self.unindexed}
        if self.index:
            total = sum(
                len(data) for shard in self.shards.values() for _, _, data in shard.values()
            )
            size = total if self.total_size is None else self.total_size
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (path / self.index).write_text(json.dumps(index))
        (path / "config.json").write_text(json.dumps(self.config))
        if self.hf_quant_config:
            (path / "hf_quant_config.json").write_text(json.dumps(self.hf_quant_config))
        for name, data in self.files.items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(data)
        return path


def draft(
    model: str,
    algo: str | Mapping[str, str],
    *,
    also_keep: tuple[str, ...] = (),
    encode: Encode | None = None,
) -> Draft:
    """Return the right quantized checkpoint of the fixture `model`.

    algo: a format, MIXED for `ATTENTION_FP8`, or pattern -> format of a mixed checkpoint.
    `also_keep` are patterns of modules that stay unquantized, beside the default ones and those of
    sizes that the format can't have. `encode` makes the tensors of a weight, random ones without.
    """
    source = open_checkpoint(FIXTURES / model)
    rules = ATTENTION_FP8 if algo == MIXED else algo if isinstance(algo, Mapping) else {"*": algo}
    is_mixed = algo == MIXED or isinstance(algo, Mapping)
    shards: dict[str, dict[str, Tensor]] = {shard.file.name: {} for shard in source.shards}
    kept, layers = {"lm_head"}, dict[str, Format]()
    for name, stored in source.tensors.items():
        target, module = shards[stored.file.name], name.removesuffix(".weight")
        declared = _format(module, rules, also_keep) if len(stored.shape) == 2 else None
        if (
            declared is None
            or keep_reason(module, config=source.config)
            or _misfits(declared, stored)
        ):
            target[name] = (stored.dtype, stored.shape, bytes_of(stored))
            kept |= {module} if len(stored.shape) == 2 else set()
            continue
        layers[module] = declared
        tensors = (encode or _random)(declared, stored, source.tensors)
        target.update({f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()})
    made = Draft(
        config={**source.config, "quantization_config": {"ignore": sorted(kept)}},
        hf_quant_config={"producer": PRODUCER, "quantization": {}},
        shards=shards,
        index=source.index,
    )
    _describe(made, layers, whole=None if is_mixed else find(str(algo)))
    made.files = {
        name: (source.path / name).read_bytes()
        for name in source.files
        if name not in ("config.json", source.index)
    }
    return made


def _describe(made: Draft, layers: Mapping[str, Format], *, whole: Format | None) -> None:
    """Fill in both documents: what is in `layers` is quantized, all of it in the format `whole`."""
    algo = whole.spelling if whole else MIXED
    listed = {} if whole else {"quantized_layers": _listed(layers)}
    exclude = made.exclude if whole else []
    made.config["quantization_config"] = {
        **listed,
        "ignore": exclude,
        "quant_algo": algo,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    made.hf_quant_config["quantization"] = {
        "quant_algo": algo,
        "kv_cache_quant_algo": None,
        **(whole.hf_quant_fields if whole else {}),
        **({"exclude_modules": exclude} if whole else listed),
    }


def _listed(layers: Mapping[str, Format]) -> dict[str, dict[str, object]]:
    """Return quantized_layers as ModelOpt writes it: one entry for all experts of a layer."""
    found: dict[str, dict[str, object]] = {}
    for module, declared in layers.items():
        experts, dot, _ = module.partition(".experts.")
        name = f"{experts}.experts" if dot else module
        found[name] = {"quant_algo": declared.spelling, **declared.hf_quant_fields}
    return found


def _format(module: str, rules: Mapping[str, str], keep: tuple[str, ...]) -> Format | None:
    if any(fnmatchcase(module, pattern) for pattern in keep):
        return None
    found = (algo for pattern, algo in rules.items() if fnmatchcase(module, pattern))
    algo = next(found, None)
    return find(algo) if algo else None


def _misfits(declared: Format, stored: Stored) -> bool:
    rows, columns = stored.shape
    return declared.obstacle(rows=rows, columns=columns, dtype=stored.dtype) is not None


def _random(
    declared: Format, stored: Stored, tensors: Mapping[str, Stored]
) -> Mapping[str, Tensor]:
    return quantized(declared, stored.shape, seed=stored.name)


def quantized(declared: Format, shape: tuple[int, ...], *, seed: str) -> Mapping[str, Tensor]:
    """Return suffix -> tensor of a Linear of `shape`: random codes, scales near 1e-4.

    What siblings share is the same number everywhere.
    """
    generator = random.Random(seed)
    rows, columns = shape
    outputs = declared.outputs(rows=rows, columns=columns)
    return {
        spec.suffix: (
            *outputs[spec.suffix],
            _values(spec, prod(outputs[spec.suffix][1]), generator),
        )
        for spec in declared.tensors
        if spec.suffix in outputs
    }


def stacked(
    name: str, declared: Format, shape: tuple[int, ...], *, experts: int
) -> dict[str, Tensor]:
    """Return the tensors of a stack of experts, Linears of `shape` each; the numbers are random."""
    made: dict[str, Tensor] = {}
    for suffix, (dtype, one, data) in quantized(declared, shape, seed=name).items():
        full = (experts, *reversed(one)) if one else one
        made[name if suffix == "weight" else f"{name}_{suffix}"] = (
            dtype,
            full,
            data * (experts if one else 1),
        )
    return made


def _values(spec: TensorSpec, count: int, generator: random.Random) -> bytes:
    if spec.role in ("global", "input"):
        return f32(1.5e-4)
    if spec.dtype == "F32":
        return f32(*(generator.uniform(1e-4, 2e-4) for _ in range(count)))
    if spec.role == "scale":
        # E4M3 numbers from 0.5 to 60, powers of two from 2^-27 to 2^-8
        return bytes(
            generator.choices(range(48, 104) if spec.dtype != "U8" else range(100, 120), k=count)
        )
    data = generator.randbytes(count)
    return data.translate(_NO_NAN) if spec.dtype == "F8_E4M3" else data


def bytes_of(stored: Stored) -> bytes:
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        return file.read(stored.nbytes)


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def scales_of(tensor: Tensor) -> "array[float]":
    return array("f", tensor[2])


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    entries = [Entry(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    opening, spans = layout(entries, metadata={"format": "pt"})
    with open(path, "wb") as file:
        file.write(opening)
        for name, (offset, _) in sorted(spans.items(), key=lambda item: item[1]):
            file.seek(offset)
            file.write(tensors[name][2])
    read_header(path)
