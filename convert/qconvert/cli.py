"""The command `qconvert`: words in, exit codes out. Data goes to stdout, words to stderr.

Exit codes: 0 done, 1 the conversion failed, 2 the command makes no sense, 130 interrupted.
"""

import contextlib
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Literal

import click

from qconvert.backends import resolve
from qconvert.convert import convert
from qconvert.errors import ConvertError, human
from qconvert.output import check_paths
from qconvert.pipeline import fitting_workers
from qconvert.planner import make_plan
from qconvert.progress import progress_bar
from qconvert.statistics import Statistics, open_statistics
from qconvert.summary import describe
from qschema import __version__
from qschema.checkpoint import open_checkpoint
from qschema.formats import UnknownFormatError, find, formats
from qschema.plan import Plan
from qschema.recipe import Recipe, Rule
from qschema.recipe_file import load_recipe
from qschema.strict import DocumentError, Json

_WRITABLE = [name for name, declared in formats().items() if not declared.read_only]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


class ByteSize(click.ParamType[int]):
    """A byte count: 268435456, 256MiB, 1GiB, 500MB."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", value.strip().upper())
        if match is None:
            self.fail(f"{value!r} is not a size; write 256MiB, 1GiB or a number of bytes")
        return int(float(match[1]) * _UNITS[match[2] or ""])


def _format_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        declared = find(value)
    except UnknownFormatError as error:
        raise click.BadParameter(str(error)) from None
    if declared.read_only:
        raise click.BadParameter(f"{value} is read, not written: {declared.read_only}")
    return declared.name


def _device_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
        raise click.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N")
    return value


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: qconvert Qwen3-8B Qwen3-8B-FP8 --algo FP8_PB_WO",
)
@click.argument("in_dir", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--algo", callback=_format_name, help=f"One format for all: {', '.join(_WRITABLE)}.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A recipe file, YAML or JSON.")
@click.option(
    "--amax",
    type=click.Path(path_type=Path),
    help="Calibration's statistics, JSON; for formats with a static scale of the input.",
)
@click.option(
    "--kv-cache",
    type=click.Choice(["FP8", "NVFP4", "NVFP4_AFFINE", "none"]),
    help="How engines keep keys and values; scales come from --amax.",
)
@click.option(
    "--on-indivisible",
    type=click.Choice(["refuse", "keep"]),
    help="A weight whose size its format can't have: an error (default), or kept as it is.",
)
@click.option(
    "--fail-if",
    multiple=True,
    metavar="GATE",
    help="Write nothing if a tensor meets this: 'sqnr<20' (dB), 'relative_error>0.1', "
    "'saturated>0.01'.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep these modules as they are.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Quantize despite the defaults.")
@click.option("--leave", multiple=True, metavar="PATTERN", help="Files not to copy.")
@click.option("--copy", multiple=True, metavar="PATTERN", help="Files to copy all the same.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    callback=_device_name,
    help="auto, cpu, cuda or cuda:N.",
)
@click.option("--workers", type=click.IntRange(1, 256), help="Default: suits the machine.")
@click.option(
    "--memory-budget",
    type=ByteSize(),
    default="1GiB",
    show_default=True,
    help="Bytes of weights in memory at once.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or Inf.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@click.version_option(__version__)
def qconvert(
    in_dir: Path,
    out_dir: Path,
    algo: str | None,
    recipe: Path | None,
    amax: Path | None,
    kv_cache: str | None,
    on_indivisible: Literal["refuse", "keep"] | None,
    fail_if: tuple[str, ...],
    exclude: tuple[str, ...],
    include: tuple[str, ...],
    leave: tuple[str, ...],
    copy: tuple[str, ...],
    device: str,
    workers: int | None,
    memory_budget: int,
    allow_nonfinite: bool,
    dry_run: bool,
    style: str,
    quiet: bool,
) -> None:
    """Convert the checkpoint in IN_DIR to a quantized one in OUT_DIR."""
    if algo is not None and recipe is None:
        asked = Recipe(rules=[Rule(match="*", algo=algo)])
    elif recipe is not None and algo is None:
        asked = load_recipe(recipe)
    elif algo is None and kv_cache not in (None, "none"):
        asked = Recipe.parse({"rules": [], "kv_cache": kv_cache}, file="the command line")
    else:
        raise click.UsageError("give either --algo or --recipe")
    changes: dict[str, Json] = {
        "exclude": [*asked.exclude, *exclude],
        "include": [*asked.include, *include],
        "leave": [*asked.leave, *leave],
        "copy_files": [*asked.copy_files, *copy],
        "fail_if": [*asked.fail_if, *fail_if],
        "allow_nonfinite": asked.allow_nonfinite or allow_nonfinite,
    }
    if on_indivisible is not None:
        changes["on_indivisible"] = on_indivisible
    if kv_cache is not None:
        changes["kv_cache"] = None if kv_cache == "none" else kv_cache
    asked = Recipe.parse({**asked.model_dump(mode="json"), **changes}, file="the command line")
    check_paths(in_dir, out_dir)
    checkpoint = open_checkpoint(in_dir)
    statistics = open_statistics(amax) if amax is not None else Statistics()
    plan = make_plan(checkpoint, asked, statistics)
    for note in plan.notes:
        click.echo(f"note: {_printable(note)}", err=True)
    if dry_run:
        _print_plan(plan, style)
        return
    target = resolve(device, codecs=sorted({find(algo).codec for algo in plan.algos}))
    if target.remark:
        click.echo(f"note: {target.remark}", err=True)
    with progress_bar(quiet=quiet) as watch:
        report = convert(
            checkpoint,
            plan,
            out_dir,
            statistics=statistics,
            device=target,
            workers=workers
            or fitting_workers(plan, wanted=target.default_workers, budget=memory_budget),
            budget=memory_budget,
            watch=watch,
        )
    if style == "json":
        click.echo(report.model_dump_json(indent=1))
    elif not quiet:
        click.echo(
            f"{out_dir}: {human(plan.output_nbytes())}, {report.bits_per_weight:.2f} bits per "
            f"weight, on {target.name}; check it with: qvalidate {out_dir} "
            f"--reference {in_dir}",
            err=True,
        )


def _print_plan(plan: Plan, style: str) -> None:
    if style == "json":
        click.echo(plan.model_dump_json(indent=1))
    else:
        for line in describe(plan):
            click.echo(_printable(line))


def _printable(text: str) -> str:
    """Return `text` with control characters, which a tensor's name may hold, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _allow_many_files() -> None:
    """Raise the limit of open files to what the system allows: a worker opens two per shard."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Run the command; errors of the user's world become one line each and an exit code."""
    # a scheduler's polite end cleans up as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _allow_many_files()
    try:
        qconvert(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("qconvert: interrupted; nothing was written", err=True)
        sys.stdout.flush()
        # all is cleaned up; torch, cut off in its work, may abort in the interpreter's own teardown
        os._exit(130)
    except DocumentError as error:
        lines = [_printable(str(finding)) for finding in error.findings]
        click.echo("qconvert: " + "\n".join(lines), err=True)
        sys.exit(1)
    except ConvertError as error:
        click.echo(f"qconvert: {_printable(str(error))}", err=True)
        sys.exit(1)
    except OSError as error:
        message = f"{error.filename}: {error.strerror or error}"
        click.echo(f"qconvert: {_printable(message)}", err=True)
        sys.exit(1)
