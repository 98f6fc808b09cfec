"""The engine's part of the command, with a stand-in: levels, predictions, and what is no pass."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from catalogue import PB_WO, PC_PT
from checkpoints import draft
from click.testing import CliRunner, Result

from qschema.strict import Finding
from qvalidate import choice, cli
from qvalidate.dry import DryOutcome
from qvalidate.engines import FOUR_BITS, EngineOutcome, EngineRequest, Thresholds
from qvalidate.engines.outcome import Level, Verdict
from qvalidate.result import EngineReport, Prediction
from qvalidate.result import Result as ValidationResult
from qvalidate.rules import RULES
from qvalidate.targets import Target
from qvalidate.validation import agreement, other_version

WHERE = "model.layers.0.mlp.down_proj.weight_scale"


@dataclass
class StandIn:
    """An engine that says what it was told to."""

    verdict: Verdict
    name: str = "vllm"
    # something that any interpreter has
    module: str = "json"
    requests: list[EngineRequest] = field(default_factory=list)

    def run(self, request: EngineRequest) -> EngineOutcome:
        self.requests.append(request)
        rule = {"failed": "engine-refused", "no-kernel": "engine-no-kernel"}.get(self.verdict)
        findings = []
        if rule or self.verdict == "not-run":
            findings = [
                Finding(
                    file=str(request.checkpoint),
                    where="",
                    rule=rule or "engine-missing",
                    message="said no",
                )
            ]
        return EngineOutcome(
            engine="vllm",
            version="0.33.0",
            device="a GPU",
            level=request.level,
            verdict=self.verdict,
            reached=request.level if self.verdict == "passed" else None,
            message="" if self.verdict == "passed" else "said no",
            findings=findings,
        )


@pytest.fixture
def good(tmp_path: Path) -> str:
    return str(draft("qwen3", PC_PT).write(tmp_path / "good"))


@pytest.fixture
def bad(tmp_path: Path) -> str:
    made = draft("qwen3", PB_WO)
    made.pop(WHERE)
    return str(made.write(tmp_path / "bad"))


@pytest.fixture
def refused(tmp_path: Path) -> str:
    return str(draft("mixtral", PB_WO).write(tmp_path / "refused"))


def stand_in(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> StandIn:
    engine = StandIn(verdict)
    monkeypatch.setattr(choice, "get", lambda name: engine)
    monkeypatch.setattr(choice, "DRY_ENGINES", ())
    return engine


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.main, list(args))


def test_engine_is_asked_to_generate_and_to_compare_with_a_reference(
    good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stand_in(monkeypatch, "passed")
    limits = ["--max-kl", "0.5", "--min-top1", "0.25", "--max-rel", "2", "--timeout", "9"]
    invoke(good, "--engine", "vllm", "--python", "/x/python")
    invoke(good, "--engine", "vllm", "--reference", good, *limits)
    invoke(good, "--engine", "vllm", "--level", "rules")
    first, second = engine.requests

    assert (first.level, first.python, first.reference) == ("generate", "/x/python", None)
    assert (second.level, str(second.reference), second.timeout_s) == ("compare", good, 9.0)
    assert second.thresholds.model_dump() == {
        "max_kl": 0.5,
        "min_top1": 0.25,
        "max_relative_error": 2.0,
    }


@pytest.mark.parametrize(("algo", "limits"), [("NVFP4", FOUR_BITS), ("MXFP8", Thresholds())])
def test_the_limits_of_a_comparison_follow_from_the_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str, limits: Thresholds
) -> None:
    """Four bits cost more than eight; what the user asked for counts in any case."""
    engine = stand_in(monkeypatch, "passed")
    path = str(draft("qwen3", algo).write(tmp_path / "made"))
    invoke(path, "--engine", "vllm", "--reference", path)
    invoke(path, "--engine", "vllm", "--reference", path, "--max-kl", "7")
    first, second = engine.requests

    assert first.thresholds == limits
    assert second.thresholds == limits.model_copy(update={"max_kl": 7.0})


def test_passed_run_confirms_that_it_loads(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "passed")
    result = invoke(good, "--engine", "vllm")

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "vllm: predicted: loads",
        "vllm: observed: passed, level generate [0.33.0, a GPU]",
        "vllm: the run confirms the prediction",
    ]


def test_predicted_refusal_is_run_and_confirmed(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stand_in(monkeypatch, "failed")
    result = invoke(refused, "--engine", "vllm")

    assert (result.exit_code, len(engine.requests)) == (1, 1)
    assert result.stdout.splitlines()[-3:] == [
        "vllm: predicted: refuses (vllm-experts-unsupported)",
        "vllm: observed: failed [0.33.0, a GPU]: said no",
        "vllm: the run confirms the prediction",
    ]


def test_run_that_contradicts_the_rules_says_so(
    good: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "passed")
    assert "the run contradicts the prediction" in invoke(refused, "--engine", "vllm").stdout
    stand_in(monkeypatch, "failed")
    assert "the run contradicts the prediction" in invoke(good, "--engine", "vllm").stdout


def test_generating_does_not_refute_that_it_is_wrong(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "passed")
    assert "predicted: loads-but-wrong (missing-tensor)" in invoke(bad, "--engine", "vllm").stdout
    assert "says nothing about the prediction" in invoke(bad, "--engine", "vllm").stdout
    compared = invoke(bad, "--engine", "vllm", "--reference", bad)
    assert "the run contradicts the prediction" in compared.stdout


def test_a_run_of_another_version_shows_nothing_and_fails(
    good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "passed")
    result = invoke(good, "--engine", "vllm==0.32.0")

    assert result.exit_code == 1
    message = "engine-version: vllm 0.33.0 ran, vllm==0.32.0 was asked for and not shown"
    assert message in result.stdout
    assert result.stdout.splitlines()[-1] == (
        "vllm: the run says nothing about the prediction, which is not about 0.33.0"
    )


def test_a_run_says_nothing_of_what_only_another_version_refuses() -> None:
    both = Target("vllm", ("0.32.0", "0.33.0"), "vllm")
    only_old = next(rule.id for rule in RULES.values() if rule.versions == ">=0.32,<0.33")
    found = Finding(file="x", where="", rule=only_old, message="no")

    assert other_version([found], both, "0.33.0+cu129") == "0.33.0+cu129"
    assert other_version([found], both, "0.32.0") is None
    assert other_version([], both, "0.33.0") is None
    assert other_version([found], both, "0.99.0") is None


@pytest.mark.parametrize(
    ("reached", "shown"), [("generate", "loads-but-wrong"), ("compare", "loads")]
)
def test_generating_does_not_undo_what_a_loader_left_out(reached: Level, shown: Prediction) -> None:
    finding = Finding(file="x", where="", rule="dry-missing", message="no")
    dry = DryOutcome(verdict="failed", tp=1, findings=[finding])
    run = EngineOutcome(engine="vllm", level="compare", verdict="passed", reached=reached)

    assert report_of("loads", run).model_copy(update={"dry": dry}).shown == shown


def test_nothing_is_asked_of_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stand_in(monkeypatch, "passed")
    result = invoke(str(tmp_path), "--engine", "vllm", "--format", "json")
    document = ValidationResult.model_validate_json(result.stdout)

    assert (document.level, engine.requests) == ("rules", [])


def test_no_kernel_is_never_a_pass(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who names an engine wants it shown; what was not shown fails."""
    stand_in(monkeypatch, "no-kernel")
    result = invoke(good, "--engine", "vllm")

    assert "observed: no kernel here" in result.stdout
    assert "passed" not in result.stdout
    assert result.exit_code == 1
    assert invoke(good, "--engine", "vllm", "--level", "rules").exit_code == 0


