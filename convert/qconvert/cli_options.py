"""The options of `qconvert`, `qconvert plan` and `qconvert apply`: each is written down once.

A group of options is one argument of a command: a dataclass whose fields are named like them.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Literal

import click

from qconvert.backends import is_device_name
from qschema.formats import UnknownFormatError, find, formats
from qschema.recipe import Recipe, Rule
from qschema.recipe_file import load_recipe
from qschema.strict import Json

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

_WRITABLE = [name for name, declared in formats().items() if not declared.read_only]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_FILE = click.Path(path_type=Path)


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


@dataclass(frozen=True)
class Wanted:
    """What decides the bytes of the output."""

    algo: str | None
    recipe: Path | None
    amax: Path | None
    kv_cache: str | None
    on_indivisible: Literal["refuse", "keep"] | None
    fail_if: tuple[str, ...]
    exclude: tuple[str, ...]
    include: tuple[str, ...]
    drop: tuple[str, ...]
    leave: tuple[str, ...]
    copy: tuple[str, ...]
    allow_nonfinite: bool
    digest: str | None

    def as_recipe(self) -> Recipe:
        """Return the recipe that the options make, on top of a recipe file if one is given.

        Raises click.UsageError for options that leave open what to do, DocumentError for a file or
        a value that is none.
        """
        if self.algo is not None and self.recipe is None:
            asked = Recipe(rules=[Rule(match="*", algo=self.algo)])
        elif self.recipe is not None and self.algo is None:
            asked = load_recipe(self.recipe)
        elif self.algo is None and self.kv_cache not in (None, "none"):
            document: Json = {"rules": [], "kv_cache": self.kv_cache}
            asked = Recipe.parse(document, file="the command line")
        else:
            raise click.UsageError("give either --algo or --recipe")
        changes: dict[str, Json] = {
            "exclude": [*asked.exclude, *self.exclude],
            "include": [*asked.include, *self.include],
            "drop": [*asked.drop, *self.drop],
            "leave": [*asked.leave, *self.leave],
            "copy_files": [*asked.copy_files, *self.copy],
            "fail_if": [*asked.fail_if, *self.fail_if],
            "allow_nonfinite": asked.allow_nonfinite or self.allow_nonfinite,
        }
        if self.on_indivisible is not None:
            changes["on_indivisible"] = self.on_indivisible
        if self.digest is not None:
            changes["digest"] = self.digest
        if self.kv_cache is not None:
            changes["kv_cache"] = None if self.kv_cache == "none" else self.kv_cache
        return Recipe.parse({**asked.model_dump(mode="json"), **changes}, file="the command line")


@dataclass(frozen=True)
class Machine:
    """What a run may use; none of it changes a byte of the output."""

    device: str
    workers: int | None
    memory_budget: int


@dataclass(frozen=True)
class Running:
    """How a conversion is run, and what it leaves beside its output."""

    fresh: bool
    timings: Path | None
    style: str


@dataclass(frozen=True)
class Words:
    """How much a command says on stderr: notes and errors always."""

    verbose: bool
    quiet: bool

    def __post_init__(self) -> None:
        if self.verbose and self.quiet:
            raise click.UsageError("give either --verbose or --quiet")


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
    if not is_device_name(value):
        raise click.BadParameter(
            f"{value!r} is none of auto, cpu, cuda, cuda:N and lists such as cuda:0,cuda:1"
        )
    return value


def _timings_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    # known before hours of work, not after
    if value is not None and (value.is_dir() or not Path(os.path.realpath(value)).parent.is_dir()):
        raise click.BadParameter(f"{value}: expected a file in a directory that exists")
    return value


def _gathered(kind: type, name: str, options: Sequence[Decorator]) -> Decorator:
    """Return a decorator that gives a command `options` as one argument `name`, a `kind`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**given: object) -> None:
            group = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            command(**given, **{name: group})

        decorated: Callable[..., None] = call
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


wanted_options = _gathered(
    Wanted,
    "wanted",
    [
        click.option(
            "--algo", callback=_format_name, help=f"One format for all: {', '.join(_WRITABLE)}."
        ),
        click.option("--recipe", type=_FILE, help="A recipe file, YAML or JSON."),
        click.option(
            "--amax",
            type=_FILE,
            help="Calibration's statistics, JSON; for formats with a static scale of the input.",
        ),
        click.option(
            "--kv-cache",
            type=click.Choice(["FP8", "NVFP4", "NVFP4_AFFINE", "none"]),
            help="How engines keep keys and values; scales come from --amax.",
        ),
        click.option(
            "--on-indivisible",
            type=click.Choice(["refuse", "keep"]),
            help="A weight whose size its format can't have: an error (default), or kept as it is.",
        ),
        click.option(
            "--fail-if",
            multiple=True,
            metavar="GATE",
            help="Make no checkpoint if a tensor meets this: 'sqnr<20' (dB), 'relative_error>0.1', "
            "'saturated>0.01'.",
        ),
        click.option(
            "--exclude", multiple=True, metavar="PATTERN", help="Keep these modules as they are."
        ),
        click.option(
            "--include", multiple=True, metavar="PATTERN", help="Quantize despite the defaults."
        ),
        click.option(
            "--drop",
            multiple=True,
            metavar="PATTERN",
            help="Leave out these tensors, or all tensors of these modules.",
        ),
        click.option("--leave", multiple=True, metavar="PATTERN", help="Files not to copy."),
        click.option(
            "--copy", multiple=True, metavar="PATTERN", help="Files to copy all the same."
        ),
        click.option(
            "--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or Inf."
        ),
        click.option(
            "--digest",
            type=click.Choice(["blake3", "sha256"]),
            help="Of each tensor, in the report. Default: blake3, which is faster.",
        ),
    ],
)

machine_options = _gathered(
    Machine,
    "machine",
    [
        click.option(
            "--device",
            default="auto",
            show_default=True,
            callback=_device_name,
            help="auto, cpu, cuda (every GPU), cuda:N, or a list: cuda:0,cuda:1.",
        ),
        click.option("--workers", type=click.IntRange(1, 256), help="Default: suits the machine."),
        click.option(
            "--memory-budget",
            type=ByteSize(),
            default="1GiB",
            show_default=True,
            help="Bytes of weights in memory at once.",
        ),
    ],
)

running_options = _gathered(
    Running,
    "running",
    [
        click.option("--fresh", is_flag=True, help="Start over, don't go on from OUT_DIR.partial."),
        click.option(
            "--timings",
            type=_FILE,
            metavar="FILE",
            callback=_timings_file,
            help="Write to FILE, as JSON, how long each stage took.",
        ),
        click.option(
            "--format",
            "style",
            type=click.Choice(["text", "json"]),
            default="text",
            help="json: the report (of a dry run the plan) on stdout.",
        ),
    ],
)

words_options = _gathered(
    Words,
    "words",
    [
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            help="Progress and summary also without a terminal, and where the time went.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress, no summary."),
    ],
)
