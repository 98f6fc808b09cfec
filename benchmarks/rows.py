"""What the benchmarks share: which commit was measured, and how a row gets into its CSV.

Standard library only, for `convert_cpu.py` must stay small.
"""

import csv
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def commit() -> str:
    """Returns the short commit of this checkout, with `-dirty` where files differ from it.

    $COMMIT says it where the tree is a copy without its history.
    """
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    here = str(Path(__file__).resolve().parent)
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(git, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "none"


def append(path: Path, rows: Sequence["DataclassInstance"]) -> None:
    """Adds the rows to the CSV; a new file gets the header first.

    Columns that only the file or only the rows have stay, empty where a line knows nothing of them.
    """
    if not rows:
        return
    names = [column.name for column in fields(rows[0])]
    lines: list[dict[str, object]] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
            names += [name for name in reader.fieldnames or () if name not in names]
    lines += [asdict(row) for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