def test_engine_that_is_not_installed_exits_2(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "not-run")
    assert invoke(good, "--engine", "vllm").exit_code == 2


@pytest.mark.parametrize(
    ("predicted", "verdict", "reached", "expected"),
    [
        ("loads", "passed", "generate", "confirmed"),
        ("refuses", "passed", "load", "contradicted"),
        ("loads-but-wrong", "passed", "generate", "untested"),
        ("loads-but-wrong", "passed", "compare", "contradicted"),
        ("loads", "no-kernel", None, "untested"),
        ("refuses", "not-run", None, "untested"),
        ("unknown", "passed", "compare", "untested"),
    ],
)
def test_agreement_of_prediction_and_run(
    predicted: Prediction, verdict: Verdict, reached: Level | None, expected: str
) -> None:
    observed = EngineOutcome(engine="vllm", level="compare", verdict=verdict, reached=reached)

    assert agreement(report_of(predicted, observed)) == expected


def report_of(predicted: Prediction, observed: EngineOutcome) -> EngineReport:
    return EngineReport(engine="vllm", versions=["0.33.0"], predicted=predicted, observed=observed)


def failed_by(*rules: str) -> EngineOutcome:
    findings = [Finding(file="x", where="", rule=rule, message="no") for rule in rules]
    return EngineOutcome(engine="vllm", level="compare", verdict="failed", findings=findings)


