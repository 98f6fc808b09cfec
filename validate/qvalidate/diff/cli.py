"""The qdiff command. Its exit status is that of diff."""

import math
from pathlib import Path
from typing import Literal

import click

from qschema.strict import DocumentError
from qvalidate import __version__
from qvalidate.diff import text
from qvalidate.diff.comparison import compare

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("a", type=_DIRECTORY)
@click.argument("b", type=_DIRECTORY)
@click.option(
    "--weights/--no-weights",
    default=True,
    show_default=True,
    help="Read the tensors; without them only headers, JSON and the files beside the shards.",
)
@click.option(
    "--max-error",
    type=float,
    default=0.0,
    show_default=True,
    help="Weights, and numbers beside them, up to this relative error count as the same.",
)
@click.option(
    "--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to a file."
)
@click.option("-q", "--quiet", is_flag=True, help="No words on stderr, no spelling, no notes.")
@click.option("-v", "--verbose", is_flag=True, help="Every tensor, layer and module.")
@click.option(
    "--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def main(
    context: click.Context,
    a: Path,
    b: Path,
    weights: bool,
    max_error: float,
    style: Literal["text", "json"],
    output: Path | None,
    quiet: bool,
    verbose: bool,
    color: Literal["auto", "always", "never"],
) -> None:
    """Say what differs in meaning between the checkpoints A and B, quantized or not.

    Weights are compared as numbers, each decoded by its own format. What is only written
    differently (upper case, order, sharding) is said, and is no difference.

    Exit status: 0 the same, 1 different, 2 misuse (also a checkpoint that can't be read).

    \b
    $ qdiff my-model-fp8 my-model-nvfp4
    quantization
      format: FP8 -> NVFP4
      ...
    """
    if not (max_error >= 0 and math.isfinite(max_error)):
        raise click.UsageError(f"--max-error {max_error}: expected a number from 0 up")
    try:
        result = compare(a, b, weights=weights, max_error=max_error)
    except DocumentError as error:
        click.echo(str(error), err=True)
        context.exit(2)
    except ModuleNotFoundError as error:
        extra = "convert" if error.name == "torch" else "validate"
        needs = f"these weights need {error.name}: pip install 'qconvert[{extra}]', or --no-weights"
        raise click.UsageError(needs) from None
    except OSError as error:
        message = f"can't read {error.filename or f'{a} or {b}'}: {error.strerror or error}"
        raise click.UsageError(message) from None
    if style == "json":
        report = result.model_dump_json(indent=2)
    else:
        report = "\n".join(text.lines(result, quiet=quiet, verbose=verbose))
    wants_color = None if color == "auto" else color == "always"
    if output is not None:
        _write(output, report if wants_color else click.unstyle(report))
    elif report:
        click.echo(report, color=wants_color)
    if not quiet:
        click.echo(text.summary(result), err=True)
        if (hint := text.hint(result)) is not None:
            click.echo(f"hint: {hint}", err=True)
    context.exit(result.exit_code)


def _write(output: Path, report: str) -> None:
    try:
        output.write_text(f"{report}\n" if report else "")
    except OSError as error:
        raise click.UsageError(f"can't write {output}: {error.strerror or error}") from None
