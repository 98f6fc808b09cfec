"""`quantization_config` in config.json: one module per dialect, told apart by `quant_method`.

A method that no module here describes (awq, gptq, bitsandbytes, ...) is not checked: that is a
note, not an error. Spellings of known methods in another case are errors, since transformers
5.23.0 (utils/quantization_config.py:43-69) compares them exactly. ModelOpt's nested form is taken
here too: vLLM 0.32.0 transformers_utils/model_arch_config_convertor.py:262-290.
"""

from typing import Annotated, TypeAlias

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag

from qschema.hf_quant_config import HfQuantConfig
from qschema.quantization_config.compressed_tensors import CompressedTensorsConfig
from qschema.quantization_config.fp8 import Fp8Config
from qschema.quantization_config.fp8_modelopt import Fp8WithExpertsConfig
from qschema.quantization_config.modelopt import FlatModelOptConfig
from qschema.quantization_config.mxfp4 import Mxfp4Config
from qschema.strict import Finding, Verbatim, json_path

__all__ = [
    "CompressedTensorsConfig",
    "FlatModelOptConfig",
    "Fp8Config",
    "Fp8WithExpertsConfig",
    "ModelConfig",
    "Mxfp4Config",
    "OtherConfig",
    "QuantizationConfig",
]


class OtherConfig(Verbatim):
    """A method that is not described here; its other keys are taken as they are."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    quant_method: str = Field(
        json_schema_extra={
            "not": {"pattern": "^(modelopt.*|fp8|mxfp4|compressed[-_]tensors)$"},
            "minLength": 1,
        }
    )


_TAGS: dict[type[Verbatim], str] = {
    FlatModelOptConfig: "(modelopt)",
    HfQuantConfig: "(modelopt nested)",
    Fp8Config: "(fp8)",
    Fp8WithExpertsConfig: "(fp8 with experts)",
    CompressedTensorsConfig: "(compressed-tensors)",
    Mxfp4Config: "(mxfp4)",
    OtherConfig: "(other)",
}


def _dialect(value: object) -> str | None:
    if isinstance(value, Verbatim):
        return _TAGS[type(value)]
    if not isinstance(value, dict):
        return None
    if "quantization" in value:
        return _TAGS[HfQuantConfig]
    method = value.get("quant_method")
    if not isinstance(method, str) or not method:
        return None
    folded = method.lower().replace("_", "-")
    if folded.startswith("modelopt"):
        return _TAGS[FlatModelOptConfig]
    if folded == "fp8" and "moe_quant_algo" in value:
        return _TAGS[Fp8WithExpertsConfig]
    known = {tag.strip("()"): tag for tag in _TAGS.values()}
    return known.get(folded, _TAGS[OtherConfig])


QuantizationConfig: TypeAlias = Annotated[
    Annotated[FlatModelOptConfig, Tag("(modelopt)")]
    | Annotated[HfQuantConfig, Tag("(modelopt nested)")]
    | Annotated[Fp8Config, Tag("(fp8)")]
    | Annotated[Fp8WithExpertsConfig, Tag("(fp8 with experts)")]
    | Annotated[CompressedTensorsConfig, Tag("(compressed-tensors)")]
    | Annotated[Mxfp4Config, Tag("(mxfp4)")]
    | Annotated[OtherConfig, Tag("(other)")],
    Discriminator(
        _dialect,
        custom_error_type="quant_method_missing",
        custom_error_message="Expected an object with a quant_method; engines take the checkpoint "
        "for unquantized without one",
    ),
]


class TextConfig(Verbatim):
    """The language model's part of a multimodal config.json."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    quantization_config: QuantizationConfig | None = None


class ModelConfig(Verbatim):
    """config.json: its quantization is checked strictly, everything else is the model's own."""

    # protected_namespaces: older pydantic warns about `model_type`
    model_config = ConfigDict(extra="allow", protected_namespaces=())
    __pydantic_extra__: dict[str, JsonValue]

    architectures: list[str] | None = None
    model_type: str | None = None
    quantization_config: QuantizationConfig | None = None
    # an older name for compressed-tensors: vLLM 0.32.0 model_arch_config_convertor.py:265
    compression_config: QuantizationConfig | None = None
    text_config: TextConfig | None = None

    def effective(self) -> QuantizationConfig | None:
        """Return the quantization that vLLM obeys: the top level's, else the language model's."""
        inner = self.text_config.quantization_config if self.text_config else None
        return self.quantization_config or self.compression_config or inner

    def notes(self, *, file: str) -> list[Finding]:
        """Return one note per quantization whose method is not described here."""
        places: dict[tuple[str, ...], QuantizationConfig | None] = {
            ("quantization_config",): self.quantization_config,
            ("compression_config",): self.compression_config,
        }
        if self.text_config:
            places["text_config", "quantization_config"] = self.text_config.quantization_config
        return [
            Finding(
                file=file,
                where=json_path((*place, "quant_method")),
                rule="quant-method-unknown",
                message=f"quant_method {found.quant_method!r} is not checked",
                severity="note",
            )
            for place, found in places.items()
            if isinstance(found, OtherConfig)
        ]
