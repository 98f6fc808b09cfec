"""Every file under fixtures/documents is a case: adding one is adding a file.

positive/<document>/*: no errors. negative/<document>/*: exactly the findings that expected.json
beside them lists as [path, rule]. `schema` there says what the JSON Schema makes of the file:
"rejects"; "accepts" where the rule is between fields and so the model's alone; "not-json" where
there is nothing to judge.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from qschema import catalog
from qschema.check import check_file
from qschema.export import schema_text
from qschema.recipe_file import load_yaml
from qschema.strict import DocumentError, Verbatim, load_json, parse_json

EXAMPLES = Path(__file__).resolve().parents[2] / "fixtures" / "documents"
SCHEMAS = {
    document.id: Draft202012Validator(json.loads(schema_text(document)))
    for document in catalog.DOCUMENTS
}


def cases(folder: str) -> list[Any]:
    """Returns (document id, file) for every example in `folder`."""
    return [
        pytest.param(path.parent.name, path, id=f"{path.parent.name}/{path.name}")
        for path in sorted((EXAMPLES / folder).glob("*/*"))
        if path.name != "expected.json"
    ]


def content(kind: str, path: Path) -> Any:
    """Returns the JSON in an example; raises DocumentError where there is none."""
    if kind == "safetensors-header":
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if length > len(data) - 8:
            raise DocumentError.of(path, "", "header-cut-off", "no whole header to judge")
        return parse_json(data[8 : 8 + length], file=str(path))
    constants = catalog.by_id(kind).constants
    return load_yaml(path) if path.suffix == ".yaml" else load_json(path, constants=constants)


def expected(path: Path) -> dict[str, Any]:
    """Returns what expected.json says about the negative example at `path`."""
    return json.loads((path.parent / "expected.json").read_text())[path.name]


@pytest.mark.parametrize(("kind", "path"), cases("positive"))
def test_positive_example_has_no_errors(kind, path):
    result = check_file(path, kind=kind)

    assert [str(finding) for finding in result.findings if finding.severity == "error"] == []
    assert result.document == kind


@pytest.mark.parametrize(("kind", "path"), cases("positive"))
def test_positive_example_passes_its_json_schema(kind, path):
    errors = [error.message for error in SCHEMAS[kind].iter_errors(content(kind, path))]

    assert errors == []


@pytest.mark.parametrize(("kind", "path"), cases("positive"))
def test_model_dumps_back_the_same_json_in_the_same_order(kind, path):
    model_type = catalog.by_id(kind).model
    if not issubclass(model_type, Verbatim):
        # our own documents are written by the model itself
        assert kind in ("recipe", "amax", "plan", "report", "timings", "safetensors-header")
        return
    document = content(kind, path)

    dumped = model_type.parse(document, file=str(path)).model_dump()

    assert json.dumps(dumped) == json.dumps(document)


@pytest.mark.parametrize(("kind", "path"), cases("negative"))
def test_negative_example_has_the_expected_findings(kind, path):
    result = check_file(path, kind=kind)

    assert [[found.where, found.rule] for found in result.findings] == expected(path)["findings"]
    assert result.failed
    assert all(finding.file == str(path) for finding in result.findings)


@pytest.mark.parametrize(("kind", "path"), cases("negative"))
def test_json_schema_rejects_what_is_structurally_wrong(kind, path):
    try:
        verdict = "accepts" if SCHEMAS[kind].is_valid(content(kind, path)) else "rejects"
    except DocumentError:
        verdict = "not-json"

    assert verdict == expected(path)["schema"]


@pytest.mark.parametrize("document", catalog.DOCUMENTS, ids=catalog.ids())
def test_every_document_has_examples_and_none_is_forgotten(document):
    positive, negative = (EXAMPLES / folder / document.id for folder in ("positive", "negative"))
    listed = json.loads((negative / "expected.json").read_text())

    assert any(positive.iterdir())
    assert {path.name for path in negative.iterdir()} == {*listed, "expected.json"}


def test_safetensors_examples_are_those_of_their_script():
    """After a change of the script: python fixtures/documents/make_safetensors.py."""
    script = runpy.run_path(str(EXAMPLES / "make_safetensors.py"))

    for folder in ("positive", "negative"):
        files = (EXAMPLES / folder / "safetensors-header").glob("*.safetensors")
        assert {path.stem: path.read_bytes() for path in files} == script[folder.upper()]


def test_folders_are_named_like_documents():
    folders = {path.name for path in EXAMPLES.glob("*tive/*")}

    assert folders == set(catalog.ids())
