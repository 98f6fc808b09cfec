"""JUnit XML, SARIF and the schema of the JSON: what a pipeline reads of a result."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin
from xml.etree import ElementTree

import pytest
import report_samples as samples
from jsonschema import Draft202012Validator
from report_samples import COMPARISON, PATH, engine, finding, outcome, result
from sarif_subset import SCHEMA

from qvalidate.engines.outcome import EngineOutcome, Level, Verdict
from qvalidate.reports import junit, sarif
from qvalidate.reports.schema import PUBLISHED, schema_text
from qvalidate.result import Prediction, Result
from qvalidate.rules import RULES

MISSING = finding("missing-tensor", "model.norm.weight", "missing")
WARNING = finding("missing-tensor", "model.norm.weight", "odd", severity="warning")
NOTE = finding("missing-tensor", "model.norm.weight", "odd", severity="note")


def suites(given: Result, *, strict: bool = False) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(junit.render(given, strict=strict))
    return {suite.attrib["name"]: suite for suite in root}


def states(suite: ElementTree.Element) -> dict[str, str]:
    """Return case -> failure, error, skipped or passed."""
    return {
        case.attrib["name"]: next((c.tag for c in case if c.tag != "system-out"), "passed")
        for case in suite.iter("testcase")
    }


def of_engine(report: samples.EngineReport) -> dict[str, str]:
    return states(suites(result(engines=(report,)))[f"qvalidate.{report.engine}"])


def test_every_rule_that_was_run_is_a_case() -> None:
    cases = states(suites(result(MISSING))["qvalidate.rules"])

    assert list(cases) == list(RULES)
    assert {rule for rule, state in cases.items() if state != "passed"} == {"missing-tensor"}


@pytest.mark.parametrize(("strict", "state"), [(False, "passed"), (True, "failure")])
def test_warnings_fail_only_if_strict(strict: bool, state: str) -> None:
    cases = states(suites(result(WARNING, NOTE), strict=strict)["qvalidate.rules"])

    assert cases["missing-tensor"] == state


def test_what_does_not_fail_a_rule_is_its_output() -> None:
    suite = suites(result(MISSING, NOTE))["qvalidate.rules"]
    (case,) = (case for case in suite.iter("testcase") if len(case))

    assert "note: odd" in (case.findtext("system-out") or "")
    assert "missing-tensor: missing" in (case.findtext("failure") or "")


def test_findings_that_are_no_rules_are_cases_as_well() -> None:
    """Of a checkpoint that could not be read, and of the comparison with the source."""
    unreadable = finding("index-missing-shard", "$.weight_map", "names a file")
    weights = finding("weight-error", "lm_head.weight", "relative error 7")
    suite = suites(result(unreadable, weights, rules=()))["qvalidate.rules"]

    groups = {case.attrib["name"]: case.attrib["classname"] for case in suite.iter("testcase")}
    assert groups == {
        "index-missing-shard": "qvalidate.loading",
        "weight-error": "qvalidate.weights",
    }
    assert set(states(suite).values()) == {"failure"}


@pytest.mark.parametrize(
    ("predicted", "state"),
    [
        ("loads", "passed"),
        ("refuses", "failure"),
        ("loads-but-wrong", "failure"),
        ("unknown", "skipped"),
    ],
)
def test_prediction_is_a_case(predicted: Prediction, state: str) -> None:
    assert of_engine(engine(predicted, by=("missing-tensor",))) == {"prediction": state}


def test_predictions_of_engines_that_nobody_named_fail_nothing() -> None:
    given = result(engines=(engine("refuses"),), is_for_any_engine=True)

    assert states(suites(given)["qvalidate.vllm 0.32.0, 0.33.0"]) == {"prediction": "passed"}


REFUSED = finding("engine-refused", "", "KeyError", file=".")
KL = finding("compare-kl", "", "mean KL 3", file=".")
NAN = finding("generate-nonfinite", "", "NaN", file=".")
NO_KERNEL = finding("engine-no-kernel", "", "no kernel", file=".")
GONE = finding("engine-missing", "", "no vllm", file=".")
TOKENIZER = finding("engine-tokenizer", "", "none", file=".", severity="warning")


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (outcome("passed", comparison=COMPARISON), ["passed", "passed", "passed"]),
        (outcome("passed", level="load", reached="load"), ["passed"]),
        (outcome("failed", REFUSED, reached=None), ["failure", "skipped", "skipped"]),
        (outcome("failed", REFUSED, reached="load"), ["passed", "failure", "skipped"]),
        (outcome("failed", KL, comparison=COMPARISON), ["passed", "passed", "failure"]),
        (outcome("failed", NAN, level="generate", reached="generate"), ["passed", "failure"]),
        (outcome("no-kernel", NO_KERNEL, reached="load"), ["passed", "error", "skipped"]),
        (outcome("not-run", GONE, reached=None), ["error", "skipped", "skipped"]),
    ],
    ids=["compare", "load", "refused", "crashed", "kl", "nan", "no-kernel", "not-run"],
)
def test_levels_of_a_run_are_cases(run: EngineOutcome, expected: list[str]) -> None:
    cases = of_engine(engine("loads", run))

    assert list(cases.values()) == ["passed", *expected]
    assert list(cases) == ["prediction", "load", "generate", "compare"][: len(cases)]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        result(),
        result(MISSING),
        result(WARNING),
        result(NOTE),
        result(engines=(engine("refuses"),), is_for_any_engine=True),
        result(engines=(engine("loads", outcome("passed", TOKENIZER)),)),
        result(engines=(engine("loads", outcome("failed", REFUSED, reached=None)),)),
        result(engines=(engine("loads", outcome("no-kernel", NO_KERNEL, reached=None)),)),
        result(engines=(engine("loads", outcome("not-run", GONE, reached=None)),)),
        samples.rich(),
    ],
)
def test_junit_is_red_where_the_exit_status_is_not_0(given: Result, strict: bool) -> None:
    root = ElementTree.fromstring(junit.render(given, strict=strict))
    red = int(root.attrib["failures"]) + int(root.attrib["errors"])

    assert (red > 0) == (given.exit_code(strict=strict) != 0)


def test_counts_are_those_of_the_cases() -> None:
    for suite in suites(samples.rich()).values():
        found = list(states(suite).values())
        names = {"failures": "failure", "errors": "error", "skipped": "skipped"}
        counted = {key: str(found.count(state)) for key, state in names.items()}

        assert {key: suite.attrib[key] for key in names} == counted
        assert suite.attrib["tests"] == str(len(found))


def test_numbers_of_a_comparison_are_properties() -> None:
    suite = suites(samples.rich())["qvalidate.vllm"]
    found = {item.attrib["name"]: item.attrib["value"] for item in suite.iter("property")}

    assert found["kl_mean"] == "0.0921"
    assert (found["version"], found["device"]) == ("0.33.0", "NVIDIA H200")


def test_what_xml_cannot_hold_is_spelt_out() -> None:
    odd = finding("missing-tensor", "a", "\x1b[31mred\x00 \udcff <&>]]> \N{GRINNING FACE}")
    text = suites(result(odd))["qvalidate.rules"].findtext(".//failure") or ""

    assert "\\x1b[31mred\\x00 \\udcff <&>]]> \N{GRINNING FACE}" in text


def test_many_findings_of_a_rule_are_cut() -> None:
    many = [finding("missing-tensor", f"a.{index}", "missing") for index in range(1000)]
    text = suites(result(*many))["qvalidate.rules"].findtext(".//failure") or ""

    assert text.count("missing-tensor: missing") == 100
    assert "... and 900 more" in text


def run_of(given: Result) -> dict[str, Any]:
    """Return the single run of a SARIF file, after checking it against the standard's subset."""
    log = json.loads(sarif.render(given))
    Draft202012Validator(SCHEMA).validate(log)
    found: dict[str, Any] = log["runs"][0]
    return found


