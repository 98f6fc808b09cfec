"""The commands `qconvert`, `qconvert plan` and `qconvert apply`: words in, exit codes out."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import click

from qconvert import cli_run
from qconvert.cli_options import (
    Machine,
    Running,
    Wanted,
    Words,
    machine_options,
    running_options,
    wanted_options,
    words_options,
)
from qconvert.cli_run import printable
from qconvert.cli_timings import check_timings
from qconvert.errors import ConvertError
from qconvert.output import check_paths
from qconvert.plan_file import (
    check_free,
    load_plan,
    name_of,
    plan_text,
    signed,
    source_of,
    statistics_of,
    verified,
    write_plan,
)
from qconvert.side_files import REPORT
from qconvert.summary import describe
from qschema import __version__
from qschema.strict import DocumentError

_SETTINGS = {"help_option_names": ["-h", "--help"]}
_PATH = click.Path(path_type=Path)


@click.command(
    context_settings=_SETTINGS,
    epilog="Example: qconvert Qwen3-8B Qwen3-8B-FP8 --algo FP8_PB_WO. In two steps: qconvert plan "
    "IN_DIR -o plan.json, then qconvert apply plan.json OUT_DIR (a directory of such a name is "
    "./plan).",
)
@click.argument("in_dir", type=_PATH)
@click.argument("out_dir", type=_PATH)
@wanted_options
@machine_options
@running_options
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@words_options
@click.version_option(__version__)
def qconvert(
    in_dir: Path,
    out_dir: Path,
    dry_run: bool,
    wanted: Wanted,
    machine: Machine,
    running: Running,
    words: Words,
) -> None:
    """Convert the checkpoint in IN_DIR to a quantized one in OUT_DIR.

    A run that was interrupted goes on where it was when the same command is given again.
    """
    asked = wanted.as_recipe()
    check_paths(in_dir, out_dir, known=REPORT)
    check_timings(running.timings, source=in_dir, output=out_dir)
    job = cli_run.planned(in_dir, asked, wanted.amax)
    cli_run.say_notes(job.plan)
    if not dry_run:
        cli_run.convert_and_say(job, out_dir, machine, running, words)
        return
    plan = cli_run.with_marks(job.plan, machine)
    with cli_run.to_stdout():
        if running.style == "json":
            click.echo(plan_text(signed(plan, in_dir, wanted.amax)), nl=False)
            return
        for line in describe(plan):
            click.echo(printable(line))


@click.command(
    "plan",
    context_settings=_SETTINGS,
    epilog="Example: qconvert plan Qwen3-8B --algo FP8_PB_WO -o Qwen3-8B-FP8.plan.json",
)
@click.argument("in_dir", type=_PATH)
@click.option(
    "-o", "--output", type=_PATH, metavar="FILE", help="Where to; stdout if - or left out."
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@wanted_options
@machine_options
@words_options
def plan(
    in_dir: Path, output: Path | None, force: bool, wanted: Wanted, machine: Machine, words: Words
) -> None:
    """Write down what a conversion of IN_DIR would do, tensor by tensor, for review and `apply`.

    Reads headers, no weights. Device, workers and budget decide only what it says of disk and
    memory.
    """
    file = None if output is None or str(output) == "-" else output
    asked = wanted.as_recipe()
    if file is not None:
        check_free(file, source=in_dir, force=force)
    job = cli_run.planned(in_dir, asked, wanted.amax)
    cli_run.say_notes(job.plan)
    made = cli_run.with_marks(job.plan, machine)
    made = signed(made, in_dir, wanted.amax)
    if file is None:
        with cli_run.to_stdout():
            click.echo(plan_text(made), nl=False)
    else:
        write_plan(file, made, source=in_dir, force=force)
    cli_run.say_marks(made, file, words)


@click.command(
    "apply",
    context_settings=_SETTINGS,
    epilog="Example: qconvert apply Qwen3-8B-FP8.plan.json Qwen3-8B-FP8",
)
@click.argument("plan_file", metavar="PLAN", type=_PATH)
@click.argument("out_dir", type=_PATH)
@click.option("--source", type=_PATH, help="The checkpoint, if it is not where the plan says.")
@click.option("--amax", type=_PATH, help="The statistics, if they are not where the plan says.")
@machine_options
@running_options
@words_options
def apply(
    plan_file: Path,
    out_dir: Path,
    source: Path | None,
    amax: Path | None,
    machine: Machine,
    running: Running,
    words: Words,
) -> None:
    """Do what PLAN says, in OUT_DIR. PLAN is a file, or - for standard input.

    The plan is made again first: a source, statistics or a plan that has changed is refused.
    """
    loaded, name = load_plan(plan_file), name_of(plan_file)
    in_dir, measured = source_of(loaded, name, source), statistics_of(loaded, name, amax)
    check_paths(in_dir, out_dir, known=REPORT)
    check_timings(running.timings, source=in_dir, output=out_dir)
    found = cli_run.opened(in_dir, measured)
    job = found.with_plan(
        verified(loaded, name, checkpoint=found.checkpoint, statistics=found.statistics)
    )
    # as large as the one that is run
    del loaded
    cli_run.say_notes(job.plan)
    cli_run.convert_and_say(job, out_dir, machine, running, words)


_COMMANDS = {"plan": plan, "apply": apply}


def run(words: list[str]) -> None:
    """Run the command; errors of the user's world become one line each and an exit code.

    Raises KeyboardInterrupt as it is.
    """
    _allow_many_files()
    command = _COMMANDS.get(words[0]) if words else None
    try:
        if command is None:
            qconvert(words, prog_name="qconvert", standalone_mode=False)
        else:
            command(words[1:], prog_name=f"qconvert {command.name}", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        raise KeyboardInterrupt from None
    except DocumentError as error:
        lines = [printable(str(finding)) for finding in error.findings]
        click.echo("qconvert: " + "\n".join(lines), err=True)
        sys.exit(1)
    except ConvertError as error:
        kept = f" ({error.kept} keeps what was done, for the next run)"
        click.echo(f"qconvert: {printable(str(error) + (kept if error.kept else ''))}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # whoever read our stdout has seen enough; the interpreter would flush it once more
        os._exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        click.echo(f"qconvert: {printable(place + (error.strerror or str(error)))}", err=True)
        sys.exit(1)


def _allow_many_files() -> None:
    """Raise the limit of open files to what the system allows: a worker opens two per shard."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
