"""A plan as a file: written by `qconvert plan`, read again and verified by `qconvert apply`.

A plan is made, not written by hand: `apply` makes it again from the plan's own recipe and the
source as it is now, and goes on only if both are the same. What the recipe alone decides shows in
the plan's digest, which its file has too.
"""

import os
from collections.abc import Iterator
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

from qconvert.errors import ConvertError
from qconvert.files import named
from qconvert.planner import make_plan
from qconvert.statistics import Statistics
from qschema import __version__
from qschema.checkpoint import Checkpoint
from qschema.plan import LOCAL, Plan, Where
from qschema.strict import DocumentError, Json, json_path, parse_json

_DOCUMENT = "qconvert-plan"
# characters of a digest in a message
_SHOWN = 16


class _Absent(Enum):
    """What stands where a document has nothing; null is something."""

    NOTHING = "nothing"


_Value: TypeAlias = "Json | _Absent"
Difference = tuple[str, _Value, _Value]


def where(source: Path, statistics: Path | None) -> Where:
    """Return the places that a plan names; raises ConvertError for a path that is not UTF-8."""
    # a link to the statistics is kept: their vectors lie beside it
    file = None
    if statistics is not None:
        file = _utf8(statistics.parent.resolve() / statistics.name)
    return Where(source=_utf8(source.resolve()), statistics=file)


def signed(plan: Plan, source: Path, statistics: Path | None) -> Plan:
    """Return the plan as its file has it: with its own digest and the places it was made from."""
    local = {"plan_sha256": plan.sha256(), "where": where(source, statistics)}
    return plan.model_copy(update=local)


def plan_text(plan: Plan) -> str:
    """Return the text of a plan's file: a value per line, so that two plans can be compared."""
    return plan.model_dump_json(indent=1) + "\n"


def check_free(path: Path, *, source: Path, force: bool) -> None:
    """Raise ConvertError if the plan of `source` can't be written to `path`.

    A file there is replaced with `force` only; pipes and character devices are written to.
    """
    if path.is_dir():
        raise ConvertError(f"{path}: is a directory; expected the name of a file")
    if _is_stream(path):
        return
    # where a link points to: that is what is written, and the link stays
    real = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ConvertError(f"{path}: exists and is no file that could be replaced")
    if path.exists() and not force:
        raise ConvertError(f"{path}: exists; --force replaces it")
    if not real.parent.is_dir():
        raise ConvertError(f"{path}: the directory {real.parent} does not exist")
    if source.resolve() in real.parents:
        raise ConvertError(
            f"{path}: lies in {source}, whose files the plan lists, and this would be one more: "
            "the plan could never be applied; write it elsewhere"
        )


def write_plan(path: Path, plan: Plan, *, source: Path, force: bool) -> None:
    """Write the plan to `path`, whole or not at all; raises ConvertError as `check_free` does."""
    check_free(path, source=source, force=force)
    if _is_stream(path):
        with named(path), open(path, "w", encoding="utf-8") as stream:
            stream.write(plan_text(plan))
        return
    real = Path(os.path.realpath(path))
    unfinished = real.with_name(f".{real.name}.{os.getpid()}")
    try:
        with named(path):
            unfinished.write_text(plan_text(plan), encoding="utf-8")
            os.replace(unfinished, real)
    finally:
        unfinished.unlink(missing_ok=True)


def name_of(path: Path) -> str:
    """Return what messages call the plan that `path` stands for."""
    return "standard input" if str(path) == "-" else str(path)


def load_plan(path: Path) -> Plan:
    """Return the plan in the file or the pipe `path`, that on standard input if it is "-".

    Raises DocumentError, with the JSON path, for a file that is missing, no plan, or the plan of
    another version of this tool, which might decide and encode otherwise.
    """
    file = name_of(path)
    document = parse_json(_data(path), file=file)
    if not isinstance(document, dict) or document.get("document") != _DOCUMENT:
        found = document.get("document") if isinstance(document, dict) else None
        raise DocumentError.of(
            file, "$.document", "plan-document", f"expected {_DOCUMENT!r}, found {found!r}"
        )
    tool = document.get("tool")
    version = tool.get("version") if isinstance(tool, dict) else None
    if isinstance(version, str) and version != __version__:
        raise DocumentError.of(
            file,
            "$.tool.version",
            "plan-tool",
            f"was made by qconvert {version}, this is {__version__}: plan again with this one, or "
            f"apply it with qconvert {version}",
        )
    return Plan.parse(document, file=file)