@pytest.mark.parametrize(
    "given",
    [result(), result(MISSING, rules=()), samples.rich(), result(finding("odd", "", "new"))],
    ids=["clean", "unreadable", "rich", "unknown rule"],
)
def test_sarif_is_valid(given: Result) -> None:
    found = run_of(given)

    assert len(found["results"]) == len(given.findings)


def test_sarif_explains_every_rule() -> None:
    rules = run_of(samples.rich())["tool"]["driver"]["rules"]

    assert [rule["id"] for rule in rules][: len(RULES)] == list(RULES)
    for rule in rules[: len(RULES)]:
        assert rule["fullDescription"]["text"] == RULES[rule["id"]].text
        assert rule["defaultConfiguration"]["level"] == RULES[rule["id"]].severity
        assert f"qvalidate explain {rule['id']}" in rule["help"]["text"]


def test_sarif_results_point_at_their_rule() -> None:
    found = run_of(samples.rich())
    rules = found["tool"]["driver"]["rules"]

    for item in found["results"]:
        assert rules[item["ruleIndex"]]["id"] == item["ruleId"]


@pytest.mark.parametrize(
    ("file", "uri", "region"),
    [
        ("config.json", "config.json", {"startLine": 1}),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors", None),
        ("a b/\N{SNOWMAN}#1.json", "a%20b/%E2%98%83%231.json", {"startLine": 1}),
        (".", "./", None),
    ],
)
def test_sarif_files_are_relative_to_the_checkpoint(
    file: str, uri: str, region: dict[str, int] | None
) -> None:
    found = run_of(result(finding("missing-tensor", "", "gone", file=file)))
    place = found["results"][0]["locations"][0]["physicalLocation"]

    assert place["artifactLocation"] == {"uri": uri, "uriBaseId": "CHECKPOINT"}
    assert place.get("region") == region
    base = found["originalUriBaseIds"]["CHECKPOINT"]["uri"]
    whole = urljoin(base, uri)
    assert unquote(whole).removeprefix("file://").rstrip("/.") == f"{PATH}/{file}".rstrip("/.")


