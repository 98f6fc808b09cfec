"""What README shows of the validator is what the committed evidence says."""

import json
from pathlib import Path

import click

from qvalidate import report
from qvalidate.result import Result

ROOT = Path(__file__).parents[2]


def test_the_engines_lines_are_those_of_the_evidence() -> None:
    kept = ROOT / "validate" / "evidence" / "readme.json"
    result = Result.parse(json.loads(kept.read_text()), file=kept.name)

    said = [click.unstyle(line) for line in report.lines(result, quiet=False, verbose=False)]

    lines = [line for line in said if line.startswith("vllm: ")]
    assert len(lines) == 6
    assert "\n".join(lines) in (ROOT / "README.md").read_text()
