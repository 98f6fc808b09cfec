"""What README shows of the converter is what it prints."""

import re
import shlex
from pathlib import Path

import pytest

from .test_cli import qconvert

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def section(name: str) -> str:
    return README.partition(f"## {name}")[2].partition("\n## ")[0]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(name), re.DOTALL)


def pattern(shown: str) -> str:
    """Return a regular expression in which "..." at the end of a line stands for any text."""
    lines = [re.escape(line) for line in shown.splitlines()]
    any_lines = re.escape("  ...")
    return "".join(
        r"(?:.*\n)+?" if line == any_lines else line.replace(r"\.\.\.", ".*") + r"\n"
        for line in lines
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty directory, now the current one, in which `fixtures` lies."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_commands_print_what_is_shown() -> None:
    (first,) = blocks("qconvert", "console")
    (second,) = blocks("Plans", "console")

    for part in (first + second).split("$ ")[1:]:
        command, _, shown = part.partition("\n")
        done = qconvert(*shlex.split(command)[1:], "--device", "cpu")
        printed = done.stdout + done.stderr

        assert done.returncode == 0
        assert re.match(pattern(shown), printed), printed


def test_the_recipe_converts(here: Path) -> None:
    (text,) = blocks("qconvert", "yaml")
    (here / "recipe.yaml").write_text(text)

    done = qconvert(
        "fixtures/checkpoints/llama", "out", "--recipe", "recipe.yaml",
        "--amax", "fixtures/amax/llama.json",
    )  # fmt: skip

    assert done.returncode == 0
    assert "note" not in done.stderr
