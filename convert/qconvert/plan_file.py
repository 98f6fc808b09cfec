"""A plan as a file: written by `qconvert plan`, read again and verified by `qconvert apply`.

A plan is made, not written by hand: `apply` makes it again from the plan's own recipe and the
source as it is now, and goes on only if both are the same.
"""

import os
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qconvert.statistics import Statistics
from qschema import __version__
from qschema.checkpoint import Checkpoint
from qschema.plan import LOCAL, Plan, Where
from qschema.strict import DocumentError, Json, json_path, load_json

_DOCUMENT = "qconvert-plan"
# characters of a digest in a message
_SHOWN = 16
_ABSENT = "nothing"

Difference = tuple[str, Json, Json]


def where(source: Path, statistics: Path | None) -> Where:
    """Return the places that a plan names; raises ConvertError for a path that is not UTF-8."""
    # a link to the statistics is kept: their vectors lie beside it
    file = None
    if statistics is not None:
        file = _utf8(statistics.parent.resolve() / statistics.name)
    return Where(source=_utf8(source.resolve()), statistics=file)


def plan_text(plan: Plan) -> str:
    """Return the text of a plan's file: a value per line, so that two plans can be compared."""
    return plan.model_dump_json(indent=1) + "\n"


def check_free(path: Path, *, force: bool) -> None:
    """Raise ConvertError if a plan can't be written to `path`, or only in place of a file there."""
    if path.is_dir():
        raise ConvertError(f"{path}: is a directory; expected the name of a file")
    if path.exists() and not force:
        raise ConvertError(f"{path}: exists; --force replaces it")


def write_plan(path: Path, plan: Plan, *, force: bool) -> None:
    """Write the plan to `path`, whole or not at all; raises ConvertError as `check_free` does."""
    check_free(path, force=force)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(plan_text(plan), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_plan(path: Path) -> Plan:
    """Return the plan in the file `path`.

    Raises DocumentError, with the JSON path, for a file that is missing, no plan, or the plan of
    another version of this tool, which might decide and encode otherwise.
    """
    if not path.is_file():
        raise DocumentError.of(
            path, "", "plan-missing", "no such file; make it with: qconvert plan"
        )
    document = load_json(path)
    if not isinstance(document, dict) or document.get("document") != _DOCUMENT:
        found = document.get("document") if isinstance(document, dict) else None
        raise DocumentError.of(
            path, "$.document", "plan-document", f"expected {_DOCUMENT!r}, found {found!r}"
        )
    tool = document.get("tool")
    version = tool.get("version") if isinstance(tool, dict) else None
    if isinstance(version, str) and version != __version__:
        raise DocumentError.of(
            path,
            "$.tool.version",
            "plan-tool",
            f"was made by qconvert {version}, this is {__version__}: plan again with this one, or "
            f"apply it with qconvert {version}",
        )
    return Plan.parse(document, file=str(path))


def source_of(plan: Plan, path: Path, given: Path | None) -> Path:
    """Return the source: the one `given`, or the plan's; raises DocumentError without either."""
    if given is not None:
        return given
    if plan.where is None:
        raise DocumentError.of(
            path, "$.where", "plan-source", "names no source; say where it is with --source"
        )
    return Path(plan.where.source)


def statistics_of(plan: Plan, given: Path | None) -> Path | None:
    """Return the statistics' file: the one `given`, or the plan's, if it was made with any."""
    if given is not None or plan.where is None or plan.where.statistics is None:
        return given
    return Path(plan.where.statistics)


def verify(plan: Plan, path: Path, *, checkpoint: Checkpoint, statistics: Statistics) -> None:
    """Make the plan again from its recipe; raise DocumentError if it is not what stands in `path`.

    That is so for another source, other statistics, and a plan that was edited.
    """
    digest = checkpoint.digest()
    if digest != plan.source.digest:
        raise DocumentError.of(
            path,
            "$.source.digest",
            "plan-source",
            f"expected the source {plan.source.digest[:_SHOWN]}..., found {digest[:_SHOWN]}... in "
            f"{checkpoint.path}: its shards have other names, sizes or headers; pass the right "
            "one with --source, or plan again",
        )
    if statistics.sha256 != plan.vectors:
        expected, found = (
            f"{vectors[:_SHOWN]}..." if vectors else "none"
            for vectors in (plan.vectors, statistics.sha256)
        )
        raise DocumentError.of(
            path,
            "$.vectors",
            "plan-vectors",
            f"expected the vectors {expected}, found {found} with {statistics.file or 'no file'}; "
            "pass the right statistics with --amax, or plan again",
        )
    made = make_plan(checkpoint, plan.recipe, statistics)
    if made.sha256() == plan.sha256():
        return
    place, stands, again = next(_differences(_json(plan), _json(made)))
    raise DocumentError.of(
        path,
        place,
        "plan-differs",
        f"is {_short(stands)} here, planning again makes it {_short(again)}: the plan was edited, "
        "or files of the source or the statistics have changed; plan again, with a recipe that "
        "says what you want",
    )


def _utf8(path: Path) -> str:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise ConvertError(f"{shown}: a plan can't name a path that is not UTF-8") from None
    return str(path)


def _json(plan: Plan) -> Json:
    document: Json = plan.model_dump(mode="json", exclude=set(LOCAL))
    return document


def _differences(
    stands: Json, again: Json, place: tuple[int | str, ...] = ()
) -> Iterator[Difference]:
    """Yield JSON path and both values of everything that differs, in the order of the document."""
    if isinstance(stands, dict) and isinstance(again, dict):
        for key in dict.fromkeys((*stands, *again)):
            yield from _differences(
                stands.get(key, _ABSENT), again.get(key, _ABSENT), (*place, key)
            )
    elif isinstance(stands, list) and isinstance(again, list):
        pairs = zip_longest(stands, again, fillvalue=_ABSENT)
        for number, (left, right) in enumerate(pairs):
            yield from _differences(left, right, (*place, number))
    elif stands != again:
        yield json_path(place), stands, again


def _short(value: Json) -> str:
    shown = value if value == _ABSENT else repr(value)
    return f"{shown[:60]}..." if len(str(shown)) > 60 else str(shown)
