"""Which level is the first to see a wrong value or file, fault by fault; and the page about it.

The engine's levels are not run here: for them it is shown that no earlier level sees anything.
"""

import os
from pathlib import Path

import faults_page
import pytest
import value_codes_faults  # noqa: F401  (these two fill the catalogue)
import value_file_faults  # noqa: F401
from value_faults import EXIT, VALUE_FAULTS, Base, ValueFault, right

from qschema.strict import DocumentError, Finding
from qvalidate.loader import load
from qvalidate.rules import RULES, run
from qvalidate.rules.outside import LOADING, WEIGHTS
from qvalidate.weights import weight_findings

Places = set[tuple[str, str]]


def places(findings: list[Finding]) -> Places:
    """Return (rule, where) of what fails a check, at least with --strict."""
    return {(found.rule, found.where) for found in findings if found.severity != "note"}


def by_rules(path: Path) -> Places:
    try:
        return places(list(run(load(path))))
    except DocumentError as problem:
        return places(problem.findings)
    except OSError:
        # the command says `can't read FILE` and stops
        return {(EXIT, "")}


def by_weights(path: Path, source: Path) -> Places:
    return places(list(weight_findings(load(path), source)))


@pytest.mark.parametrize("fault", VALUE_FAULTS, ids=lambda fault: fault.name)
def test_fault_is_seen_by_its_level_and_none_before(fault: ValueFault, tmp_path: Path) -> None:
    if fault.rules == {EXIT} and os.geteuid() == 0:
        pytest.skip("root may read a file that nobody may read")
    path = fault.write(tmp_path / "made")
    seen = by_rules(path)
    if fault.level != "rules":
        assert seen == set()
        seen = by_weights(path, fault.write_source(tmp_path / "source"))

    if fault.level in ("rules", "weights"):
        assert {rule for rule, _ in seen} == fault.rules
        assert fault.where in {where for _, where in seen}
    else:
        assert seen == set()


UNSEEN = [fault for fault in VALUE_FAULTS if fault.level not in ("rules", "weights")]


@pytest.mark.parametrize("fault", UNSEEN, ids=lambda fault: fault.name)
def test_fault_that_is_not_seen_is_there(fault: ValueFault, tmp_path: Path) -> None:
    made = fault.write(tmp_path / "made")
    plain = right(fault.model, fault.algo, fault.base).write(tmp_path / "right")

    assert contents(made) != contents(plain)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


BASES = sorted({(fault.model, fault.algo, fault.base) for fault in VALUE_FAULTS})


@pytest.mark.parametrize(("model", "algo", "base"), BASES)
def test_without_its_fault_nothing_is_seen(
    model: str, algo: str, base: Base, tmp_path: Path
) -> None:
    path = right(model, algo, base).write(tmp_path / "made")
    fault = ValueFault(None, None, "none", frozenset(), "", model, algo, base)

    assert by_rules(path) == set()
    assert by_weights(path, fault.write_source(tmp_path / "source")) == set()


def test_names_of_faults_are_their_own() -> None:
    names = [fault.name for fault in VALUE_FAULTS]

    assert len(set(names)) == len(names)


def test_findings_that_are_declared_exist() -> None:
    declared = {
        rule
        for fault in VALUE_FAULTS
        if fault.level in ("rules", "weights")
        for rule in fault.rules
    }

    assert declared <= {*RULES, *LOADING, *WEIGHTS, EXIT}


def test_committed_page_is_the_generated_one() -> None:
    """Run `python tests/validate/faults_page.py > docs/faults.md` after changing a fault."""
    committed = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()

    assert committed == faults_page.page()
