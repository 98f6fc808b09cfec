"""The support matrix: what stands for what, what a run shows, and that the published data agree."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qschema.strict import DocumentError, Finding
from qvalidate import cli
from qvalidate.engines import EngineOutcome
from qvalidate.engines.outcome import Level, Verdict
from qvalidate.matrix import DATA, Cell, CellRun, Matrix, State, read, text, write
from qvalidate.matrix.documented import cells as documented
from qvalidate.matrix.verify import VerifyError, cases, contradictions, state_of, writable
from qvalidate.result import EngineReport

ROOT = Path(__file__).parents[2]


def cell(state: State, *, version: str = "0.33.0", run: bool = True, message: str = "") -> Cell:
    made = CellRun(date="2026-11-21", predicted="loads", agreement="contradicted", message=message)
    return Cell(
        engine="vllm",
        version=version,
        format="FP8",
        architecture="llama",
        gpu="sm_90",
        state=state,
        source="" if run else "a document",
        run=made if run else None,
    )


def test_a_run_stands_for_what_was_documented_and_never_the_other_way() -> None:
    said, shown = cell("documented", run=False), cell("fails")

    assert Matrix(cells=[said]).with_cells([shown]).cells == [shown]
    assert Matrix(cells=[shown]).with_cells([said]).cells == [shown]


def test_the_newest_run_counts() -> None:
    assert Matrix(cells=[cell("fails")]).with_cells([cell("verified")]).cells == [cell("verified")]


def test_cells_are_in_order(tmp_path: Path) -> None:
    new, old = cell("fails"), cell("verified", version="0.32.0")
    file = tmp_path / "support.json"
    write(Matrix(cells=[]).with_cells([new, old]), file)

    assert read(file).cells == [old, new]
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"source": "and a document"}, "cell-source"),
        ({"run": None}, "cell-source"),
        ({"run": None, "source": "a document"}, "cell-verified"),
    ],
)
def test_a_cell_says_once_how_it_is_known(change: dict[str, object], rule: str) -> None:
    document = {**json.loads(cell("verified").model_dump_json()), **change}

    with pytest.raises(DocumentError) as caught:
        Matrix.parse({"cells": [document]}, file="x")
    assert rule in [found.rule for found in caught.value.findings]


@pytest.mark.parametrize(
    ("verdict", "reached", "rule", "expected"),
    [
        ("passed", "compare", None, "verified"),
        ("passed", "generate", None, "unknown"),
        ("failed", None, "engine-refused", "fails"),
        ("failed", "generate", "compare-kl", "loads-but-wrong"),
        ("failed", None, "engine-timeout", "unknown"),
        ("no-kernel", None, "engine-no-kernel", "unknown"),
        ("not-run", None, "engine-missing", "unknown"),
    ],
)
def test_what_a_run_shows(
    verdict: Verdict, reached: Level | None, rule: str | None, expected: State
) -> None:
    findings = [Finding(file="x", where="", rule=rule, message="no")] if rule else []
    observed = EngineOutcome(
        engine="vllm", level="compare", verdict=verdict, reached=reached, findings=findings
    )
    report = EngineReport(engine="vllm", versions=["0.33.0"], predicted="loads", observed=observed)

    assert state_of(report) == expected


def test_cases_are_every_fixture_in_every_written_format() -> None:
    found = cases(ROOT / "fixtures", models=[], wanted=[])

    assert len(found) == len({case.name for case in found})
    assert {case.format for case in found} == set(writable())
    assert "FP8_PB_REAL" not in writable()
    assert {"llama", "qwen3", "mixtral"} <= {case.model for case in found}


@pytest.mark.parametrize(("model", "name"), [("llama9", "FP8"), ("llama", "FP9")])
def test_an_unknown_case_is_refused(model: str, name: str) -> None:
    with pytest.raises(VerifyError, match="there is"):
        cases(ROOT / "fixtures", models=[model], wanted=[name])


def test_a_contradiction_is_a_line() -> None:
    (line,) = contradictions([cell("fails", message="said no")])

    assert line == "llama FP8: predicted loads, observed fails: said no"


def test_the_documented_cells_are_in_the_published_matrix() -> None:
    published = read()

    assert published.with_cells(documented()) == published
    assert [found.key for found in published.cells] == sorted(
        found.key for found in published.cells
    )


def test_no_tensorrt_llm_cell_is_verified() -> None:
    """There is no wheel of it to run."""
    found = {cell.state for cell in read().select(engine="tensorrt-llm")}

    assert found == {"documented"}


def test_the_page_is_the_matrix() -> None:
    """Rewrite it with `qvalidate support --markdown > docs/support.md`."""
    assert (ROOT / "docs" / "support.md").read_text() == text.markdown(read().cells)


def test_support_prints_what_is_asked_for() -> None:
    result = CliRunner().invoke(
        cli.main, ["support", "--engine", "sglang", "--format", "FP8", "--architecture", "mixtral"]
    )

    assert result.exit_code == 0
    assert all("FP8" in line and "mixtral" in line for line in result.stdout.splitlines())
    assert result.stdout


def test_support_takes_formats_in_any_case() -> None:
    found = [
        CliRunner().invoke(cli.main, ["support", "--format", name]).stdout
        for name in ("nvfp4", "NVFP4")
    ]

    assert found[0] == found[1] != ""


def test_support_says_that_nothing_is_known() -> None:
    result = CliRunner().invoke(cli.main, ["support", "--format", "FP9"])

    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("nothing is known of that; there is FP8, ")


def test_matrix_that_converts_nothing_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvalidate.matrix.cli.installed_version", lambda *args: "0.33.0")
    monkeypatch.setattr("qvalidate.matrix.cli.run", lambda *args, **options: [])
    data = tmp_path / "support.json"
    data.write_bytes(DATA.read_bytes())
    args = ["matrix", "--engine", "vllm", "--gpu", "cpu", "--data", str(data)]
    result = CliRunner().invoke(cli.main, args)

    assert result.exit_code == 2
    assert "nothing was run" in result.stderr


def test_support_says_which_file_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "support.json"
    file.write_text("{")
    result = CliRunner().invoke(cli.main, ["support", "--data", str(file)])

    assert result.exit_code == 2
    assert str(file) in result.stderr


def test_data_lies_in_the_package() -> None:
    assert DATA.is_file()
