"""`qvalidate fix`: the repairs as text or JSON. What is repaired is decided elsewhere."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click

from qschema.strict import DocumentError
from qvalidate.fix.output import FixError
from qvalidate.fix.repair import FixReport
from qvalidate.fix.run import fix as run_fix

# repairs of one kind that are shown without -v
_SHOWN = 10


@click.command()
@click.argument("ckpt", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Say what would be repaired; write nothing.")
@click.option(
    "--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.option("-v", "--verbose", is_flag=True, help="All repairs of every kind.")
@click.pass_context
def fix(
    context: click.Context,
    ckpt: Path,
    out_dir: Path,
    dry_run: bool,
    style: Literal["text", "json"],
    verbose: bool,
) -> None:
    """Repair the metadata of the checkpoint CKPT into the new directory OUT_DIR.

    Names, ranks, exclusions, spelling, missing JSON files, the index. No value of a weight changes;
    shards that stay are hard links, so that neither directory may be edited in place.

    Exit status: 0 repaired or nothing to do, 1 an error is left, 2 misuse or not readable at all.

    \b
    $ qvalidate fix my-model-fp8 my-model-fixed
    config.json::$.quantization_config.quant_method: method-corrected: nothing -> "modelopt" (...)
    """
    # a scheduler's polite end cleans up as Ctrl-C does
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run_fix(ckpt, out_dir, dry_run=dry_run)
    except FixError as error:
        raise click.UsageError(str(error)) from None
    except DocumentError as error:
        raise click.UsageError(f"{ckpt}: can't be repaired\n{error}") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"can't make {out_dir}: {where}{error.strerror or error}"
        raise click.UsageError(message) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if style == "json":
        click.echo(report.model_dump_json(indent=2))
    else:
        click.echo("\n".join(lines(report, verbose=verbose)))
    click.echo(summary(report), err=True)
    context.exit(report.exit_code)


def lines(report: FixReport, *, verbose: bool) -> Iterator[str]:
    """Yield the repairs, what is left, and how often each rule found something before and after."""
    seen: Counter[str] = Counter()
    totals = Counter(repair.id for repair in report.repairs)
    for repair in report.repairs:
        seen[repair.id] += 1
        if verbose or seen[repair.id] <= _SHOWN:
            yield str(repair)
        elif seen[repair.id] == _SHOWN + 1:
            yield f"... and {totals[repair.id] - _SHOWN} more of {repair.id} (-v shows them)"
    yield from map(str, report.left)
    before = Counter((found.rule, found.severity) for found in report.before)
    after = Counter((found.rule, found.severity) for found in report.after)
    for rule, severity in sorted(before | after):
        key = (rule, severity)
        yield f"{rule} ({severity}): {before[key]} before, {after[key]} after"
    yield from (f"note: {note}" for note in report.notes)


def summary(report: FixReport) -> str:
    """Return the one line that a person reads last."""
    errors = sum(found.severity == "error" for found in report.after)
    what = report.output or f"{report.checkpoint} (dry run, nothing was written)"
    left = f", {errors} errors are left" if errors else ""
    count = len(report.repairs)
    return f"{what}: {count} repair{'' if count == 1 else 's'}{left}"