@pytest.mark.parametrize(
    ("predicted", "rules", "expected"),
    [
        ("refuses", ["engine-refused"], "confirmed"),
        ("loads", ["engine-refused"], "contradicted"),
        ("loads-but-wrong", ["engine-refused"], "contradicted"),
        ("loads-but-wrong", ["compare-kl", "compare-top1"], "confirmed"),
        ("loads-but-wrong", ["compare-relative-error"], "confirmed"),
        ("loads-but-wrong", ["generate-nonfinite", "compare-nonfinite"], "confirmed"),
        ("loads", ["compare-kl"], "contradicted"),
        ("refuses", ["compare-kl"], "contradicted"),
    ],
)
def test_a_failure_confirms_only_what_it_shows(
    predicted: Prediction, rules: list[str], expected: str
) -> None:
    assert agreement(report_of(predicted, failed_by(*rules))) == expected


@pytest.mark.parametrize(
    ("rule", "predicted", "expected"),
    [
        ("dry-refused", "refuses", "confirmed"),
        ("dry-refused", "loads", "contradicted"),
        ("dry-missing", "loads-but-wrong", "confirmed"),
        ("dry-cast", "loads", "contradicted"),
        ("dry-unexpected", "loads", "untested"),
        ("dry-crashed", "loads", "untested"),
    ],
)
def test_what_a_dry_load_shows(rule: str, predicted: Prediction, expected: str) -> None:
    finding = Finding(file="x", where="", rule=rule, message="no")
    dry = DryOutcome(verdict="failed", tp=1, findings=[finding])
    report = EngineReport(engine="vllm", versions=["0.33.0"], predicted=predicted, dry=dry)

    assert agreement(report) == expected


def test_a_dry_load_that_passes_says_nothing_about_values() -> None:
    dry = DryOutcome(verdict="passed", tp=1)
    report = EngineReport(engine="vllm", versions=["0.33.0"], predicted="loads", dry=dry)

    assert agreement(report) == "untested"


@pytest.mark.parametrize("predicted", ["loads", "refuses", "loads-but-wrong"])
@pytest.mark.parametrize(
    "rules",
    [
        ["engine-crashed"],
        ["engine-timeout"],
        ["compare-reference"],
        ["compare-vocabulary"],
        ["compare-size"],
        ["generate-nonfinite", "compare-reference"],
    ],
)
def test_what_is_not_about_the_checkpoint_shows_nothing(
    predicted: Prediction, rules: list[str]
) -> None:
    assert agreement(report_of(predicted, failed_by(*rules))) == "untested"
