"""The faults that only a real engine sees, and what it says of them: vLLM on a CPU.

QVALIDATE_VLLM_PYTHON=vllm-env/bin/python pytest tests/validate/test_levels_real.py
"""

import os
from pathlib import Path

import pytest
import value_codes_faults  # noqa: F401  (these two fill the catalogue)
import value_file_faults  # noqa: F401
from value_faults import VALUE_FAULTS, ValueFault, right

from qvalidate.dry import DryRequest, dry_run
from qvalidate.engines import EngineOutcome, EngineRequest, get
from qvalidate.engines.outcome import FOUR_BIT_INPUTS, Thresholds

PYTHON = os.environ.get("QVALIDATE_VLLM_PYTHON")

pytestmark = [
    pytest.mark.engine_vllm,
    pytest.mark.skipif(PYTHON is None, reason="needs $QVALIDATE_VLLM_PYTHON"),
]


def of_level(level: str) -> list[ValueFault]:
    return [fault for fault in VALUE_FAULTS if fault.level == level]


def compare(path: Path, source: Path, algo: str) -> EngineOutcome:
    outcome = get("vllm").run(
        EngineRequest(
            checkpoint=path,
            reference=source,
            python=PYTHON,
            level="compare",
            kernels="reference",
            thresholds=FOUR_BIT_INPUTS if algo == "NVFP4" else Thresholds(),
        )
    )
    print(outcome.model_dump_json(exclude={"prompts", "tokens", "texts"}))
    return outcome


@pytest.mark.parametrize("fault", of_level("compare"), ids=lambda fault: fault.name)
def test_the_comparison_sees_it(tmp_path: Path, fault: ValueFault) -> None:
    source = fault.write_source(tmp_path / "source")
    outcome = compare(fault.write(tmp_path / "faulty"), source, fault.algo)

    assert outcome.verdict == "failed"
    assert {found.rule.partition("-")[0] for found in outcome.findings} <= {"compare", "generate"}


@pytest.mark.parametrize(
    ("model", "algo", "base"),
    sorted({(fault.model, fault.algo, fault.base) for fault in of_level("compare")}),
)
def test_the_right_checkpoint_passes(tmp_path: Path, model: str, algo: str, base: str) -> None:
    """Else the test above could not fail."""
    (fault, *_) = [
        found
        for found in of_level("compare")
        if (found.model, found.algo, found.base) == (model, algo, base)
    ]
    source = fault.write_source(tmp_path / "source")
    path = right(model, algo, fault.base).write(tmp_path / "right")

    assert compare(path, source, algo).verdict == "passed"


@pytest.mark.parametrize("fault", of_level("dry"), ids=lambda fault: fault.name)
def test_the_dry_load_sees_it(tmp_path: Path, fault: ValueFault) -> None:
    outcome = dry_run(DryRequest(checkpoint=fault.write(tmp_path / "faulty"), python=PYTHON))

    assert {found.rule for found in outcome.findings if found.severity == "error"} == fault.rules
