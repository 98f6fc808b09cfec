"""What a comparison of two checkpoints found: one value, from which text and exit status are made.

Every list names tensors and modules as B has them, or as A has them where B does not.
"""

from typing import Literal, TypeAlias

from pydantic import Field

from qschema.plan import Tool
from qschema.strict import Numerous, Strict
from qvalidate.result import Subject

FileKind: TypeAlias = Literal[
    "config", "tokenizer", "chat template", "code", "processor", "documentation", "report", "other"
]
# what no engine reads
_SILENT = frozenset({"documentation", "report"})


class JsonChange(Strict):
    """One value of a JSON file, as JSON text; None where the key is absent."""

    file: str
    where: str
    a: str | None
    b: str | None


class WordChange(Strict):
    """One thing that the two quantization configs say differently."""

    what: Literal["format", "name of the format", "kv cache", "method", "place"]
    a: str
    b: str


class AssignmentChange(Strict):
    """Modules that one config gives another format than the other, by name.

    `a` and `b` are a format's name, "excluded", or "unquantized" without any config.
    """

    a: str
    b: str
    modules: list[str]


class QuantizationDiff(Strict):
    """How the configs that engines follow differ; `fields` are what the words do not cover."""

    changes: list[WordChange]
    assignments: list[AssignmentChange]
    fields: list[JsonChange]


class TensorEntry(Numerous):
    """A tensor that only one side has."""

    name: str
    dtype: str
    shape: list[int]


class Renamed(Numerous):
    """A tensor under two names.

    `by` says how that is known: two spellings of one name, the same bytes, or the same bytes
    of another tensor of its module.
    """

    a: str
    b: str
    by: Literal["names", "bytes", "module"]


class Restacked(Strict):
    """A stack of experts on `side` that is one tensor per expert and projection on the other."""

    side: Literal["a", "b"]
    name: str
    num_parts: int = Field(ge=1)


class Retyped(Numerous):
    """A tensor whose dtype or shape differs."""

    name: str
    a: TensorEntry
    b: TensorEntry


class TensorDiff(Strict):
    """The tensors of the two sides, name by name.

    `num_equal` and `changed` are about the bytes of tensors with equal dtype and shape: None and
    empty where they were not read. `undecoded` are those of `changed` that `WeightDiff` does not
    speak for.
    """

    added: list[TensorEntry]
    removed: list[TensorEntry]
    renamed: list[Renamed]
    restacked: list[Restacked]
    retyped: list[Retyped]
    changed: list[str]
    undecoded: list[str]
    num_equal: int | None = Field(default=None, ge=0)


class WeightError(Numerous):
    """How far a weight of B, decoded, is from that of A: ||A - B|| / ||A|| over all elements.

    None where A is all zeros. `num_nonfinite` elements are NaN or Inf on one side and not the same
    on the other; elements that are not finite on either side count in no other number.
    """

    name: str
    # a weight, or numbers beside it: a bias, a scale of the input
    what: Literal["weight", "tensor"]
    # format, or dtype where unquantized
    a: str
    b: str
    relative_error: float | None = Field(ge=0)
    max_abs: float = Field(ge=0)
    num_nonfinite: int = Field(ge=0)

    def is_within(self, max_error: float) -> bool:
        """Return whether it counts as the same."""
        return (
            self.num_nonfinite == 0
            and self.relative_error is not None
            and self.relative_error <= max_error
        )


class ErrorSum(Strict):
    """Several weights that differ, taken together as one long vector, and the worst of them."""

    name: str
    count: int = Field(ge=1)
    relative_error: float | None = Field(ge=0)
    worst: str
    worst_error: float | None = Field(ge=0)
    max_abs: float = Field(ge=0)


class NotCompared(Strict):
    """A weight that can't be compared by its numbers, and why."""

    name: str
    reason: str


class WeightDiff(Strict):
    """The decoded weights of both sides. `differing` has the worst first.

    `total`, `kinds` and `layers` are sums over the weights of `differing`: of all, of all query
    projections, of all in layer 3.
    """

    differing: list[WeightError]
    num_equal: int = Field(ge=0)
    not_compared: list[NotCompared]
    total: ErrorSum | None = None
    kinds: list[ErrorSum]
    layers: list[ErrorSum]


class FileChange(Strict):
    """A file beside the shards; None for the size on the side that lacks it.

    Digests are SHA-256, and only there where the sizes are equal.
    """

    name: str
    kind: FileKind
    a_nbytes: int | None = Field(default=None, ge=0)
    b_nbytes: int | None = Field(default=None, ge=0)
    a_sha256: str | None = None
    b_sha256: str | None = None

    @property
    def change(self) -> Literal["added", "removed", "changed"]:
        """What became of the file from A to B."""
        if self.a_nbytes is None:
            return "added"
        return "removed" if self.b_nbytes is None else "changed"

    @property
    def is_read(self) -> bool:
        """Whether engines may read it."""
        return self.kind not in _SILENT


class DiffResult(Strict):
    """The result of one run of qdiff.

    `spelling` is what is written differently and means the same; `notes` is what else is worth
    knowing. Neither is a difference. `weights` is None where no tensor was read.
    """

    document: Literal["qvalidate-diff"] = "qvalidate-diff"
    version: Literal[1] = 1
    tool: Tool
    a: Subject
    b: Subject
    # weights no further apart than this count as the same
    max_error: float = Field(default=0.0, ge=0)
    quantization: QuantizationDiff
    config: list[JsonChange]
    tensors: TensorDiff
    weights: WeightDiff | None = None
    files: list[FileChange]
    spelling: list[str]
    notes: list[str]

    @property
    def areas(self) -> tuple[str, ...]:
        """In what the two differ in meaning, in order; empty if they are the same."""
        quantization, tensors = self.quantization, self.tensors
        found = {
            "quantization": quantization.changes or quantization.assignments or quantization.fields,
            "config": self.config,
            "tensors": (
                tensors.added
                or tensors.removed
                or tensors.renamed
                or tensors.restacked
                or tensors.retyped
                or tensors.undecoded
            ),
            "weights": self.weights
            and [error for error in self.weights.differing if not error.is_within(self.max_error)],
            "files": [change for change in self.files if change.is_read],
        }
        return tuple(area for area, changes in found.items() if changes)

    @property
    def exit_code(self) -> int:
        """0 the same in meaning, 1 different."""
        return 1 if self.areas else 0
