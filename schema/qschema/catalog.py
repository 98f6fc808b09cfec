"""The documents that qschema knows. One row each; there is no other list.

From it follow how a file is recognised, the published JSON Schemas and the pre-commit hooks.
"""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from qschema.amax import Amax
from qschema.hf_quant_config import HfQuantConfig
from qschema.index import Index
from qschema.plan import Plan
from qschema.quantization_config import ModelConfig
from qschema.recipe import Recipe
from qschema.report import Report
from qschema.safetensors import Header
from qschema.strict import Json, Strict
from qschema.timings import Timings


@dataclass(frozen=True)
class Document:
    """One kind of file: `names` are shell patterns over the file's name, `sniff` judges content."""

    id: str
    title: str
    names: tuple[str, ...]
    # what the file is made of; a yaml document may be JSON as well
    container: Literal["json", "yaml", "safetensors"]
    model: type[Strict]
    sniff: Callable[[Mapping[str, Json]], bool]
    # one sentence for the hook's description
    checks: str
    # Python writes NaN and Infinity into it, which is not JSON: a warning, not an error
    constants: bool = False

    @property
    def urn(self) -> str:
        """The `$id` of its JSON Schema; the number grows with incompatible changes."""
        return f"urn:qconvert:schema:{self.id}:1"

    @property
    def schema_file(self) -> str:
        """The file name of its JSON Schema."""
        return f"{self.id}.schema.json"

    @property
    def hook_id(self) -> str:
        """The id of its pre-commit hook."""
        return f"qschema-{self.id}"

    def matches(self, name: str) -> bool:
        """Return whether a file called `name` (without directories) is of this kind."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names)


def _has(*keys: str) -> Callable[[Mapping[str, Json]], bool]:
    return lambda content: any(key in content for key in keys)


def _is(document: str) -> Callable[[Mapping[str, Json]], bool]:
    return lambda content: content.get("document") == document


DOCUMENTS = (
    Document(
        id="hf-quant-config",
        title="hf_quant_config.json",
        names=("hf_quant_config.json",),
        container="json",
        model=HfQuantConfig,
        sniff=lambda content: "quantization" in content and "rules" not in content,
        checks="ModelOpt's description of a quantized checkpoint: names, algorithms, exclusions.",
    ),
    Document(
        id="config",
        title="config.json with its quantization_config",
        names=("config.json",),
        container="json",
        model=ModelConfig,
        sniff=_has("model_type", "architectures", "quantization_config"),
        checks="quantization_config in the dialects modelopt, fp8, compressed-tensors and mxfp4.",
        constants=True,
    ),
    Document(
        id="safetensors-header",
        title="header of a safetensors file",
        names=("*.safetensors",),
        container="safetensors",
        model=Header,
        # by its first bytes, never by JSON keys
        sniff=lambda _: False,
        checks="The header of a safetensors file: dtypes, shapes, offsets and the file's size.",
    ),
    Document(
        id="safetensors-index",
        title="model.safetensors.index.json",
        names=("*.safetensors.index.json",),
        container="json",
        model=Index,
        sniff=_has("weight_map"),
        checks="The index of a sharded checkpoint.",
    ),
    Document(
        id="recipe",
        title="qconvert recipe",
        names=(
            "recipe.json",
            "recipe.yaml",
            "recipe.yml",
            "*.recipe.json",
            "*.recipe.yaml",
            "*.recipe.yml",
        ),
        container="yaml",
        model=Recipe,
        sniff=_has("rules"),
        checks="A recipe for qconvert, in YAML or JSON.",
    ),
    Document(
        id="amax",
        title="activation statistics",
        names=("amax.json", "*.amax.json"),
        container="json",
        model=Amax,
        sniff=_is("qconvert-amax"),
        checks="What calibration measured: the largest activations of each layer.",
    ),
    Document(
        id="plan",
        title="qconvert plan",
        names=("qconvert_plan.json", "*.plan.json"),
        container="json",
        model=Plan,
        sniff=_is("qconvert-plan"),
        checks="What a conversion will do, tensor by tensor.",
    ),
    Document(
        id="report",
        title="qconvert_report.json",
        names=("qconvert_report.json",),
        container="json",
        model=Report,
        sniff=_is("qconvert-report"),
        checks="What a conversion did: the provenance of a converted checkpoint.",
    ),
    Document(
        id="timings",
        title="qconvert timings",
        names=("qconvert_timings.json", "*.timings.json"),
        container="json",
        model=Timings,
        sniff=_is("qconvert-timings"),
        checks="Where the time of a conversion went, stage by stage.",
    ),
)


def ids() -> list[str]:
    """Return the ids of all documents."""
    return [document.id for document in DOCUMENTS]


def by_id(name: str) -> Document:
    """Return the document with the id `name`; raises KeyError."""
    return {document.id: document for document in DOCUMENTS}[name]


def by_name(name: str) -> Document | None:
    """Return the document that a file called `name` is, None if the name says nothing."""
    return next((document for document in DOCUMENTS if document.matches(name)), None)


def by_content(content: Json) -> list[Document]:
    """Return the documents that `content` looks like."""
    if not isinstance(content, dict):
        return []
    return [document for document in DOCUMENTS if document.sniff(content)]
