"""The check of an engine's server, against a small HTTP server in its place."""

import re
import sys
from pathlib import Path

import pytest
from fake_server import install
from fake_vllm import checkpoint, is_gone

from qvalidate.engines import UnknownEngineError
from qvalidate.engines.serve import ServeOutcome, ServeRequest, serve_check


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the stand-ins, on the path of the processes that the check starts."""
    install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path / "site"


def served(folder: Path, *, kind: str = "good", timeout_s: float = 60.0) -> ServeOutcome:
    """Return the outcome for a new checkpoint of that kind, with a chat template."""
    checkpoint(folder, kind=kind)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    request = ServeRequest(
        engine="vllm", checkpoint=folder, python=sys.executable, timeout_s=timeout_s
    )
    return serve_check(request)


def test_a_server_that_answers_passes(site: Path, tmp_path: Path) -> None:
    outcome = served(tmp_path / "good")

    assert (outcome.verdict, outcome.findings) == ("passed", [])
    assert (outcome.completion, outcome.chat, outcome.chat_skipped) == (" Paris", "Paris.", "")
    assert outcome.version == "0.0-fake"
    assert outcome.ready_s is not None
    assert 0 < outcome.ready_s <= outcome.wall_s
    assert ServeOutcome.model_validate_json(outcome.model_dump_json()) == outcome


def test_chat_is_left_out_without_a_template(site: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "plain")
    (folder / "tokenizer_config.json").write_text('{"chat_template": null}')

    outcome = serve_check(ServeRequest(engine="vllm", checkpoint=folder, python=sys.executable))

    assert (outcome.verdict, outcome.findings, outcome.chat) == ("passed", [], None)
    assert outcome.chat_skipped == "the checkpoint has no chat template"


def test_a_template_in_the_tokenizer_config_is_found(site: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "inline")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')

    outcome = serve_check(ServeRequest(engine="vllm", checkpoint=folder, python=sys.executable))

    assert (outcome.verdict, outcome.chat) == ("passed", "Paris.")


@pytest.mark.parametrize(
    ("kind", "rules", "message"),
    [
        ("no-model", ["serve-models"], "expected a model with an id"),
        ("empty", ["serve-completions"], 'expected text, got $'),
        ("no-logprobs", ["serve-completions"], "no log-probabilities"),
        ("nan", ["serve-completions"], "NaN or Inf in the log-probabilities of 8 of 8 tokens"),
        ("usage", ["serve-completions", "serve-chat"], "expected usage with .* 8 completion_tok"),
        ("no-chat", ["serve-chat"], "expected text, got null"),
        ("status", ["serve-completions", "serve-chat"], "status 500: .*EngineDeadError: the"),
        (
            "dies",
            ["serve-completions", "serve-chat"],
            "no answer: RemoteDisconnected: .* ended: .* was loaded, .*RuntimeError: last",
        ),
    ],
)  # fmt: skip
def test_wrong_answers_fail(
    site: Path, tmp_path: Path, kind: str, rules: list[str], message: str
) -> None:
    outcome = served(tmp_path / kind, kind=kind)

    assert (outcome.verdict, [finding.rule for finding in outcome.findings]) == ("failed", rules)
    assert re.search(message, outcome.findings[0].message)


@pytest.mark.parametrize(
    ("kind", "verdict", "message"),
    [
        ("refused", "failed", "ValueError: Unknown ModelOpt quant algo: W4A16"),
        ("no-kernel", "no-kernel", "ValueError: Failed to find a kernel"),
        ("leaves", "failed", "SystemExit: 0"),
    ],
)
def test_a_server_that_does_not_start_is_told_by_its_words(
    site: Path, tmp_path: Path, kind: str, verdict: str, message: str
) -> None:
    outcome = served(tmp_path / kind, kind=kind)

    assert (outcome.verdict, outcome.ready_s) == (verdict, None)
    assert [finding.rule for finding in outcome.findings] == ["serve-not-ready"]
    assert message in outcome.findings[0].message


def test_time_over_is_not_ready_and_nothing_is_left(site: Path, tmp_path: Path) -> None:
    """The stand-in's child ignores SIGTERM, so that only a kill of the group ends it."""
    outcome = served(tmp_path / "slow", kind="never-ready", timeout_s=3)

    assert [finding.rule for finding in outcome.findings] == ["serve-not-ready"]
    assert "no answer in 3 s" in outcome.findings[0].message
    assert is_gone(int((tmp_path / "slow" / "pid").read_text()))


def test_no_child_survives_a_check_that_passed(site: Path, tmp_path: Path) -> None:
    outcome = served(tmp_path / "child", kind="child")

    assert outcome.verdict == "passed"
    assert is_gone(int((tmp_path / "child" / "pid").read_text()))


@pytest.mark.parametrize("python", ["no-such-python", "/bin/true"])
def test_without_the_engine_it_is_not_run(tmp_path: Path, python: str) -> None:
    folder = checkpoint(tmp_path / "good")

    outcome = serve_check(ServeRequest(engine="vllm", checkpoint=folder, python=python))

    assert (outcome.verdict, outcome.version) == ("not-run", None)
    assert [finding.rule for finding in outcome.findings] == ["engine-missing"]


def test_an_unknown_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownEngineError, match="unknown engine 'vlm'"):
        serve_check(ServeRequest(engine="vlm", checkpoint=tmp_path))
