"""The JSON Schema of the result document, generated from the model. Run after a change of it:

    python -m qvalidate.reports.schema

rewrites qvalidate/published/qvalidate-result.schema.json; a test fails until that is done. It says
what there may be; what one field means for another is the model's alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema

from qschema.strict import Json
from qvalidate.result import Result

PUBLISHED = Path(__file__).parents[1] / "published" / "qvalidate-result.schema.json"

# model -> field -> what it says, where the name does not
TEXTS: Mapping[str, Mapping[str, str]] = {
    "Result": {
        "level": "how far the run went; each level includes the ones before it",
        "rules": "ids of the rules that were run; empty if the checkpoint could not be read",
        "engines": "of the engines that were named; of every known version if none was",
        "is_for_any_engine": "no engine was named: what only one of them minds is softened",
    },
    "Subject": {
        "digest": "sha256 of its shards' names, sizes and headers; null if it could not be read",
        "algo": "the format, as the config that engines obey spells it",
        "num_quantized": "modules whose weight is stored as codes",
    },
    "Finding": {
        "where": "a JSON path or the name of a tensor or module; empty for the file as a whole",
        "rule": "its id; `qvalidate explain ID` says what it means",
    },
    "EngineReport": {
        "versions": "the known versions that the prediction is about",
        "predicted": "what the rules say the engine will do",
        "predicted_by": "ids of the rules that the prediction rests on",
        "observed": "what the real engine did; null where none was asked",
        "other_version": "the version that ran, if the prediction is not about it; null else",
        "agreement": "whether the run bears the prediction out",
    },
    "EngineOutcome": {
        "level": "the level that was asked for",
        "reached": "the last level that was completed; null for none",
        "verdict": "no-kernel and not-run say nothing about the checkpoint, and are no pass",
        "message": "the engine's last words; empty if it had none",
        "prompts": "token ids",
        "tokens": "greedy continuations, one for each prompt",
        "texts": "the same as text; null without a tokenizer",
        "wall_s": "seconds, all starts of the engine together",
    },
    "Comparison": {
        "kl_mean": "KL(reference || candidate) in nats, mean over the positions",
        "kl_max": "the same, its largest",
        "top1_agreement": "share of positions where the first choice is one of the reference's",
        "relative_error": "of the log-probabilities, centred at each position",
        "perplexity_reference": "of the prompts' own tokens",
        "perplexity_candidate": "of the prompts' own tokens",
    },
}


class _Plain(GenerateJsonSchema):
    """Leaves out the titles that only repeat the names of fields."""

    def field_title_should_be_set(self, schema: CoreSchema) -> bool:
        return False


def schema_text() -> str:
    """Return the JSON Schema (draft 2020-12) of a Result as the text of its file."""
    generated: dict[str, Json] = Result.model_json_schema(schema_generator=_Plain)
    generated.pop("title", None)
    definitions = generated.get("$defs")
    assert isinstance(definitions, dict)
    for name, texts in TEXTS.items():
        _describe(generated if name == "Result" else definitions[name], texts)
    version = Result.model_fields["version"].default
    schema = {
        "$schema": _Plain.schema_dialect,
        "$id": f"urn:qconvert:schema:qvalidate-result:{version}",
        "title": "result of qvalidate",
        **generated,
    }
    return json.dumps(schema, indent=2) + "\n"


def _describe(model: Json, texts: Mapping[str, str]) -> None:
    """Add `texts` to the properties of one model's schema; each names a property."""
    assert isinstance(model, dict)
    properties = model["properties"]
    assert isinstance(properties, dict)
    for field, text in texts.items():
        found = properties[field]
        assert isinstance(found, dict)
        properties[field] = {"description": text, **found}


if __name__ == "__main__":
    PUBLISHED.parent.mkdir(exist_ok=True)
    PUBLISHED.write_text(schema_text(), encoding="utf-8")
    print(PUBLISHED)
