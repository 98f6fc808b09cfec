"""Quantized checkpoints for the tests, made from the fixtures by the format declarations alone.

The codes are random bytes and the scales random positive numbers: the rules look at names, dtypes,
shapes and scales, not at what a model would say. Nothing here is the converter's.
"""

import json
import random
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

from qschema.architectures import keep_reason
from qschema.checkpoint import open_checkpoint
from qschema.formats import Format, find
from qschema.safetensors import Entry, layout, read_header

FIXTURES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
PRODUCER = {"name": "modelopt", "version": "0.47.0"}

# the two NaN of E4M3 become zero
_NO_NAN = bytes(0 if code & 0x7F == 0x7F else code for code in range(256))

Tensor = tuple[str, tuple[int, ...], bytes]


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
    def exclude(self) -> list[str]:
        found = self.quantization["ignore"]
        assert isinstance(found, list)
        return found

    def set_exclude(self, patterns: list[str]) -> None:
        """Set the list in both documents."""
        self.quantization["ignore"] = list(patterns)
        nested = self.hf_quant_config["quantization"]
        assert isinstance(nested, dict)
        nested["exclude_modules"] = list(patterns)

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


def draft(model: str, algo: str, *, also_keep: tuple[str, ...] = ()) -> Draft:
    """Return the right quantized checkpoint of the fixture `model`.

    `also_keep` are patterns of modules that stay unquantized, beside the default ones.
    """
    source = open_checkpoint(FIXTURES / model)
    declared = find(algo)
    shards: dict[str, dict[str, Tensor]] = {shard.file.name: {} for shard in source.shards}
    kept = ["lm_head"]
    for name, stored in source.tensors.items():
        target = shards[stored.file.name]
        data = stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]
        module = name.removesuffix(".weight")
        is_kept = keep_reason(module, config=source.config) is not None or any(
            fnmatchcase(module, pattern) for pattern in also_keep
        )
        if len(stored.shape) != 2 or is_kept:
            target[name] = (stored.dtype, stored.shape, data)
            kept += [module] if len(stored.shape) == 2 else []
            continue
        for suffix, tensor in quantized(declared, stored.shape, seed=name).items():
            target[f"{module}.{suffix}"] = tensor
    exclude = sorted(set(kept))
    made = Draft(
        config={
            **source.config,
            "quantization_config": {
                "ignore": exclude,
                "quant_algo": declared.spelling,
                "producer": PRODUCER,
                "quant_method": "modelopt",
            },
        },
        hf_quant_config={
            "producer": PRODUCER,
            "quantization": {
                "quant_algo": declared.spelling,
                "kv_cache_quant_algo": None,
                "exclude_modules": exclude,
            },
        },
        shards=shards,
        index=source.index,
    )
    made.files = {
        name: (source.path / name).read_bytes()
        for name in source.files
        if name not in ("config.json", source.index)
    }
    return made


def quantized(declared: Format, shape: tuple[int, ...], *, seed: str) -> Mapping[str, Tensor]:
    """Return suffix -> tensor of a Linear of `shape`: random codes, scales in [1e-4, 2e-4]."""
    generator = random.Random(seed)
    rows, columns = shape
    made: dict[str, Tensor] = {}
    for suffix, (dtype, out) in declared.outputs(rows=rows, columns=columns).items():
        count = prod(out)
        if dtype == "F32":
            scales = (generator.uniform(1e-4, 2e-4) for _ in range(count))
            made[suffix] = (dtype, out, f32(*scales))
        else:
            assert dtype == "F8_E4M3"
            made[suffix] = (dtype, out, generator.randbytes(count).translate(_NO_NAN))
    return made


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
