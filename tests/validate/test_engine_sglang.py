"""The SGLang adapter against a stand-in whose scheduler is a process of its own."""

import re
import sys
from pathlib import Path

import pytest
from fake_sglang import SERVER_STRUCT, checkpoint, install, run

from qvalidate.engines import EngineRequest, get
from qvalidate.engines.outcome import Level
from qvalidate.engines.serve import ServeRequest, serve_check


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
    assert (outcome.engine, outcome.version, outcome.torch) == ("sglang", "0.0-fake", "0.0-fake")
    assert outcome.kernels == []
    assert outcome.tokens == ([] if level == "load" else [[1] * 8] * 6)


def test_compared_with_itself(site: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "good")

    outcome = run(good, level="compare", reference=good)

    assert (outcome.verdict, outcome.reached, outcome.findings) == ("passed", "compare", [])
    assert outcome.comparison is not None
    assert outcome.comparison.num_positions == sum(len(ids) - 1 for ids in outcome.prompts)
    assert (outcome.comparison.vocab, outcome.comparison.relative_error) == (11, 0.0)


def test_far_from_the_reference_fails(site: Path, tmp_path: Path) -> None:
    far = checkpoint(tmp_path / "far", factor=-2.0)

    outcome = run(far, level="compare", reference=checkpoint(tmp_path / "good"))

    rules = [finding.rule for finding in outcome.findings]
    assert rules == ["compare-kl", "compare-top1", "compare-relative-error"]


def test_arguments_that_a_version_lacks_are_left_out(site: Path, tmp_path: Path) -> None:
    """SGLang 0.5.23 keeps its arguments in a msgspec struct, 0.5.17 in a dataclass."""
    (site / "sglang" / "srt" / "server_args.py").write_text(SERVER_STRUCT)

    assert run(checkpoint(tmp_path / "good")).verdict == "passed"


@pytest.mark.parametrize(
    ("kind", "verdict", "rule", "message"),
    [
        ("refused", "failed", "engine-refused", r"^ValueError: ModelOptFp8Config only supports"),
        ("no-kernel", "no-kernel", "engine-no-kernel", "not supported for the current GPU"),
        ("killed", "failed", "engine-crashed", r"died during initialization \(exit code: -9\)"),
        ("crash-late", "failed", "engine-crashed", "found BFloat16; the checkpoint was loaded"),
        ("short", "failed", "engine-crashed", "10 of 11 log-probabilities"),
    ],
)
def test_failures_of_the_scheduler_are_told_apart(
    site: Path, tmp_path: Path, kind: str, verdict: str, rule: str, message: str
) -> None:
    good = checkpoint(tmp_path / "good")

    outcome = run(checkpoint(tmp_path / kind, kind=kind), level="compare", reference=good)

    assert (outcome.verdict, [f.rule for f in outcome.findings]) == (verdict, [rule])
    assert re.search(message, outcome.message)


def test_refusal_names_the_tensor_that_the_scheduler_had_in_hand(
    site: Path, tmp_path: Path
) -> None:
    outcome = run(checkpoint(tmp_path / "bad", kind="scale-rank"), level="load")

    assert [finding.where for finding in outcome.findings] == ["model.layers.0.o_proj.weight_scale"]
    assert outcome.message.endswith("while loading model.layers.0.o_proj.weight_scale [4, 1]")


def test_nan_never_passes(site: Path, tmp_path: Path) -> None:
    bad = checkpoint(tmp_path / "bad", kind="nan")

    outcome = run(bad, level="compare", reference=checkpoint(tmp_path / "good"))

    assert [f.rule for f in outcome.findings] == ["generate-nonfinite", "compare-nonfinite"]


def test_an_installation_that_can_not_be_imported_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libcuda.so.1 not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    outcome = run(checkpoint(tmp_path / "good"))

    assert (outcome.verdict, outcome.version) == ("not-run", None)
    assert outcome.message.startswith("ImportError: libcuda.so.1 not found; pip install sglang")


def test_there_are_no_reference_kernels(tmp_path: Path) -> None:
    request = EngineRequest(checkpoint=checkpoint(tmp_path / "good"), kernels="reference")

    outcome = get("sglang").run(request)

    assert (outcome.verdict, outcome.message) == (
        "not-run",
        "there are no reference kernels for sglang",
    )


def test_the_server_is_started_with_what_the_version_knows(site: Path, tmp_path: Path) -> None:
    """The stand-in for the server says what it was called with."""
    server = site / "sglang" / "launch_server.py"
    server.write_text("import sys\nraise ValueError(' '.join(sys.argv[1:]))\n")
    good = checkpoint(tmp_path / "good")

    outcome = serve_check(ServeRequest(engine="sglang", checkpoint=good, python=sys.executable))

    assert [finding.rule for finding in outcome.findings] == ["serve-not-ready"]
    found = outcome.findings[0].message
    assert re.match(
        rf"ValueError: --model-path {good} --context-length 128 --nccl-port \d+$", found
    )