def source_of(plan: Plan, file: str, given: Path | None) -> Path:
    """Return the source: the one `given`, or the plan's.

    Raises DocumentError if none is given and the plan, called `file`, names none that is there.
    """
    if given is not None:
        return given
    if plan.where is None:
        raise DocumentError.of(
            file, "$.where", "plan-source", "names no source; say where it is with --source"
        )
    path = Path(plan.where.source)
    if not path.is_dir():
        message = f"{path}: is no directory here; say where the source is now with --source"
        raise DocumentError.of(file, "$.where.source", "plan-source", message)
    return path


def statistics_of(plan: Plan, file: str, given: Path | None) -> Path | None:
    """Return the statistics' file: the one `given`, or the plan's, if it was made with any.

    Raises DocumentError if none is given and that of the plan, called `file`, is not there.
    """
    if given is not None or plan.where is None or plan.where.statistics is None:
        return given
    path = Path(plan.where.statistics)
    if not path.is_file():
        message = f"{path}: is no file here; say where the statistics are now with --amax"
        raise DocumentError.of(file, "$.where.statistics", "plan-statistics", message)
    return path


def verified(plan: Plan, file: str, *, checkpoint: Checkpoint, statistics: Statistics) -> Plan:
    """Return the plan that is made again from the recipe of `plan`, if it is the same one.

    The one to run, as the order of keys in a file, which some output bytes follow, says nothing.
    Raises DocumentError for another source, other statistics, and a plan that was edited.
    """
    digest = checkpoint.digest()
    if digest != plan.source.digest:
        raise DocumentError.of(
            file,
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
            file,
            "$.vectors",
            "plan-vectors",
            f"expected the vectors {expected}, found {found} with {statistics.file or 'no file'}; "
            "pass the right statistics with --amax, or plan again",
        )
    made = make_plan(checkpoint, plan.recipe, statistics)
    sha256 = made.sha256()
    differing = None
    if sha256 != plan.sha256():
        differing = next(_differences(_json(plan), _json(made)), None)
    if differing is not None:
        place, stands, again = differing
        raise DocumentError.of(
            file,
            place,
            "plan-differs",
            f"is {_short(stands)} here, planning again makes it {_short(again)}: the plan was "
            "edited, or files of the source or the statistics have changed; plan again, with a "
            "recipe that says what you want",
        )
    if plan.plan_sha256 != sha256:
        said = f"{plan.plan_sha256[:_SHOWN]}..." if plan.plan_sha256 else "nothing"
        raise DocumentError.of(
            file,
            "$.plan_sha256",
            "plan-edited",
            f"is {said}, the digest of what stands here {sha256[:_SHOWN]}...: the plan was edited "
            "after it was made; plan again with the recipe you want",
        )
    return made


def _is_stream(path: Path) -> bool:
    return path.is_fifo() or path.is_char_device()


def _data(path: Path) -> bytes:
    if str(path) == "-":
        with named(Path(name_of(path))), open(0, "rb", closefd=False) as stream:
            return stream.read()
    if path.is_dir():
        raise DocumentError.of(path, "", "plan-missing", "is a directory; expected a plan's file")
    if not path.exists():
        message = "no such file; make it with: qconvert plan"
        raise DocumentError.of(path, "", "plan-missing", message)
    with named(path):
        return path.read_bytes()


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
    stands: _Value, again: _Value, place: tuple[int | str, ...] = ()
) -> Iterator[Difference]:
    """Yield JSON path and both values of everything that differs, in the order of the document."""
    if isinstance(stands, dict) and isinstance(again, dict):
        for key in dict.fromkeys((*stands, *again)):
            left, right = (side.get(key, _Absent.NOTHING) for side in (stands, again))
            yield from _differences(left, right, (*place, key))
    elif isinstance(stands, list) and isinstance(again, list):
        pairs = zip_longest(stands, again, fillvalue=_Absent.NOTHING)
        for number, (left, right) in enumerate(pairs):
            yield from _differences(left, right, (*place, number))
    elif stands != again:
        yield json_path(place), stands, again


def _short(value: _Value) -> str:
    shown = value.value if isinstance(value, _Absent) else repr(value)
    return f"{shown[:60]}..." if len(shown) > 60 else shown
