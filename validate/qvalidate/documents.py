"""The two places that say how a checkpoint is quantized, read into one shape.

    config.json           quantization_config {quant_method, quant_algo, ignore, ...}       flat
    hf_quant_config.json  {producer, quantization {quant_algo, exclude_modules, ...}}       nested

The nested form is legal inside config.json too. Nothing is filled in or corrected here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from qschema.strict import Json

HF_QUANT_CONFIG = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"


@dataclass(frozen=True)
class QuantConfig:
    """One quantization config. `root` is the JSON path of the object in `file`."""

    file: str
    root: str
    raw: Mapping[str, Json]

    @property
    def is_nested(self) -> bool:
        return isinstance(self.raw.get("quantization"), dict)

    @property
    def body(self) -> Mapping[str, Json]:
        """The object that holds quant_algo."""
        nested = self.raw.get("quantization")
        return nested if isinstance(nested, dict) else self.raw

    @property
    def algo(self) -> str | None:
        found = self.body.get("quant_algo")
        return found if isinstance(found, str) and found else None

    @property
    def exclude_key(self) -> str:
        """The key that lists the modules left alone."""
        if self.is_nested or ("ignore" not in self.raw and "exclude_modules" in self.raw):
            return "exclude_modules"
        return "ignore"

    @property
    def exclude(self) -> tuple[str, ...]:
        found = self.body.get(self.exclude_key)
        if not isinstance(found, list):
            return ()
        return tuple(pattern for pattern in found if isinstance(pattern, str))

    @property
    def is_mixed(self) -> bool:
        """Whether it lists the quantized layers, so that what it does not name is unquantized."""
        return bool(self.body.get("quantized_layers")) or (self.algo or "").upper() == MIXED

    @property
    def layers(self) -> Mapping[str, str]:
        """Module -> quant_algo of a mixed checkpoint, "" where the entry names none."""
        found = self.body.get("quantized_layers")
        entries = found.items() if isinstance(found, dict) else ()
        return {
            name: _text(entry.get("quant_algo")) for name, entry in entries if _is_object(entry)
        }

    @property
    def entries(self) -> Iterator[tuple[str, str, Mapping[str, Json]]]:
        """(JSON path, quant_algo, object) of everything that names an algorithm and its fields."""
        yield self.where("")[:-1], self.algo or "", self.body
        found = self.body.get("quantized_layers")
        for name, entry in found.items() if isinstance(found, dict) else ():
            if _is_object(entry):
                yield (
                    f"{self.where('quantized_layers')}.{name}",
                    _text(entry.get("quant_algo")),
                    entry,
                )

    @property
    def kv_algo(self) -> str | None:
        """How the KV cache is quantized, None if it is not; a flat kv_cache_scheme is "FP8"."""
        found = self.body.get("kv_cache_quant_algo") or self.raw.get("kv_cache_scheme")
        return found if isinstance(found, str) else "FP8" if found else None

    @property
    def method(self) -> str | None:
        """The `quant_method`, or `modelopt` where a nested config's producer implies it."""
        found = self.raw.get("quant_method")
        if isinstance(found, str):
            return found
        producer = self.raw.get("producer")
        name = producer.get("name") if isinstance(producer, dict) else None
        return "modelopt" if self.is_nested and name == "modelopt" else None

    def where(self, key: str) -> str:
        """Return the JSON path of `key`."""
        middle = (
            ".quantization" if self.is_nested and key not in ("quant_method", "producer") else ""
        )
        return f"{self.root}{middle}.{key}"


def _is_object(value: Json) -> TypeGuard[dict[str, Json]]:
    return isinstance(value, dict)


def _text(value: Json) -> str:
    return value if isinstance(value, str) else ""
