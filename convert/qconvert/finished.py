"""Whether a directory is what a plan makes, so that a command run twice succeeds twice.

Weights are not read: names, sizes, times and the documents decide.
"""

import os
from pathlib import Path

from qconvert import documents
from qconvert.errors import ConvertError
from qconvert.output import forget
from qconvert.reports import around_tensors, report_head
from qconvert.side_files import REPORT
from qschema.checkpoint import Checkpoint
from qschema.plan import Plan


def check_finished(checkpoint: Checkpoint, plan: Plan, digest: str, output: Path) -> None:
    """Return if `output` is the result of `plan`, whose digest is given, from this source.

    A run that was killed after the rename left its books there; they are removed. Raises
    ConvertError if it is anything else, or if the source was modified after it was made.
    """
    before, after = around_tensors(report_head(plan, digest))
    if not _is_enclosed(output / REPORT, before, after):
        raise ConvertError(f"{output}: exists and is not empty; nothing is overwritten")
    expected: dict[str, int | None] = {shard.file: shard.nbytes for shard in plan.shards}
    made = documents.files(checkpoint, plan)
    for side in plan.side_files:
        if side.action != "leave":
            expected[side.file] = side.nbytes if side.action == "copy" else None
    for name, nbytes in expected.items():
        path = output / name
        is_right = path.is_file() and nbytes in (None, path.stat().st_size)
        if is_right and name in made:
            is_right = path.read_bytes() == made[name]()
        if not is_right:
            raise ConvertError(
                f"{path}: {output} is the result of this conversion, but this file is not as it "
                "was; remove the directory to convert again"
            )
    finished = os.stat(output / REPORT).st_mtime_ns
    copied = [side.file for side in plan.side_files if side.action == "copy"]
    for name in (*(shard.file.name for shard in checkpoint.shards), *copied):
        if os.stat(checkpoint.path / name).st_mtime_ns > finished:
            raise ConvertError(
                f"{output}: is the result of this conversion, but {checkpoint.path / name} was "
                "modified after it was made; remove the directory to convert again"
            )
    forget(output)


def _is_enclosed(path: Path, before: bytes, after: bytes) -> bool:
    """Return whether the file at `path` begins and ends with these bytes."""
    with open(path, "rb") as file:
        begins = file.read(len(before)) == before
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(after)))
        return begins and file.read() == after
