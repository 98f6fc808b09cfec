"""The support matrix: what is known of each engine, version, format, architecture and GPU. Data.

A cell says where its state comes from: what somebody's documents say, or a run of ours. A run
replaces what was documented or run before; documents never replace a run.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from qschema.strict import Strict, load_json, violation
from qvalidate.result import Agreement, Prediction

State: TypeAlias = Literal["verified", "documented", "fails", "loads-but-wrong", "unknown"]
Key: TypeAlias = tuple[str, str, str, str, str, str]
# stands for every architecture, or every GPU that the engine runs on, as documents often do
ANY = "any"
GPU = r"^(sm_\d{2,3}|cpu|any)$"
DATA = Path(__file__).with_name("support.json")


class CellRun(Strict):
    """One run of ours: when, from which commit, on what, and what came of it."""

    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    commit: str | None = None
    device: str | None = None
    # operations in which a plain implementation stood in for the engine's own
    kernels: list[str] = Field(default_factory=list)
    predicted: Prediction
    predicted_by: list[str] = Field(default_factory=list)
    agreement: Agreement
    # of the comparison with the source
    kl_mean: float | None = None
    top1_agreement: float | None = None
    relative_error: float | None = None
    # the engine's own words where it failed
    message: str = ""


class Cell(Strict):
    """What is known of one combination. `gpu` is sm_NN, cpu or any."""

    engine: str
    version: str
    format: str
    dialect: str = "modelopt"
    # config.json's model_type, with what matters beside it: `llama`, `llama (odd widths)`
    architecture: str
    gpu: str = Field(pattern=GPU)
    state: State
    # for what is documented: which document
    source: str = ""
    run: CellRun | None = None

    @model_validator(mode="after")
    def _known_from_somewhere(self) -> Self:
        if bool(self.source) == bool(self.run):
            raise violation("cell-source", "expected either a source or a run")
        if self.run is None and self.state == "verified":
            raise violation("cell-verified", "what no run showed is documented, not verified")
        return self

    @property
    def key(self) -> Key:
        """What the cell is about."""
        return (
            self.engine,
            self.version,
            self.format,
            self.dialect,
            self.architecture,
            self.gpu,
        )


class Matrix(Strict):
    """All cells, in the order of their keys."""

    document: Literal["qvalidate-support"] = "qvalidate-support"
    version: Literal[1] = 1
    cells: list[Cell]

    def with_cells(self, cells: Iterable[Cell]) -> "Matrix":
        """Return the matrix in which `cells` stand for what it said of the same keys.

        What is documented does not stand for a run.
        """
        found = {cell.key: cell for cell in self.cells}
        for cell in cells:
            known = found.get(cell.key)
            if known is None or cell.run is not None or known.run is None:
                found[cell.key] = cell
        return Matrix(cells=[found[key] for key in sorted(found)])

    def select(
        self,
        *,
        engine: str | None = None,
        formats: Sequence[str] = (),
        architecture: str | None = None,
        gpu: str | None = None,
    ) -> Iterator[Cell]:
        """Yield the cells that are about all of what is given."""
        for cell in self.cells:
            if engine is not None and cell.engine != engine:
                continue
            if formats and cell.format not in formats:
                continue
            if architecture is not None and architecture not in cell.architecture:
                continue
            if gpu is None or cell.gpu == gpu:
                yield cell


def read(path: Path = DATA) -> Matrix:
    """Return the matrix in the file `path`. Raises DocumentError for what is none."""
    return Matrix.parse(load_json(path), file=str(path))


def write(matrix: Matrix, path: Path = DATA) -> None:
    """Write the matrix to `path`, a cell in a line, so that a change shows as that line's."""
    lines = ",\n".join(f"  {cell.model_dump_json(exclude_defaults=True)}" for cell in matrix.cells)
    head = f'"document": "{matrix.document}", "version": {matrix.version}'
    path.write_text(f'{{{head}, "cells": [\n{lines}\n]}}\n', encoding="utf-8")
