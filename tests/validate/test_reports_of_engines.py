"""What the reports make of dry loads, servers and tasks, and of a run of another version."""

import pytest
from report_samples import COMPARISON, engine, finding, outcome, result
from test_report_html import page
from test_reports import run_of, states, suites

from qvalidate.dry import DryOutcome
from qvalidate.engines.outcome import EngineOutcome
from qvalidate.engines.serve import ServeOutcome
from qvalidate.evaluate import EvalOutcome, TaskScore
from qvalidate.result import EngineReport, Result

DRY_MISSING = finding("dry-missing", "model.norm.weight", "nothing is written", file=".")
SERVE_FAILED = finding("serve-chat", "", "no text", file=".")
EVAL_DROP = finding("eval-drop", "", "mmlu acc: 0.2, the source has 0.8", file=".")
SCORE = TaskScore(task="mmlu", metric="acc", reference=0.8, candidate=0.2, drop=0.6)


def asked(
    *,
    dry: DryOutcome | None = None,
    served: ServeOutcome | None = None,
    evaluated: EvalOutcome | None = None,
    observed: EngineOutcome | None = None,
) -> EngineReport:
    parts = {"dry": dry, "served": served, "evaluated": evaluated}
    return engine("loads", observed).model_copy(update=parts)


def everything_failed() -> Result:
    """Return a result whose dry load, server and tasks failed."""
    report = asked(
        dry=DryOutcome(verdict="failed", tp=2, ranks_checked=2, findings=[DRY_MISSING]),
        served=ServeOutcome(engine="vllm", verdict="failed", findings=[SERVE_FAILED]),
        evaluated=EvalOutcome(
            engine="vllm", verdict="failed", limit=None, scores=[SCORE], findings=[EVAL_DROP]
        ),
        observed=outcome("passed", reached="generate", level="generate"),
    )
    return result(DRY_MISSING, SERVE_FAILED, EVAL_DROP, engines=(report,))


def test_dry_load_server_and_tasks_are_cases_of_the_engine() -> None:
    found = suites(everything_failed())
    cases = states(found["qvalidate.vllm"])

    assert {name: cases[name] for name in ("dry", "server", "tasks")} == dict.fromkeys(
        ("dry", "server", "tasks"), "failure"
    )
    assert not {"dry-missing", "serve-chat", "eval-drop"} & states(found["qvalidate.rules"]).keys()


def test_scores_of_tasks_are_properties() -> None:
    suite = suites(everything_failed())["qvalidate.vllm"]
    found = {item.attrib["name"]: item.attrib["value"] for item in suite.iter("property")}

    assert (found["mmlu acc"], found["mmlu acc of the source"]) == ("0.2", "0.8")


GENERATED = outcome("passed", reached="generate", level="generate")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("dry", "observed", "state"),
    [
        (DryOutcome(verdict="passed", tp=1), None, "passed"),
        (DryOutcome(verdict="unsupported", tp=1, message="no"), None, "error"),
        (DryOutcome(verdict="unsupported", tp=1, message="no"), GENERATED, "skipped"),
        (DryOutcome(verdict="no-engine", tp=1, message="no"), None, "error"),
    ],
)
def test_a_dry_load_that_shows_nothing_is_no_pass_unless_a_run_follows(
    dry: DryOutcome, observed: EngineOutcome | None, state: str, strict: bool
) -> None:
    given = result(engines=(asked(dry=dry, observed=observed),))
    suite = suites(given, strict=strict)["qvalidate.vllm"]

    assert states(suite)["dry"] == state
    is_red = any(found in ("failure", "error") for found in states(suite).values())
    assert is_red == (given.exit_code(strict=strict) != 0)


def test_sarif_describes_the_rules_of_dry_loads_servers_and_tasks() -> None:
    rules = run_of(everything_failed())["tool"]["driver"]["rules"]
    tags = {rule["id"]: rule["properties"]["tags"] for rule in rules}

    assert [tags[name] for name in ("dry-missing", "serve-chat", "eval-drop")] == [
        ["dry"],
        ["serve"],
        ["tasks"],
    ]


def test_sarif_names_what_the_engine_was_asked_for() -> None:
    (found,) = run_of(everything_failed())["properties"]["engines"]

    assert [found[part] for part in ("dry", "run", "server", "tasks")] == [
        "failed",
        "passed",
        "failed",
        "failed",
    ]


GARBLED = DryOutcome(version="0.33.0", verdict="failed", tp=2, findings=[DRY_MISSING])


def dry_card(report: EngineReport) -> str:
    return page(result(DRY_MISSING, engines=(report,))).text


def test_card_of_a_dry_load_says_what_it_rests_on() -> None:
    text = dry_card(engine("loads").model_copy(update={"dry": GARBLED}))

    assert "Loads, but wrong" in text
    assert "Seen in a dry load by vllm 0.33.0, from headers alone." in text
    assert "dry-missing : nothing of the checkpoint" in text


def test_generating_does_not_hide_what_the_loader_left_out() -> None:
    run = outcome("passed", level="generate", reached="generate")
    text = dry_card(engine("loads", run).model_copy(update={"dry": GARBLED}))

    assert "Seen in a dry load" in text
    assert "qvalidate explain dry-missing" in text


def test_card_names_server_and_tasks() -> None:
    parts = {
        "served": ServeOutcome(engine="vllm", verdict="passed", ready_s=3.0),
        "evaluated": EvalOutcome(engine="vllm", verdict="failed", limit=None, scores=[SCORE]),
    }
    run = outcome("passed", comparison=COMPARISON)
    text = page(result(engines=(engine("loads", run).model_copy(update=parts),))).text

    assert "server: passed, ready in 3.0 s" in text
    assert "tasks: failed: mmlu 0.2000 (source 0.8000)" in text
    assert "Nothing is left to do" not in text


def test_a_run_of_another_version_is_no_evidence() -> None:
    run = outcome("passed", comparison=COMPARISON)
    report = engine("refuses", run).model_copy(
        update={"other_version": "0.33.0", "agreement": "untested"}
    )
    text = page(result(engines=(report,))).text

    assert "Would refuse" in text
    assert "By the rules alone; a run of vllm (0.33.0, NVIDIA H200) is not what they are" in text