def test_sarif_files_of_a_repository_are_relative_to_its_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GitHub takes relative names for those of the repository."""
    monkeypatch.chdir(tmp_path)
    given = result(MISSING.model_copy(update={"file": "models/a/config.json"}))
    given = given.model_copy(
        update={"checkpoint": given.checkpoint.model_copy(update={"path": "models/a"})}
    )
    found = json.loads(sarif.render(given))["runs"][0]
    place = found["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]

    assert place == {"uri": "models/a/config.json", "uriBaseId": "SRCROOT"}
    assert found["originalUriBaseIds"]["SRCROOT"]["uri"] == f"{tmp_path.as_uri()}/"


def test_sarif_file_outside_of_the_checkpoint_is_absolute() -> None:
    other = finding("compare-reference", "", "failed").model_copy(update={"file": "/source/x.json"})
    place = run_of(result(other))["results"][0]["locations"][0]["physicalLocation"]

    assert place["artifactLocation"] == {"uri": "file:///source/x.json"}


@pytest.mark.parametrize(
    ("where", "logical"),
    [
        (
            "model.layers.0.mlp.weight",
            {"name": "weight", "fullyQualifiedName": "model.layers.0.mlp.weight"},
        ),
        ("$.quantization.a", {"fullyQualifiedName": "$.quantization.a", "kind": "property"}),
    ],
)
def test_sarif_names_tensors_and_json_paths(where: str, logical: dict[str, str]) -> None:
    (item,) = run_of(result(finding("missing-tensor", where, "gone")))["results"]

    assert item["locations"][0]["logicalLocations"] == [logical]


def test_sarif_fingerprint_outlives_a_change_of_numbers() -> None:
    prints = [
        run_of(result(finding("weight-error", where, text)))["results"][0]["partialFingerprints"]
        for where, text in (("a", "error 7"), ("a", "error 8"), ("b", "error 7"))
    ]

    assert prints[0] == prints[1] != prints[2]


def test_sarif_keeps_the_worst_of_too_many() -> None:
    """GitHub refuses files with more than 25000 results."""
    notes = [finding("missing-tensor", f"a.{i}", "odd", severity="note") for i in range(6000)]
    found = run_of(result(*notes, MISSING))

    assert len(found["results"]) == 5000
    assert found["results"][0]["level"] == "error"
    (notification,) = found["invocations"][0]["toolExecutionNotifications"]
    assert notification["message"]["text"].startswith("1001 more findings")


@pytest.mark.parametrize(
    ("verdict", "item", "reached", "is_run"),
    [("not-run", GONE, None, False), ("failed", REFUSED, "load", True)],
)
def test_sarif_says_whether_the_engines_could_be_started(
    verdict: Verdict, item: samples.Finding, reached: Level | None, is_run: bool
) -> None:
    report = engine("loads", outcome(verdict, item, reached=reached))

    assert run_of(result(engines=(report,)))["invocations"][0]["executionSuccessful"] is is_run


def test_published_schema_is_the_generated_one() -> None:
    """Run `python -m qvalidate.reports.schema` after a change of the model."""
    assert PUBLISHED.read_text(encoding="utf-8") == schema_text()


def test_schema_accepts_results_and_no_others() -> None:
    schema = json.loads(schema_text())
    validator = Draft202012Validator(schema)
    document = json.loads(samples.rich().model_dump_json())

    assert schema["$id"] == "urn:qconvert:schema:qvalidate-result:2"
    assert list(validator.iter_errors(document)) == []
    assert not validator.is_valid({**document, "extra": 1})
    assert not validator.is_valid({**document, "level": "dance"})


def test_sarif_has_the_exit_code_of_a_strict_run() -> None:
    found = json.loads(sarif.render(result(WARNING), strict=True))["runs"][0]["invocations"]

    assert found[0]["exitCode"] == 1
