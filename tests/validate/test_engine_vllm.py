"""The adapter against a stand-in for vLLM: a tiny package that behaves as config.json says."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_vllm import checkpoint, install, is_gone, run
from pydantic import ValidationError

from qvalidate.engines import ENGINES, EngineOutcome, EngineRequest, UnknownEngineError, get
from qvalidate.engines.interpreter import environment
from qvalidate.engines.outcome import Level
from qvalidate.engines.vllm import ENGINE

REFERENCE = """
import sys

replaced = []

def install():
    assert not hasattr(sys.modules["vllm"].LLM, "made")
    replaced.append("scaled_fp8_quant")

def used():
    return replaced
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the stand-ins, on the path of the processes that the adapter starts."""
    install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path / "site"


def test_unknown_engine_names_what_exists() -> None:
    with pytest.raises(UnknownEngineError, match="'vlm'; there is vllm, sglang"):
        get("vlm")

    assert [get(name).name for name in ENGINES] == list(ENGINES)


def test_compare_needs_a_reference() -> None:
    with pytest.raises(ValidationError, match="needs a reference"):
        EngineRequest(checkpoint=Path("x"), level="compare")


@pytest.mark.parametrize("level", ["load", "generate"])
def test_passed(site: Path, tmp_path: Path, level: Level) -> None:
    outcome = run(checkpoint(tmp_path / "good"), level=level)

    assert (outcome.verdict, outcome.reached, outcome.findings) == ("passed", level, [])
    assert (outcome.version, outcome.torch) == ("0.0-fake", "0.0-fake")
    assert outcome.message == ""
    assert outcome.tokens == ([] if level == "load" else [[1] * 8] * 6)
    assert all(0 <= token < 11 for ids in outcome.prompts for token in ids)
    assert EngineOutcome.model_validate_json(outcome.model_dump_json()) == outcome


def test_compared_with_itself(site: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "good")

    outcome = run(good, level="compare", reference=good)

    assert (outcome.verdict, outcome.reached, outcome.findings) == ("passed", "compare", [])
    assert outcome.comparison is not None
    assert outcome.comparison.num_positions == sum(len(ids) - 1 for ids in outcome.prompts)
    assert (outcome.comparison.vocab, outcome.comparison.relative_error) == (11, 0.0)


def test_far_from_the_reference_fails_with_numbers(site: Path, tmp_path: Path) -> None:
    far = checkpoint(tmp_path / "far", factor=-2.0)
    good = checkpoint(tmp_path / "good")

    outcome = run(far, level="compare", reference=good)

    rules = [finding.rule for finding in outcome.findings]
    assert (outcome.verdict, outcome.reached) == ("failed", "compare")
    assert rules == ["compare-kl", "compare-top1", "compare-relative-error"]
    assert "3.000 over 138 positions; at most 0.4 expected" in outcome.findings[2].message


def test_reference_with_another_vocabulary(site: Path, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "good")
    wider = checkpoint(tmp_path / "wider", vocab=13)

    outcome = run(good, level="compare", reference=wider)

    assert (outcome.verdict, outcome.reached) == ("failed", "generate")
    assert [finding.rule for finding in outcome.findings] == ["compare-vocabulary"]
    assert "11 tokens, the reference's 13" in outcome.findings[0].message


def test_reference_that_fails_is_named(site: Path, tmp_path: Path) -> None:
    bad = checkpoint(tmp_path / "bad", kind="refused")

    outcome = run(checkpoint(tmp_path / "good"), level="compare", reference=bad)

    assert (outcome.verdict, outcome.reached) == ("failed", "generate")
    assert [(f.file, f.rule) for f in outcome.findings] == [(str(bad), "compare-reference")]
    assert "engine-refused: ModelOpt currently only supports" in outcome.findings[0].message


def test_reference_with_nan_is_named(site: Path, tmp_path: Path) -> None:
    bad = checkpoint(tmp_path / "bad", kind="nan")

    outcome = run(checkpoint(tmp_path / "good"), level="compare", reference=bad)

    assert [(f.file, f.rule) for f in outcome.findings] == [(str(bad), "compare-reference")]


@pytest.mark.parametrize(
    ("kind", "verdict", "rule", "message"),
    [
        ("refused", "failed", "engine-refused", r"^ModelOpt .*: \['FP8'\] quantizations$"),
        ("no-kernel", "no-kernel", "engine-no-kernel", "ValueError: Failed to find a kernel"),
        ("child-failed", "failed", "engine-refused", "KeyError: 'w2_bias'"),
        ("out-of-memory", "failed", "engine-crashed", "out of memory"),
        ("exit", "failed", "engine-crashed", "status 3 and no result; .*RuntimeError: last"),
        ("done", "failed", "engine-crashed", "status 0 and no result; the checkpoint was being"),
        ("signal", "failed", "engine-crashed", "killed by SIGABRT"),
        ("leave", "failed", "engine-refused", "SystemExit: no"),
        ("crash-late", "failed", "engine-crashed", "found BFloat16; the checkpoint was loaded"),
        ("short", "failed", "engine-crashed", "10 of 11 log-probabilities"),
    ],
)  # fmt: skip
def test_failures_are_told_apart(
    site: Path, tmp_path: Path, kind: str, verdict: str, rule: str, message: str
) -> None:
    good = checkpoint(tmp_path / "good")

    outcome = run(checkpoint(tmp_path / kind, kind=kind), level="compare", reference=good)

    assert outcome.verdict == verdict
    assert [finding.rule for finding in outcome.findings] == [rule]
    assert re.search(message, outcome.message)
    assert outcome.findings[0].message == outcome.message
    assert outcome.findings[0].severity == "error"


def test_refusal_names_the_tensor_in_hand(site: Path, tmp_path: Path) -> None:
    outcome = run(checkpoint(tmp_path / "bad", kind="scale-rank"), level="load")

    assert [finding.where for finding in outcome.findings] == ["model.layers.0.o_proj.weight_scale"]
    assert "assert loaded_weight.shape == (4,)" in outcome.message
    assert outcome.message.endswith("while loading model.layers.0.o_proj.weight_scale [4, 1]")


def test_nan_never_passes(site: Path, tmp_path: Path) -> None:
    bad = checkpoint(tmp_path / "bad", kind="nan")

    generated = run(bad)
    compared = run(bad, level="compare", reference=checkpoint(tmp_path / "good"))

    assert generated.verdict == compared.verdict == "failed"
    assert [f.rule for f in generated.findings] == ["generate-nonfinite"]
    assert [f.rule for f in compared.findings] == ["generate-nonfinite", "compare-nonfinite"]


def test_reference_kernels_are_installed_before_the_load_and_reported(
    site: Path, tmp_path: Path
) -> None:
    """The stand-in for the kernels refuses to be installed before vLLM is imported."""
    file = tmp_path / "reference_vllm.py"
    file.write_text(REFERENCE)
    engine = dataclasses.replace(ENGINE, reference_kernels=(str(file),))
    good = checkpoint(tmp_path / "good")

    outcome = engine.run(
        EngineRequest(checkpoint=good, python=sys.executable, kernels="reference", timeout_s=60)
    )

    assert (outcome.verdict, outcome.kernels) == ("passed", ["scaled_fp8_quant"])


def test_native_kernels_are_left_alone(site: Path, tmp_path: Path) -> None:
    assert run(checkpoint(tmp_path / "good"), level="load").kernels == []


def test_noise_on_stdout_changes_nothing(site: Path, tmp_path: Path) -> None:
    assert run(checkpoint(tmp_path / "noisy", kind="noise")).verdict == "passed"


def test_a_long_log_is_not_kept_on_disk(site: Path, tmp_path: Path) -> None:
    """The stand-in writes 64 MiB, and then says how much lies in its folder."""
    outcome = run(checkpoint(tmp_path / "chatty", kind="chatty"))

    assert outcome.message == "ValueError: 0 MiB of files"


@pytest.mark.parametrize("level", ["load", "generate"])
@pytest.mark.parametrize("program", ["true", "cat", "false"])
def test_a_program_that_is_no_engine_never_passes(
    tmp_path: Path, program: str, level: Level
) -> None:
    request = EngineRequest(
        checkpoint=checkpoint(tmp_path / "good"), python=f"/bin/{program}", level=level
    )

    outcome = get("vllm").run(request)

    assert (outcome.verdict, outcome.reached) == ("not-run", None)
    assert [finding.rule for finding in outcome.findings] == ["engine-missing"]
    assert "and no result" in outcome.message


def test_pythonpath_is_for_our_interpreter_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    other = tmp_path / "python"
    other.symlink_to(os.path.realpath(sys.executable))

    assert environment({}, python=sys.executable)["PYTHONPATH"] == "/somewhere"
    assert "PYTHONPATH" not in environment({}, python=str(other))


def test_helpers_are_found_where_python_hides_the_script_folder(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")

    assert run(checkpoint(tmp_path / "good"), level="load").verdict == "passed"


def test_sigterm_ends_engine_and_folder(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = checkpoint(tmp_path / "hanging", kind="hang")
    os.mkfifo(hanging / "pid")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, sys.path)]))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    command = [sys.executable, "-m", "qvalidate.engines", "vllm", str(hanging)]
    with subprocess.Popen([*command, "--python", sys.executable]) as caller:
        pid = int((hanging / "pid").read_text())
        caller.terminate()

    assert caller.returncode == 128 + signal.SIGTERM
    assert is_gone(pid)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_sigterm_is_as_it_was_after_a_run(site: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(checkpoint(tmp_path / "good"), level="load")

    assert signal.getsignal(signal.SIGTERM) is before


def test_timeout_leaves_no_process(site: Path, tmp_path: Path) -> None:
    """The stand-in's child ignores SIGTERM, so that only a kill of the group ends it."""
    hanging = checkpoint(tmp_path / "hanging", kind="hang")

    outcome = run(hanging, timeout_s=3)

    assert outcome.verdict == "failed"
    assert [finding.rule for finding in outcome.findings] == ["engine-timeout"]
    assert "no answer in 3 s; the checkpoint was being loaded" in outcome.message
    assert is_gone(int((hanging / "pid").read_text()))


