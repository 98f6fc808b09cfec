"""What the benchmarks share: which commit was measured, and how a row gets into its CSV.

Standard library only, for `convert_cpu.py` must stay small.
"""

import csv
import os
import subprocess
from collections.abc import Sequence
from dataclasses import astuple, fields
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
    """Adds the rows to the CSV; a new file gets the header first."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new and rows:
            writer.writerow(column.name for column in fields(rows[0]))
        writer.writerows(astuple(row) for row in rows)
