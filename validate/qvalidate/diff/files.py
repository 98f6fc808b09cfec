"""The files beside the shards: tokenizer, chat template, remote code and the like, by digest."""

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

from qvalidate.context import Context
from qvalidate.diff.documents import CONFIG, GENERATION, differences, json_pair
from qvalidate.diff.result import FileChange, FileKind
from qvalidate.documents import HF_QUANT_CONFIG

# the first that matches; names without their folder
_KINDS: tuple[tuple[FileKind, tuple[str, ...]], ...] = (
    ("config", (GENERATION, HF_QUANT_CONFIG)),
    ("report", ("qconvert_report.json",)),
    ("chat template", ("chat_template*", "*.jinja")),
    ("processor", ("*processor*.json",)),
    ("code", ("*.py",)),
    (
        "tokenizer",
        (
            "tokenizer*",
            "vocab*",
            "merges.txt",
            "special_tokens_map.json",
            "added_tokens.json",
            "*.tiktoken",
            "*.model",
        ),
    ),
    (
        "documentation",
        ("README*", "LICENSE*", "NOTICE*", "*.md", "*.pdf", "*.png", "*.jpg", "*.svg"),
    ),
)


def file_diff(a: Context, b: Context) -> tuple[list[FileChange], list[str]]:
    """Return the files that differ, and in words those that only differ as JSON is written.

    config.json is no part of it, nor are generation_config.json and hf_quant_config.json where
    both sides have them as JSON: they are compared path by path. Raises OSError for a file that
    can't be read.
    """
    found: list[FileChange] = []
    spelling: list[str] = []
    ours, theirs = a.checkpoint.files, b.checkpoint.files
    for name in sorted(ours.keys() | theirs.keys()):
        change = _change(name, a, b) if name != CONFIG else None
        if change is None:
            continue
        pair = json_pair(a, b, name) if name.endswith(".json") and change.is_read else None
        if pair is not None and name in (GENERATION, HF_QUANT_CONFIG):
            continue
        if pair is not None and not any(differences(*pair)):
            spelling.append(f"{name} is other text for the same JSON")
        else:
            found.append(change)
    return found, spelling


def _change(name: str, a: Context, b: Context) -> FileChange | None:
    sizes = [side.checkpoint.files.get(name) for side in (a, b)]
    digests: list[str | None] = [None, None]
    if sizes[0] == sizes[1]:
        digests = [_digest(side.path / name) for side in (a, b)]
        if digests[0] == digests[1]:
            return None
    return FileChange(
        name=name,
        kind=_kind(name),
        a_nbytes=sizes[0],
        b_nbytes=sizes[1],
        a_sha256=digests[0],
        b_sha256=digests[1],
    )


def _kind(name: str) -> FileKind:
    last = name.rpartition("/")[2]
    for kind, patterns in _KINDS:
        if any(fnmatchcase(last, pattern) for pattern in patterns):
            return kind
    return "other"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
