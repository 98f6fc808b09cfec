"""One comparison of two checkpoints, from their paths to a DiffResult."""

from collections.abc import Iterator
from pathlib import Path

from qschema.plan import Tool
from qvalidate import __version__
from qvalidate.context import LM_HEAD, Context
from qvalidate.diff.documents import config_diff
from qvalidate.diff.files import file_diff
from qvalidate.diff.quantization import quantization_diff
from qvalidate.diff.result import DiffResult
from qvalidate.diff.tensors import Matching, TensorPair, match, shard_notes, tensor_diff
from qvalidate.diff.weights import smoothing_note, weight_diff
from qvalidate.loader import load
from qvalidate.result import Subject


def compare(a: Path, b: Path, *, weights: bool = True, max_error: float = 0.0) -> DiffResult:
    """Return what differs between the checkpoints in the directories `a` and `b`.

    weights: read the tensors too; without it headers, JSON and the files beside the shards.
    max_error: weights whose relative error is at most this count as the same.

    Raises DocumentError for a checkpoint that can't be read, OSError for a file of one, and
    ModuleNotFoundError if weights have to be decoded and numpy is missing.
    """
    ours, theirs = load(a), load(b)
    matching = match(ours, theirs, reads=weights)
    by_numbers, decoded = weight_diff(ours, theirs, matching.pairs) if weights else (None, None)
    quantization, quantization_spelling = quantization_diff(
        ours, theirs, _linears(ours, theirs, matching)
    )
    config = config_diff(ours, theirs)
    files, file_spelling = file_diff(ours, theirs)
    return DiffResult(
        tool=Tool(name="qdiff", version=__version__),
        a=_subject(ours),
        b=_subject(theirs),
        max_error=max_error,
        quantization=quantization,
        config=config.changes,
        tensors=tensor_diff(matching, decoded=decoded),
        weights=by_numbers,
        files=files,
        spelling=[*quantization_spelling, *config.spelling, *file_spelling],
        notes=list(_notes(ours, theirs, matching, reads=weights)),
    )


def _linears(a: Context, b: Context, matching: Matching) -> dict[str, str]:
    """Return name in B -> name in A of the Linears that both sides have.

    A head without a weight of its own is one, if both sides are quantized: engines ask the lists
    for it.
    """
    has_bare_head = all(
        side.is_tied and side.obeyed is not None and LM_HEAD not in side.modules for side in (a, b)
    )
    known = {module.weight_name: name for name, module in b.quantized.items()}
    known |= {stored.name: name for name, stored in b.unquantized.items()}
    found = {LM_HEAD: LM_HEAD} if has_bare_head else {}
    return found | {
        known[pair.b.name]: _module_in_a(a, pair)
        for pair in sorted(matching.pairs, key=lambda pair: pair.name)
        if pair.b.name in known
    }


def _module_in_a(a: Context, pair: TensorPair) -> str:
    # a matrix of a stack has the name of its counterpart
    name = pair.a.name if a.checkpoint.tensors.get(pair.a.name) is pair.a else pair.name
    return name.removesuffix(".weight")


def _notes(a: Context, b: Context, matching: Matching, *, reads: bool) -> Iterator[str]:
    yield from shard_notes(a, b, matching)
    if reads:
        yield from smoothing_note(a, b, matching.pairs)
    else:
        yield "no tensor was read: weights of equal names, dtypes and shapes may differ"
    for label, side in (("A", a), ("B", b)):
        if side.checkpoint.stray_shards:
            names = ", ".join(side.checkpoint.stray_shards)
            yield f"{label} has safetensors files that are no part of it: {names}"
        links = [name for name in side.checkpoint.skipped if name.endswith("/") and name[0] != "."]
        if links:
            yield f"{label} has folders that were not looked into: {', '.join(links)}"


def _subject(context: Context) -> Subject:
    return Subject(
        path=str(context.path),
        digest=context.checkpoint.digest(),
        model_type=context.model_type,
        algo=context.obeyed.algo if context.obeyed else None,
        num_tensors=len(context.checkpoint.tensors),
        num_quantized=len(context.quantized),
    )
