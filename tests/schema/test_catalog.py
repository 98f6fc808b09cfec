"""Recognition of files, and everything that is generated from the catalog."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from qschema import catalog
from qschema.check import check_file
from qschema.export import PUBLISHED, hooks_text, schema_texts, write_schemas

ROOT = Path(__file__).resolve().parents[2]
POSITIVE = ROOT / "fixtures" / "documents" / "positive"

# a positive example of each document and a name that says nothing about it
ANONYMOUS = [
    ("hf-quant-config", "modelopt_llama-fp8_kv_fp8.json", "quant.json"),
    ("config", "fp8_deepseek_v3.json", "deepseek.json"),
    ("safetensors-header", "fp8-blocks.safetensors", "weights.bin"),
    ("safetensors-index", "two_shards.json", "shards.json"),
    ("recipe", "full.yaml", "mine.yaml"),
    ("recipe", "as_json.json", "mine.json"),
    ("plan", "llama_blocks.json", "dry-run.json"),
    ("report", "llama_blocks.json", "provenance.json"),
    ("timings", "two_workers.json", "speed.json"),
]


@pytest.mark.parametrize(("kind", "example", "name"), ANONYMOUS)
def test_document_is_recognised_by_content(kind, example, name, tmp_path):
    shutil.copy(POSITIVE / kind / example, tmp_path / name)

    result = check_file(tmp_path / name)

    assert (result.document, result.findings) == (kind, ())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("hf_quant_config.json", "hf-quant-config"),
        ("config.json", "config"),
        ("model-00001-of-00002.safetensors", "safetensors-header"),
        ("model.safetensors.index.json", "safetensors-index"),
        ("diffusion_pytorch_model.safetensors.index.json", "safetensors-index"),
        ("recipe.yaml", "recipe"),
        ("llama.recipe.yml", "recipe"),
        ("qconvert_plan.json", "plan"),
        ("qconvert_report.json", "report"),
        ("llama.timings.json", "timings"),
    ],
)
def test_document_is_recognised_by_name(name, kind, tmp_path):
    (tmp_path / name).write_text("{}" if name.endswith("json") else "")

    assert catalog.by_name(name) == catalog.by_id(kind)
    assert check_file(tmp_path / name).document == kind


@pytest.mark.parametrize(
    "name", ["generation_config.json", "adapter_config.json", "model.safetensors.tmp", "config.jsn"]
)
def test_similar_name_says_nothing(name):
    assert catalog.by_name(name) is None


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]", b'{"a": 1}', b"\x80\x02ckpt", b"rules:\n- match: x\n", bytes(9)]
)
def test_unrecognised_file_lists_what_exists(data, tmp_path):
    path = tmp_path / "thing.bin"
    path.write_bytes(data)

    (finding,) = check_file(path).findings

    assert finding.rule == "document-unrecognised"
    assert all(name in finding.message for name in catalog.ids())
    assert "--as" in finding.message


def test_name_and_content_that_disagree_are_a_finding(tmp_path):
    path = tmp_path / "config.json"
    shutil.copy(POSITIVE / "hf-quant-config" / "modelopt_llama-fp8_kv_fp8.json", path)

    (finding,) = check_file(path).findings

    assert finding.rule == "document-mismatch"
    assert "--as hf-quant-config" in finding.message


def test_unknown_quant_method_is_a_note():
    result = check_file(POSITIVE / "config" / "other_awq.json", kind="config")

    assert not result.failed
    assert [(note.where, note.rule, note.severity) for note in result.findings] == [
        ("$.quantization_config.quant_method", "quant-method-unknown", "note")
    ]


def test_infinity_in_a_model_config_is_a_warning():
    """Nemotron-H has `time_step_limit: [0.0, Infinity]`, which Python alone writes."""
    result = check_file(POSITIVE / "config" / "infinity_in_a_mamba_config.json", kind="config")

    assert not result.failed
    assert [(found.rule, found.severity) for found in result.findings] == [
        ("json-constant", "warning")
    ]


def test_published_schemas_are_those_of_the_models():
    """After a change of a model: python -m qschema.export."""
    published = {path.name: path.read_text() for path in PUBLISHED.iterdir()}

    assert published == schema_texts()


def test_hooks_file_is_that_of_the_catalog():
    """After a change of the catalog: python -m qschema.export."""
    assert (ROOT / ".pre-commit-hooks.yaml").read_text() == hooks_text()


@pytest.mark.parametrize(("name", "text"), schema_texts().items(), ids=schema_texts())
def test_schema_is_valid_and_says_who_it_is(name, text):
    schema = json.loads(text)

    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"urn:qconvert:schema:{name.removesuffix('.schema.json')}:1"
    assert schema["title"]


def test_export_makes_the_directory(tmp_path):
    paths = write_schemas(tmp_path / "new" / "schemas")

    assert sorted(path.name for path in paths) == sorted(schema_texts())


def test_hooks_match_the_names_of_their_document():
    hooks = yaml.safe_load(hooks_text())

    for document, hook in zip(catalog.DOCUMENTS, hooks, strict=True):
        assert hook["entry"] == f"qschema check --as {document.id}"
        for pattern in document.names:
            name = pattern.replace("*", "model-00001")
            assert re.search(hook["files"], f"some/dir/{name}")
            assert re.search(hook["files"], name)
            assert not re.search(hook["files"], f"{name}.bak")
