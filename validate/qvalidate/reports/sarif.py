"""A Result as SARIF 2.1.0, as GitHub's code scanning and editors read it.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html; section numbers below are of it.
Files are named relative to the working directory (`SRCROOT` in originalUriBaseIds, 3.14.14): GitHub
takes relative names for those of the repository. Those of a checkpoint elsewhere are relative to
its own directory (`CHECKPOINT`). Tensors and JSON paths are logical locations (3.33). Files of text
get the region of their first line, because GitHub asks for a line; a binary file can't have one
(3.30.1).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from qschema.strict import Finding, Json
from qvalidate.explain import explain, scope
from qvalidate.reports.wording import SEVERITIES, origin_of, relative_file, summary_of
from qvalidate.result import EngineReport, Result
from qvalidate.rules import RULES

_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
# GitHub shows no more of one run, and refuses a file with five times as many
_MOST_RESULTS = 5000
_TEXT = (".json", ".jinja", ".txt", ".py")


def render(result: Result, *, strict: bool = False) -> str:
    """Return `result` as the text of a SARIF file with one run; `strict` is of the exit code."""
    found = sorted(result.findings, key=_severity)
    shown = found[:_MOST_RESULTS]
    ids = list(dict.fromkeys([*result.rules, *(finding.rule for finding in found)]))
    places = {rule_id: index for index, rule_id in enumerate(ids)}
    log: Json = {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": _driver(result, ids)},
                "automationDetails": {"id": f"qvalidate/{_directory(result).name}/"},
                "originalUriBaseIds": {_base(result): _base_location(result)},
                "invocations": [
                    _invocation(result, strict=strict, left_out=len(found) - len(shown))
                ],
                "results": [_result(finding, result, places[finding.rule]) for finding in shown],
                "properties": {
                    "checkpoint": result.checkpoint.model_dump(mode="json"),
                    "level": result.level,
                    "engines": [_engine(report) for report in result.engines],
                },
            }
        ],
    }
    return json.dumps(log, indent=2, ensure_ascii=True)


def _severity(finding: Finding) -> int:
    return SEVERITIES.index(finding.severity)


def _driver(result: Result, ids: Sequence[str]) -> dict[str, Json]:
    return {
        "name": result.tool.name,
        "version": result.tool.version,
        "rules": [_rule(rule_id) for rule_id in ids],
    }


def _rule(rule_id: str) -> dict[str, Json]:
    """Return the descriptor (3.49) of one rule; of one that no table has, its id alone."""
    summary = summary_of(rule_id)
    if not summary:
        return {"id": rule_id}
    declared = RULES.get(rule_id)
    tags: list[Json] = [origin_of(rule_id)]
    full, level = summary, "error"
    if declared is not None:
        full, level = declared.text, declared.severity
        tags += [declared.engine] if declared.engine else []
    command = f"qvalidate explain {rule_id}"
    return {
        "id": rule_id,
        "shortDescription": {"text": summary},
        "fullDescription": {"text": full},
        "help": {
            "text": f"{explain(rule_id)}\n\n{command}",
            "markdown": _markdown(rule_id, command),
        },
        "defaultConfiguration": {"level": level},
        "properties": {"tags": tags},
    }


def _markdown(rule_id: str, command: str) -> str:
    declared = RULES.get(rule_id)
    parts = [f"**{rule_id}**: {summary_of(rule_id)}"]
    if declared is not None:
        parts += [declared.text, f"Holds for {scope(declared)}."]
        if declared.evidence:
            parts.append("Evidence:\n\n" + "\n".join(f"- {line}" for line in declared.evidence))
    return "\n\n".join([*parts, f"`{command}`"])


def _directory(result: Result) -> Path:
    return Path(result.checkpoint.path).absolute()


def _base(result: Result) -> str:
    return "SRCROOT" if _directory(result).is_relative_to(Path.cwd()) else "CHECKPOINT"


def _base_location(result: Result) -> dict[str, Json]:
    is_inside = _base(result) == "SRCROOT"
    # a base ends with a slash (3.14.14)
    uri = (Path.cwd() if is_inside else _directory(result)).as_uri().rstrip("/") + "/"
    what = "working directory" if is_inside else "directory of the checkpoint"
    return {"uri": uri, "description": {"text": f"The {what}."}}


def _invocation(result: Result, *, strict: bool, left_out: int) -> dict[str, Json]:
    code = result.exit_code(strict=strict)
    found: dict[str, Json] = {"executionSuccessful": code != 2, "exitCode": code}
    if left_out:
        text = f"{left_out} more findings are left out; `--format json` has all of them"
        found["toolExecutionNotifications"] = [{"level": "warning", "message": {"text": text}}]
    return found


def _result(finding: Finding, result: Result, rule_index: int) -> dict[str, Json]:
    location: dict[str, Json] = {"physicalLocation": _physical(finding, result)}
    if finding.where:
        location["logicalLocations"] = [_logical(finding.where)]
    return {
        "ruleId": finding.rule,
        "ruleIndex": rule_index,
        "level": finding.severity,
        "message": {"text": finding.message},
        "locations": [location],
        "partialFingerprints": _fingerprints(finding, result),
    }


def _physical(finding: Finding, result: Result) -> dict[str, Json]:
    name = relative_file(finding, result)
    if name is None:
        artifact: dict[str, Json] = {"uri": Path(finding.file).absolute().as_uri()}
    else:
        base = _base(result)
        if base == "SRCROOT":
            name = (_directory(result).relative_to(Path.cwd()) / name).as_posix()
        # the directory itself is "./": an empty reference is none
        uri = "./" if name == "." else quote(name, errors="surrogateescape")
        artifact = {"uri": uri, "uriBaseId": base}
    found: dict[str, Json] = {"artifactLocation": artifact}
    if Path(finding.file).suffix in _TEXT:
        found["region"] = {"startLine": 1}
    return found


def _logical(where: str) -> dict[str, Json]:
    """Return the tensor or the place in a JSON document; only the second has a kind (3.33.7)."""
    if where.startswith("$"):
        return {"fullyQualifiedName": where, "kind": "property"}
    return {"name": where.rpartition(".")[2], "fullyQualifiedName": where}


def _fingerprints(finding: Finding, result: Result) -> dict[str, Json]:
    """Return what stays the same when the numbers in a message change.

    GitHub only reads the key primaryLocationLineHash.
    """
    file = relative_file(finding, result) or finding.file
    text = "\0".join([finding.rule, file, finding.where])
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return {"primaryLocationLineHash": f"{digest[:16]}:1", "qvalidate/v1": digest}


def _engine(report: EngineReport) -> dict[str, Json]:
    versions: list[Json] = list(report.versions)
    asked = {
        "dry": report.dry,
        "run": report.observed,
        "server": report.served,
        "tasks": report.evaluated,
    }
    return {
        **{key: part.verdict for key, part in asked.items() if part is not None},
        "engine": report.engine,
        "versions": versions,
        "predicted": report.predicted,
        "verdict": report.verdict,
        "agreement": report.agreement,
    }