def test_children_of_an_engine_that_passed_are_ended(site: Path, tmp_path: Path) -> None:
    leaving = checkpoint(tmp_path / "leaving", kind="orphan")

    outcome = run(leaving)

    assert outcome.verdict == "passed"
    assert is_gone(int((leaving / "pid").read_text()))


def test_engine_does_not_outlive_its_caller(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is killed with SIGKILL while the engine hangs; nothing is left of the engine."""
    hanging = checkpoint(tmp_path / "hanging", kind="hang")
    os.mkfifo(hanging / "pid")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, sys.path)]))
    # nobody is left to remove its folder
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "qvalidate.engines", "vllm", str(hanging)]
    with subprocess.Popen([*command, "--python", sys.executable]) as caller:
        pid = int((hanging / "pid").read_text())
        caller.kill()

    assert is_gone(pid)


@pytest.mark.parametrize("python", [None, "no-such-python"])
def test_missing_interpreter_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str | None
) -> None:
    """As for an interpreter without vLLM, so for a name that is no program."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    request = EngineRequest(checkpoint=checkpoint(tmp_path / "good"), python=python)

    outcome = get("vllm").run(request)

    assert (outcome.verdict, outcome.version) == ("not-run", None)
    assert [finding.rule for finding in outcome.findings] == ["engine-missing"]
    assert "--python" in outcome.message


def test_interpreter_without_the_engine_is_not_run(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty folder called vllm on the path can be imported, but is no engine."""
    (tmp_path / "empty" / "vllm").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "empty"))

    outcome = run(checkpoint(tmp_path / "good"))

    assert outcome.verdict == "not-run"
    assert [finding.rule for finding in outcome.findings] == ["engine-missing"]
    assert "pip install vllm" in outcome.message
