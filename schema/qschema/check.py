"""Checking one file: which document it is, and what is wrong with it. Findings are values.

A file is recognised by its name and by its content; where the two disagree, that is a finding.
"""

from dataclasses import dataclass
from pathlib import Path

from qschema import catalog
from qschema.catalog import Document
from qschema.quantization_config import ModelConfig
from qschema.safetensors import read_header
from qschema.strict import DocumentError, Finding, Json, load_json

_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class Result:
    """What was found in one file. `document` is the id it was checked as, None if unrecognised."""

    file: str
    document: str | None
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        """Whether a finding is an error; notes and warnings are not."""
        return any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True)
class _Loaded:
    content: Json
    # NaN or Infinity in it: for some documents an error, for others a warning
    constant: Finding | None = None


def check_file(path: Path, *, kind: str | None = None) -> Result:
    """Return the findings for the file at `path`, checked as the document with the id `kind`.

    Without `kind` the document is recognised. Raises OSError for a file that can't be read.
    """
    found: Document | None = None
    try:
        found, loaded = _recognise(path) if kind is None else _read(path, catalog.by_id(kind))
        remarks = _judge(path, found, loaded)
    except DocumentError as error:
        named = found or catalog.by_name(path.name)
        document = kind or (named.id if named else None)
        return Result(file=str(path), document=document, findings=tuple(error.findings))
    return Result(file=str(path), document=found.id, findings=tuple(remarks))


def _judge(path: Path, document: Document, loaded: _Loaded) -> list[Finding]:
    """Return the warnings and notes; errors are raised as DocumentError."""
    if document.container == "safetensors":
        read_header(path)
        return []
    remarks = []
    if loaded.constant and not document.constants:
        raise DocumentError([loaded.constant])
    if loaded.constant:
        remarks.append(loaded.constant.model_copy(update={"severity": "warning"}))
    model = document.model.parse(loaded.content, file=str(path))
    if isinstance(model, ModelConfig):
        remarks += model.notes(file=str(path))
    return remarks


def _recognise(path: Path) -> tuple[Document, _Loaded]:
    named = catalog.by_name(path.name)
    if named is None:
        return _sniff(path)
    document, loaded = _read(path, named)
    alike = catalog.by_content(loaded.content)
    if document in alike or len(alike) != 1:
        return document, loaded
    raise DocumentError.of(
        path,
        "",
        "document-mismatch",
        f"is named like {document.title}, its content is that of {alike[0].title}; "
        f"rename it, or check it with --as {alike[0].id}",
    )


def _sniff(path: Path) -> tuple[Document, _Loaded]:
    if _opens_like_safetensors(path):
        return catalog.by_id("safetensors-header"), _Loaded(None)
    yaml = path.suffix in _YAML
    if not yaml and not _opens_like_json(path):
        raise _unrecognised(path)
    loaded = _load(path, yaml=yaml)
    alike = catalog.by_content(loaded.content)
    if len(alike) != 1:
        raise _unrecognised(path)
    return alike[0], loaded


def _read(path: Path, document: Document) -> tuple[Document, _Loaded]:
    if document.container == "safetensors":
        return document, _Loaded(None)
    yaml = document.container == "yaml" and not _opens_like_json(path)
    return document, _load(path, yaml=yaml)


def _load(path: Path, *, yaml: bool) -> _Loaded:
    if yaml:
        # imported here: only recipes need it, and every hook pays for what is imported
        from qschema.recipe_file import load_yaml

        return _Loaded(load_yaml(path))
    try:
        return _Loaded(load_json(path))
    except DocumentError as error:
        if error.findings[0].rule != "json-constant":
            raise
        return _Loaded(load_json(path, constants=True), error.findings[0])


def _opens_like_json(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(64).lstrip()[:1] in (b"{", b"[")


def _opens_like_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        opening = file.read(9)
        size = file.seek(0, 2)
    length = int.from_bytes(opening[:8], "little")
    return opening[8:] == b"{" and length <= size - 8


def _unrecognised(path: Path) -> DocumentError:
    known = ", ".join(f"{document.id} ({document.title})" for document in catalog.DOCUMENTS)
    return DocumentError.of(
        path,
        "",
        "document-unrecognised",
        f"neither its name nor its content is known; say what it is with --as NAME: {known}",
    )
