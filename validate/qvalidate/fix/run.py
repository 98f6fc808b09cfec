"""One whole repair: open, plan, write, and hold the rules against what was and what is."""

from pathlib import Path

from qschema.strict import Finding
from qvalidate.context import Context
from qvalidate.fix.opening import opened_for_repair
from qvalidate.fix.output import apply, check_output
from qvalidate.fix.plan import plan_repairs
from qvalidate.fix.repair import FixReport
from qvalidate.loader import load
from qvalidate.rules import run as run_rules


def fix(path: Path, output: Path, *, dry_run: bool = False) -> FixReport:
    """Return what was repaired of the checkpoint `path` into the new directory `output`.

    With `dry_run` nothing is written, and `after` is what the rules say of the plan. Raises
    DocumentError if the checkpoint can't be read at all, FixError or OSError if the output can't be
    made.
    """
    check_output(path, output)
    with opened_for_repair(path) as opened:
        repairs = plan_repairs(opened.context)
        before = findings(opened.original) if opened.original else list(opened.refused)
        if dry_run:
            notes, after = [], findings(repairs.repaired)
        else:
            notes = apply(repairs, output)
            after = findings(load(output))
        view = str(opened.context.path)
    own = str(path if dry_run else output)
    return FixReport(
        checkpoint=str(path),
        output=None if dry_run else str(output),
        repairs=[*opened.repairs, *repairs.repairs],
        before=[_moved(found, view, str(path)) for found in before],
        after=[_moved(found, view, own) for found in after],
        left=list(repairs.left),
        notes=[*repairs.notes, *notes],
    )


def findings(context: Context) -> list[Finding]:
    """Return what the rules say of a checkpoint that is meant for no engine in particular."""
    return list(run_rules(context))


def _moved(found: Finding, view: str, path: str) -> Finding:
    """Return `found` with its file in `path` where it names one of the view."""
    return found.model_copy(update={"file": found.file.replace(view, path, 1)})
