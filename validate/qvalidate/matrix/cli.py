"""The commands `qvalidate matrix`, which runs cells, and `qvalidate support`, which prints them."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import click

from qschema.strict import DocumentError
from qvalidate.matrix import ANY, DATA, GPU, Cell, read, text, write
from qvalidate.matrix.verify import (
    Bench,
    Case,
    VerifyError,
    cases,
    contradictions,
    installed_version,
    run,
)
from qvalidate.targets import KNOWN

_FIXTURES = Path(__file__).parents[3] / "fixtures"
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.option("--engine", type=click.Choice(list(KNOWN)), required=True)
@click.option("--gpu", metavar="SM", required=True, help="What it runs on: sm_90, ... or cpu.")
@click.option("--python", metavar="PATH", help="The engine's interpreter, if it has its own.")
@click.option(
    "--fixtures",
    type=_DIRECTORY,
    default=_FIXTURES,
    help="A folder with checkpoints/MODEL and amax/MODEL.json. Default: the checkout's.",
)
@click.option("--model", "models", multiple=True, help="Only these fixtures.")
@click.option("--format", "formats", multiple=True, help="Only these formats.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--timeout", type=click.FloatRange(min=1), default=600.0, show_default=True)
@click.option("--data", type=click.Path(dir_okay=False, path_type=Path), default=DATA)
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep all results.")
@click.pass_context
def matrix(
    context: click.Context,
    engine: str,
    gpu: str,
    python: str | None,
    fixtures: Path,
    models: tuple[str, ...],
    formats: tuple[str, ...],
    jobs: int,
    timeout: float,
    data: Path,
    keep: Path | None,
) -> None:
    """Convert fixtures, run them in a real engine, and put what came of it into the matrix.

    Exit status: 0 every run ended as the rules predict, 1 a run contradicts them, 2 misuse.

    \b
    $ qvalidate matrix --engine vllm --gpu sm_90 --python vllm-env/bin/python -j 8
    """
    if gpu == ANY or not re.search(GPU, gpu):
        # before the runs, not after
        raise click.UsageError(f"--gpu {gpu}: expected what it runs on: sm_90, sm_100, ... or cpu")
    try:
        known = read(data)
        wanted = cases(fixtures, models=models, wanted=formats)
        version = installed_version(engine, python)
    except (VerifyError, DocumentError, OSError) as error:
        raise click.UsageError(str(error)) from None
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qvalidate-matrix-") as work:
        bench = Bench(
            engine=engine,
            version=version,
            python=python,
            gpu=gpu,
            fixtures=fixtures,
            work=Path(work),
            timeout_s=timeout,
            commit=_commit(),
            keep=keep,
        )
        found = run(bench, wanted, jobs=jobs, watch=_show)
    if not found:
        raise click.UsageError("nothing was run: no fixture could be converted")
    try:
        write(known.with_cells(found), data)
    except OSError as error:
        raise click.UsageError(f"can't write {data}: {error.strerror or error}") from None
    wrong = list(contradictions(found))
    for line in wrong:
        click.echo(f"contradicts the rules: {line}", err=True)
    click.echo(f"{len(found)} cells of {engine} {version} in {data}", err=True)
    context.exit(1 if wrong else 0)


@click.command()
@click.option("--engine", type=click.Choice(list(KNOWN)))
@click.option("--format", "formats", multiple=True)
@click.option("--architecture", metavar="NAME", help="A part of its name.")
@click.option("--gpu", metavar="SM")
@click.option("--markdown", is_flag=True, help="The whole matrix as a page.")
@click.option("--data", type=click.Path(dir_okay=False, path_type=Path), default=DATA)
def support(
    engine: str | None,
    formats: tuple[str, ...],
    architecture: str | None,
    gpu: str | None,
    markdown: bool,
    data: Path,
) -> None:
    """Say what is known of engines, formats, architectures and GPUs, and how.

    \b
    $ qvalidate support --engine vllm --format NVFP4
    """
    try:
        known = read(data)
    except (DocumentError, OSError) as error:
        raise click.UsageError(str(error)) from None
    names = [name.upper() for name in formats]
    found = list(known.select(engine=engine, formats=names, architecture=architecture, gpu=gpu))
    if markdown:
        click.echo(text.markdown(found), nl=False)
    else:
        for line in text.lines(found):
            click.echo(line)
        if not found:
            there = sorted({cell.format for cell in known.cells})
            click.echo(f"nothing is known of that; there is {', '.join(there)}", err=True)


def _show(case: Case, cell: Cell | None) -> None:
    said = "can't be converted" if cell is None else f"{cell.state}: {text.why(cell)}"
    click.echo(f"{case.name}: {said}")


def _commit() -> str | None:
    """Return $COMMIT, else what git says of this checkout, else None."""
    if found := os.environ.get("COMMIT"):
        return found
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
