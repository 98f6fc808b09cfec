"""The TensorRT-LLM adapter against a stand-in: nobody has run it with the engine itself."""

import sys
from pathlib import Path

import pytest
from fake_tensorrt_llm import checkpoint, install, run

from qvalidate.engines.outcome import Level
from qvalidate.engines.serve import ServeRequest, serve_check

PYTHON = sys.executable


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the stand-ins, on the path of the processes that the adapter starts."""
    install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.mark.parametrize("level", ["load", "generate"])
def test_passed(site: Path, tmp_path: Path, level: Level) -> None:
    outcome = run(checkpoint(tmp_path / "good"), level=level)

    assert (outcome.verdict, outcome.reached, outcome.findings) == ("passed", level, [])
    assert (outcome.engine, outcome.version) == ("tensorrt-llm", "0.0-fake")
    assert outcome.tokens == ([] if level == "load" else [[1] * 8] * 6)


def test_logits_become_log_probabilities_of_the_vocabulary(site: Path, tmp_path: Path) -> None:
    """The padding, with the largest logits of all, is left out of the perplexity."""
    good = checkpoint(tmp_path / "good")

    outcome = run(good, level="compare", reference=good)

    assert (outcome.verdict, outcome.findings) == ("passed", [])
    assert outcome.comparison is not None
    assert outcome.comparison.num_positions == sum(len(ids) - 1 for ids in outcome.prompts)
    assert outcome.comparison.vocab == 11
    assert 1 < outcome.comparison.perplexity_candidate < 50


def test_far_from_the_reference_fails(site: Path, tmp_path: Path) -> None:
    far = checkpoint(tmp_path / "far", factor=-2.0)

    outcome = run(far, level="compare", reference=checkpoint(tmp_path / "good"))

    rules = [finding.rule for finding in outcome.findings]
    assert rules == ["compare-kl", "compare-top1", "compare-relative-error"]


def test_log_probabilities_may_be_plain_numbers(site: Path, tmp_path: Path) -> None:
    assert run(checkpoint(tmp_path / "numbers", kind="numbers")).verdict == "passed"


def test_nan_never_passes(site: Path, tmp_path: Path) -> None:
    bad = checkpoint(tmp_path / "bad", kind="nan")

    outcome = run(bad, level="compare", reference=checkpoint(tmp_path / "good"))

    assert [f.rule for f in outcome.findings] == ["generate-nonfinite", "compare-nonfinite"]


@pytest.mark.parametrize(
    ("kind", "verdict", "rule", "message"),
    [
        ("refused", "failed", "engine-refused", "QuantConfig has no field quantized_layers"),
        ("no-kernel", "no-kernel", "engine-no-kernel", "NVFP4 is not supported on SM90"),
        ("no-logits", "failed", "engine-crashed", "gave no context logits"),
    ],
)
def test_failures_are_told_apart(
    site: Path, tmp_path: Path, kind: str, verdict: str, rule: str, message: str
) -> None:
    good = checkpoint(tmp_path / "good")

    outcome = run(checkpoint(tmp_path / kind, kind=kind), level="compare", reference=good)

    assert (outcome.verdict, [f.rule for f in outcome.findings]) == (verdict, [rule])
    assert message in outcome.message


def test_the_server_is_what_trtllm_serve_runs(site: Path, tmp_path: Path) -> None:
    """The stand-in for the server says what it was called with, but for the path."""
    commands = site / "tensorrt_llm" / "commands"
    commands.mkdir()
    words = "[sys.argv[1], *sys.argv[3:]]"
    (commands / "serve.py").write_text(f"import sys\nraise ValueError(' '.join({words}))\n")
    good = checkpoint(tmp_path / "good")

    outcome = serve_check(ServeRequest(engine="tensorrt-llm", checkpoint=good, python=PYTHON))

    assert [finding.rule for finding in outcome.findings] == ["serve-not-ready"]
    message = outcome.findings[0].message
    assert message.startswith("ValueError: serve --host=127.0.0.1 --port=")
    assert message.endswith("--extra_llm_api_options=serve.yaml")
