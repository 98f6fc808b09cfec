"""The examples of docs/ci.md, carried out in a sample repository that holds a checkpoint."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from catalogue import PC_PT
from checkpoints import draft

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text()


def example(heading: str) -> dict[str, object]:
    """Return the YAML block under a heading of the page."""
    found = re.search(rf"## {heading}\n.*?```yaml\n(.*?)```", PAGE, re.S)
    assert found is not None
    document = yaml.safe_load(found[1])
    assert isinstance(document, dict)
    return document


def action() -> dict[str, object]:
    document = yaml.safe_load((ROOT / "action.yml").read_text())
    assert isinstance(document, dict)
    return document


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A repository with a right checkpoint in `model`."""
    draft("llama", PC_PT).write(tmp_path / "model")
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def run_action(sample: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """Carry out the steps of action.yml as a runner does."""
    document = action()
    declared = document["inputs"]
    assert isinstance(declared, dict)
    given = {name: str(spec.get("default", "")) for name, spec in declared.items()} | inputs
    commands = Path(sys.executable).parent
    done = None
    for step in document["runs"]["steps"]:  # type: ignore[index]
        environment = {
            name: re.sub(
                r"\$\{\{ (?:inputs\.(\w+)|github\.action_path) \}\}",
                lambda match: given[match[1]] if match[1] else str(ROOT),
                value,
            )
            for name, value in step["env"].items()
        }
        path = f"{commands}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [step["shell"], "-e", "-c", step["run"]],
            cwd=sample,
            env={**os.environ, **environment, "PATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            break
    assert done is not None
    return done


def steps() -> list[dict[str, object]]:
    jobs = example("GitHub Actions")["jobs"]
    assert isinstance(jobs, dict)
    found: list[dict[str, object]] = jobs["deploys"]["steps"]
    return found


def inputs() -> dict[str, str]:
    (step,) = [step for step in steps() if "qconvert" in str(step["uses"])]
    found = step["with"]
    assert isinstance(found, dict)
    return found


def test_the_workflow_gives_the_action_inputs_that_it_has() -> None:
    declared = action()["inputs"]
    assert isinstance(declared, dict)

    assert set(inputs()) <= set(declared)
    uploaded = {str(step.get("with", {})) for step in steps()}  # type: ignore[call-overload]
    assert any(declared["sarif"]["default"] in words for words in uploaded)
    assert any(declared["html"]["default"] in words for words in uploaded)


def test_a_right_checkpoint_passes_and_leaves_its_reports(sample: Path) -> None:
    done = run_action(sample, checkpoint="model", engine="vllm>=0.33", arguments="--tp 2")

    assert done.returncode == 0, done.stderr
    assert json.loads((sample / "qvalidate.sarif").read_text())["version"] == "2.1.0"
    assert (sample / "qvalidate.html").read_text().startswith("<!DOCTYPE html>")


def test_the_workflows_engines_are_checked(sample: Path) -> None:
    """SGLang 0.5.17 refuses per-channel FP8, so the example as it stands fails on it."""
    done = run_action(sample, **inputs())

    assert done.returncode == 1
    assert "sglang: predicted: refuses" in done.stdout
    assert "vllm: predicted: loads" in done.stdout


def test_the_hooks_of_the_example_pass_and_fail(sample: Path) -> None:
    """Each hook's entry, on the files that its pattern picks, as pre-commit does."""
    repos = example("pre-commit")["repos"]
    assert isinstance(repos, list)
    wanted = {hook["id"] for hook in repos[0]["hooks"]}
    known = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    hooks = {hook["id"]: hook for hook in known}
    assert wanted <= hooks.keys()
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=sample, capture_output=True, text=True, check=True
    ).stdout.split()

    def run(identifier: str) -> int:
        hook = hooks[identifier]
        files = [name for name in tracked if re.search(hook["files"], name)]
        assert files, identifier
        command = [str(Path(sys.executable).parent / hook["entry"].split()[0])]
        argv = [*command, *hook["entry"].split()[1:], *files]
        return subprocess.run(argv, cwd=sample, capture_output=True).returncode

    assert {identifier: run(identifier) for identifier in wanted} == dict.fromkeys(wanted, 0)
    config = sample / "model" / "config.json"
    config.write_text(config.read_text().replace('"quant_algo"', '"quant_algorithm"'))
    assert run("qschema-config") == 1
