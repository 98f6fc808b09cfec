"""`qvalidate check`: its options, and what is made of them. Nothing is decided here."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, get_args

import click

from qvalidate import report
from qvalidate.choice import ChoiceError, Kernels, Wishes, choose
from qvalidate.engines import FOUR_BITS, Thresholds
from qvalidate.matrix import read as read_matrix
from qvalidate.reports import html, junit, sarif
from qvalidate.reports.support import rows
from qvalidate.result import Result, RunLevel
from qvalidate.targets import MOST_GPUS, Deployment, TargetError, parse_targets
from qvalidate.validation import LEVELS, validate

_Style: TypeAlias = Literal["text", "json", "junit", "sarif", "html"]


class _Directory(click.Path):
    """A directory whose name every report can hold."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path:
        found = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            str(found).encode()
        except UnicodeEncodeError:
            self.fail(f"the name {str(found)!a} is not UTF-8; rename it.", param, ctx)
        return found


_DIRECTORY = _Directory()


class _Finite(click.FloatRange):
    """A range of numbers that NaN and infinity are never in."""

    def convert(
        self, value: float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


_POSITIVE = _Finite(min=0, min_open=True)
_SHARE = _Finite(min=0, max=1)
_COUNT = click.IntRange(min=1)
_GPUS = click.IntRange(min=1, max=MOST_GPUS)
_Command = TypeVar("_Command", bound=Callable[..., None])


def _number(
    name: str, default: float | None, *, text: str, values: _Finite = _POSITIVE
) -> Callable[[_Command], _Command]:
    return click.option(name, type=values, default=default, show_default=True, help=text)


def _limit(name: str, field: str, *, text: str, values: _Finite) -> Callable[[_Command], _Command]:
    """Return an option whose default depends on the checkpoint's codes."""
    eight, four = (getattr(limits, field) for limits in (Thresholds(), FOUR_BITS))
    default = f"{text} Default: {eight:g}, for 4-bit codes {four:g}."
    return _number(name, None, text=default, values=values)


@click.command()
@click.argument("ckpt", type=_DIRECTORY)
@click.option(
    "--engine",
    "engines",
    metavar="LIST",
    help="The engines it is meant for, like 'vllm>=0.33,sglang==0.5.17'. Their rules apply in "
    "full, and those that are installed here are asked.",
)
@click.option("--tp", type=_GPUS, default=1, show_default=True, help="GPUs that share each layer.")
@click.option("--ep", type=_GPUS, default=1, show_default=True, help="GPUs that share experts.")
@click.option("--pp", type=_GPUS, default=1, show_default=True, help="GPUs that share layers.")
@click.option("--gpu", metavar="SM", help="What it runs on: sm_80, sm_89, sm_90, ... or cpu.")
@click.option(
    "--reference",
    metavar="DIR",
    type=_DIRECTORY,
    help="The source checkpoint: weights are compared, and logprobs if an engine is asked.",
)
@click.option(
    "--python",
    "pythons",
    metavar="[ENGINE=]PATH",
    multiple=True,
    help="An engine's interpreter, if it has its own. For several engines name each one's.",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    help="How far to go, each level including those before it. Default: as far as this machine "
    "can with what is given: rules; generate in an engine; compare with --reference.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(get_args(_Style)),
    default="text",
    show_default=True,
    help="junit and sarif are for pipelines, html is a page for people.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to a file."
)
@click.option(
    "--kernels",
    type=click.Choice(get_args(Kernels)),
    default="auto",
    show_default=True,
    help="Whose arithmetic: the engine's (native), plain expressions in its place (reference, vLLM "
    "on a CPU), or those only where this machine has no kernel.",
)
@click.option("--serve", is_flag=True, help="Ask the engine's OpenAI-compatible server, too.")
@click.option("--tasks", metavar="LIST", help="Tasks of lm-evaluation-harness, like mmlu,gsm8k.")
@click.option("--task-folder", metavar="DIR", type=_DIRECTORY, help="Your own task files.")
@click.option("--limit", type=_COUNT, help="Examples of each task. Default: all.")
@_number("--max-drop", 0.02, text="What a task may lose against the source.", values=_SHARE)
@_number("--timeout", 600.0, text="Seconds for each start of the engine.")
@_limit("--max-kl", "max_kl", text="Mean KL, in nats.", values=_POSITIVE)
@_limit("--min-top1", "min_top1", text="Top-1 agreement.", values=_SHARE)
@_limit("--max-rel", "max_relative_error", text="Relative error of the logprobs.", values=_POSITIVE)
@click.option("--strict", is_flag=True, help="Warnings fail too.")
@click.option("-q", "--quiet", is_flag=True, help="No words on stderr, no notes.")
@click.option("-v", "--verbose", is_flag=True, help="All findings of every rule.")
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
)
@click.pass_context
def check(
    context: click.Context,
    ckpt: Path,
    engines: str | None,
    tp: int,
    ep: int,
    pp: int,
    gpu: str | None,
    reference: Path | None,
    pythons: tuple[str, ...],
    level: RunLevel | None,
    style: _Style,
    output: Path | None,
    kernels: Kernels,
    serve: bool,
    tasks: str | None,
    task_folder: Path | None,
    limit: int | None,
    max_drop: float,
    timeout: float,
    max_kl: float | None,
    min_top1: float | None,
    max_rel: float | None,
    strict: bool,
    quiet: bool,
    verbose: bool,
    color: Literal["auto", "always", "never"],
) -> None:
    """Check the checkpoint CKPT by the rules, and with --engine in the real engines.

    Exit status: 0 clean, 1 findings, or nothing shown of what was asked for, 2 misuse (also an
    engine that --level needs and that is not installed), 130 interrupted.

    \b
    $ qvalidate my-model-fp8
    my-model-fp8/model.safetensors::model.layers.0.mlp.down_proj.weight_scale: missing-tensor: ...
    """
    try:
        targets = () if engines is None else parse_targets(engines)
        deployment = Deployment.on(gpu, tp=tp, ep=ep, pp=pp)
        wishes = Wishes(
            checkpoint=ckpt,
            reference=reference,
            pythons=pythons,
            level=level,
            tp=tp,
            kernels=kernels,
            serve=serve,
            tasks=[task.strip() for task in tasks.split(",") if task.strip()] if tasks else [],
            task_folder=task_folder,
            limit=limit,
            max_drop=max_drop,
            timeout_s=timeout,
        )
        asks, remarks = choose(targets, wishes)
    except (TargetError, ChoiceError) as error:
        raise click.UsageError(str(error)) from None
    if output is not None and not output.parent.is_dir():
        # before hours of work, not after
        raise click.UsageError(f"can't write {output}: there is no directory {output.parent}")
    asked = {"max_kl": max_kl, "min_top1": min_top1, "max_relative_error": max_rel}
    limits = {field: value for field, value in asked.items() if value is not None}
    try:
        result = validate(
            ckpt,
            reference=reference,
            targets=targets,
            deployment=deployment,
            asks=asks,
            limits=limits,
            # JSON is the whole result; what only counts need not read the scales again
            measures=style in ("json", "html"),
        )
    except ModuleNotFoundError as error:
        extra = "convert" if error.name == "torch" else "validate"
        needs = f"--reference needs {error.name}: pip install 'qconvert[{extra}]'"
        raise click.UsageError(needs) from None
    except OSError as error:
        message = f"can't read {error.filename or ckpt}: {error.strerror or error}"
        raise click.UsageError(message) from None
    text = _rendered(result, style, quiet=quiet, verbose=verbose, strict=strict)
    wants_color = None if color == "auto" else color == "always"
    if output is not None:
        _write(output, text if wants_color else click.unstyle(text))
    elif text:
        click.echo(text, color=wants_color)
    if not quiet:
        for line in [*remarks, *report.summary(result)]:
            click.echo(line, err=True)
        if (hint := report.hint(result)) is not None:
            click.echo(f"hint: {hint}", err=True)
    context.exit(result.exit_code(strict=strict))


def _rendered(result: Result, style: _Style, *, quiet: bool, verbose: bool, strict: bool) -> str:
    match style:
        case "json":
            return result.model_dump_json(indent=2)
        case "junit":
            return junit.render(result, strict=strict)
        case "sarif":
            return sarif.render(result, strict=strict)
        case "html":
            known = rows(read_matrix().cells)
            return html.render(result, measured=result.measured, support_matrix=known)
        case "text":
            return "\n".join(report.lines(result, quiet=quiet, verbose=verbose))


def _write(output: Path, text: str) -> None:
    try:
        output.write_text(f"{text}\n" if text else "", encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"can't write {output}: {error.strerror or error}") from None
