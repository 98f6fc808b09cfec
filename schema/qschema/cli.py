"""The qschema command: check documents, list them, export their JSON Schemas. Light on purpose."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import click

from qschema import __version__, catalog
from qschema.check import Result, check_file
from qschema.strict import Finding

_COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Check the documents of a quantized checkpoint against strict models.

    \b
    $ qschema check my-model-fp8/hf_quant_config.json my-model-fp8/*.safetensors
    my-model-fp8/hf_quant_config.json::$.quantization: group-size-missing: quant_algo NVFP4 ...
    """


@main.command()
@click.argument(
    "paths", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--as",
    "kind",
    metavar="NAME",
    type=click.Choice(catalog.ids()),
    help="What the files are, instead of recognising them; `qschema list` shows the names.",
)
@click.option(
    "--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@click.option("-q", "--quiet", is_flag=True, help="No words on stderr, no notes.")
@click.option("-v", "--verbose", is_flag=True, help="Say for every file what it was checked as.")
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
)
def check(
    paths: tuple[Path, ...],
    kind: str | None,
    style: Literal["text", "json"],
    quiet: bool,
    verbose: bool,
    color: Literal["auto", "always", "never"],
) -> None:
    """Check each FILE and print one line per finding.

    Of a directory, the files whose names are known are checked.
    Exit status: 0 clean, 1 findings, 2 a file can't be read.

    \b
    $ qschema check --as recipe fp8.yaml
    fp8.yaml::$.rules[0].algo: unknown-algo: unknown algorithm 'FP8_PB'; did you mean FP8_PB_WO? ...
    """
    results, unreadable = [], 0
    for file in (file for path in paths for file in _files(path)):
        try:
            results.append(check_file(file, kind=kind))
        except OSError as error:
            unreadable += 1
            click.echo(f"qschema: can't read {file}: {error.strerror or error}", err=True)
    if style == "json":
        click.echo(json.dumps({"files": [_as_json(result) for result in results]}, indent=2))
    else:
        _print_text(results, quiet=quiet, verbose=verbose, color=_tristate(color))
    if not quiet:
        click.echo(_summary(results), err=True)
    failed = any(result.failed for result in results)
    sys.exit(2 if unreadable else int(failed))


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
def export(directory: Path) -> None:
    """Write the JSON Schemas of all documents into DIR and print their paths.

    \b
    $ qschema export schemas
    schemas/hf-quant-config.schema.json
    ...
    """
    # imported here: generating schemas is not needed to check
    from qschema.export import write_schemas

    for path in write_schemas(directory):
        click.echo(str(path))


@main.command(name="list")
def list_documents() -> None:
    """Print the documents that are known: name, file names, $id of the JSON Schema.

    \b
    $ qschema list
    hf-quant-config     hf_quant_config.json  urn:qconvert:schema:hf-quant-config:1
    ...
    """
    rows = [(entry.id, " ".join(entry.names), entry.urn) for entry in catalog.DOCUMENTS]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, files, urn in rows:
        click.echo(f"{name:{widths[0]}}  {files:{widths[1]}}  {urn}")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if catalog.by_name(file.name))


def _print_text(
    results: Iterable[Result], *, quiet: bool, verbose: bool, color: bool | None
) -> None:
    for result in results:
        if verbose and not quiet:
            verdict = "findings" if result.failed else "ok"
            document = result.document or "unrecognised"
            click.echo(f"{result.file}: {document}: {verdict}", err=True)
        for finding in result.findings:
            if not (quiet and finding.severity == "note"):
                click.echo(_line(finding), color=color)


def _line(finding: Finding) -> str:
    # control characters of a hostile file must not reach the terminal
    text = "".join(part if part.isprintable() else repr(part)[1:-1] for part in str(finding))
    rule = f": {finding.rule}: "
    return text.replace(rule, f": {click.style(finding.rule, fg=_COLORS[finding.severity])}: ", 1)


def _as_json(result: Result) -> dict[str, object]:
    return {
        "file": result.file,
        "document": result.document,
        "findings": [finding.model_dump(exclude={"file"}) for finding in result.findings],
    }


def _summary(results: list[Result]) -> str:
    errors = sum(f.severity == "error" for result in results for f in result.findings)
    failed = sum(result.failed for result in results)
    checked = f"{_count(len(results), 'file')} checked"
    if not errors:
        return f"{checked}, no errors"
    return f"{checked}, {_count(errors, 'error')} in {_count(failed, 'file')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _tristate(color: Literal["auto", "always", "never"]) -> bool | None:
    return {"auto": None, "always": True, "never": False}[color]
