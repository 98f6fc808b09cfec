"""A DiffResult as text: first what matters to an engine, grouped by name. JSON is its own dump."""

from collections.abc import Iterable, Iterator, Sequence

import click

from qvalidate.diff.names import pattern
from qvalidate.diff.result import (
    DiffResult,
    ErrorSum,
    JsonChange,
    Retyped,
    TensorDiff,
    TensorEntry,
    WeightDiff,
)

# lines of one list that are shown without -v
_SHOWN = 8
# names in one line
_NAMES = 3
# characters of a JSON value
_VALUE = 60
_COLORS = {"+": "green", "-": "red", "~": "yellow"}


def lines(result: DiffResult, *, quiet: bool = False, verbose: bool = False) -> Iterator[str]:
    """Yield the report line by line, coloured; `quiet` leaves out spelling and notes."""
    yield from _section("quantization", _quantization(result), verbose)
    yield from _section("config", map(_json_change, result.config), verbose)
    yield from _section(_tensor_heading(result.tensors), _tensors(result.tensors, verbose), verbose)
    if result.weights is not None:
        heading, rows = _weight_heading(result.weights), _weights(result.weights, verbose)
        yield from _section(heading, rows, verbose)
    yield from _section("files", _files(result), verbose)
    if not quiet:
        yield from _section("only spelt differently", result.spelling, verbose)
        yield from _section("notes", result.notes, verbose)


def summary(result: DiffResult) -> str:
    """Return the one line that a person reads last."""
    sides = f"{result.a.path} -> {result.b.path}"
    if result.areas:
        return f"{sides}: different in {', '.join(result.areas)}"
    if result.weights is None:
        return f"{sides}: no difference outside the weights"
    within = f", weights to within {result.max_error:g}" if result.weights.differing else ""
    return f"{sides}: the same in meaning{within}"


def hint(result: DiffResult) -> str | None:
    """Return what to do next, None if nothing suggests itself."""
    if result.weights is None:
        return None if result.areas else "without --no-weights the weights are compared too"
    if result.weights.differing and result.b.num_quantized and not result.a.num_quantized:
        command = f"qvalidate {result.b.path} --reference {result.a.path}"
        return f"{command} judges these errors by the format"
    return "-v shows every module, --format json every tensor" if result.areas else None


def _section(heading: str, rows: Iterable[str], verbose: bool) -> Iterator[str]:
    found = list(rows)
    if not found:
        return
    yield click.style(heading, bold=True)
    shown = found if verbose or len(found) <= _SHOWN + 1 else found[:_SHOWN]
    yield from (f"  {row}" for row in shown)
    if len(shown) < len(found):
        yield f"  ... and {len(found) - len(shown)} more (-v shows them)"


def _quantization(result: DiffResult) -> Iterator[str]:
    for change in result.quantization.changes:
        yield f"{change.what}: {change.a} -> {change.b}"
    for assignment in result.quantization.assignments:
        names = assignment.modules
        yield f"{assignment.a} -> {assignment.b}: {_count(len(names), 'module')} ({_some(names)})"
    yield from map(_json_change, result.quantization.fields)


def _json_change(change: JsonChange) -> str:
    values = (_shortened(value) for value in (change.a, change.b))
    return f"{change.file}::{change.where}: {' -> '.join(values)}"


def _tensor_heading(tensors: TensorDiff) -> str:
    counts = {
        "equal": tensors.num_equal or 0,
        "with other bytes": len(tensors.changed),
        "of another dtype or shape": len(tensors.retyped),
        "renamed": len(tensors.renamed),
        "restacked": len(tensors.restacked),
        "added": len(tensors.added),
        "removed": len(tensors.removed),
    }
    return f"tensors: {', '.join(f'{num} {what}' for what, num in counts.items() if num)}"


def _tensors(tensors: TensorDiff, verbose: bool) -> Iterator[str]:
    yield from _entries("-", tensors.removed, verbose)
    yield from _entries("+", tensors.added, verbose)
    renamed = ((pair.a, pair.b if verbose else pattern(pair.b)) for pair in tensors.renamed)
    yield from _named("~", ((name, f"is {other}") for name, other in renamed), verbose)
    for stack in tensors.restacked:
        one, other = ("A", "B") if stack.side == "a" else ("B", "A")
        yield f"{_sign('~')} {stack.name}: one tensor in {one}, {stack.num_parts} in {other}"
    grouped: dict[tuple[str, str, str], list[Retyped]] = {}
    for entry in tensors.retyped:
        name = entry.name if verbose else _any_module(entry.name)
        grouped.setdefault((name, entry.a.dtype, entry.b.dtype), []).append(entry)
    for (name, a, b), same in grouped.items():
        change = f"{_layout(a, [entry.a for entry in same])} -> "
        change += _layout(b, [entry.b for entry in same])
        yield f"{_sign('~')} {_times(name, [entry.name for entry in same])}: {change}"
    undecoded = ((name if verbose else _any_module(name), name) for name in tensors.undecoded)
    for name, names in _by_key(undecoded).items():
        yield f"{_sign('~')} {_times(name, names)}: other bytes, not compared as numbers"


def _entries(sign: str, entries: Iterable[TensorEntry], verbose: bool) -> Iterator[str]:
    """Yield the tensors that only one side has; without `verbose` scales by their last name."""
    grouped: dict[tuple[str, str], list[TensorEntry]] = {}
    for entry in entries:
        is_plain = entry.name.endswith((".weight", ".bias"))
        short = pattern(entry.name) if is_plain else _any_module(entry.name)
        grouped.setdefault((entry.name if verbose else short, entry.dtype), []).append(entry)
    for (name, dtype), same in grouped.items():
        shown = _times(name, [entry.name for entry in same])
        yield f"{_sign(sign)} {shown}: {_layout(dtype, same)}"


def _by_key(items: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for key, item in items:
        grouped.setdefault(key, []).append(item)
    return grouped


def _named(sign: str, entries: Iterable[tuple[str, str]], verbose: bool) -> Iterator[str]:
    """Yield `sign name: text` for names that differ by numbers only, and how many they are."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, text in entries:
        grouped.setdefault((name if verbose else pattern(name), text), []).append(name)
    for (name, text), names in grouped.items():
        yield f"{_sign(sign)} {_times(name, names)}: {text}"


def _weight_heading(weights: WeightDiff) -> str:
    num = weights.total.count if weights.total else 0
    parts = [f"{weights.num_equal} equal"]
    if weights.total is not None:
        parts.append(f"{num} differ by {_error(weights.total.relative_error)}")
    if weights.not_compared:
        parts.append(f"{len(weights.not_compared)} not compared")
    return f"weights: {', '.join(parts)} (||A - B|| / ||A||)"


def _weights(weights: WeightDiff, verbose: bool) -> Iterator[str]:
    missing = ((item.name, f"not compared: {item.reason}") for item in weights.not_compared)
    yield from _named("~", missing, verbose)
    counts: dict[tuple[str, str], int] = {}
    for error in weights.differing:
        if error.what == "weight":
            counts[error.a, error.b] = counts.get((error.a, error.b), 0) + 1
    for (a, b), num in counts.items():
        yield f"{a if a == b else f'{a} -> {b}'}: {_count(num, 'weight')}"
    worst_first = sorted(weights.kinds, key=_rank, reverse=True)
    yield from (_sum(kind.name, kind) for kind in worst_first)
    layers = [layer for layer in weights.layers if layer.name]
    if verbose:
        yield from (_sum(layer.name, layer) for layer in layers)
    elif len(layers) > 1:
        least, most = min(layers, key=_rank), max(layers, key=_rank)
        yield f"by layer: {_of(least)} to {_of(most)}"
    for error in weights.differing if verbose else ():
        yield f"{error.name}: {_error(error.relative_error)}, largest {error.max_abs:.3g}"
    yield from _others(weights)


def _others(weights: WeightDiff) -> Iterator[str]:
    """Yield what became of biases and of scales of inputs."""
    grouped: dict[str, list[float | None]] = {}
    for error in weights.differing:
        if error.what == "tensor":
            grouped.setdefault(_any_module(error.name), []).append(error.relative_error)
    for name, errors in grouped.items():
        # the worst come first
        yield f"{name} x{len(errors)}: {'up to ' if len(errors) > 1 else ''}{_error(errors[0])}"


def _files(result: DiffResult) -> Iterator[str]:
    signs = {"added": "+", "removed": "-", "changed": "~"}
    for change in result.files:
        silent = "" if change.is_read else ", which no engine reads"
        kind = f"{change.kind}{silent}"
        yield f"{_sign(signs[change.change])} {change.name}: {change.change} ({kind})"


def _sum(name: str, found: ErrorSum) -> str:
    each = f" x{found.count}" if found.count > 1 else ""
    worst = f", at worst {_error(found.worst_error)} in {found.worst}" if found.count > 1 else ""
    return f"{name}{each}: {_error(found.relative_error)}{worst}"


def _of(found: ErrorSum) -> str:
    return f"{_error(found.relative_error)} ({found.name})"


def _rank(found: ErrorSum) -> float:
    return float("inf") if found.relative_error is None else found.relative_error


def _error(error: float | None) -> str:
    return "anything, A is zeros" if error is None else f"{error:.3g}"


def _layout(dtype: str, entries: Sequence[TensorEntry]) -> str:
    shapes = {tuple(entry.shape) for entry in entries}
    return f"{dtype} {entries[0].shape}" if len(shapes) == 1 else f"{dtype}, {len(shapes)} shapes"


def _times(name: str, names: Sequence[str]) -> str:
    return f"{name} x{len(names)}" if len(names) > 1 else names[0]


def _any_module(name: str) -> str:
    return f"*.{name.rpartition('.')[2]}"


def _sign(sign: str) -> str:
    return click.style(sign, fg=_COLORS[sign])


def _count(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(pattern(name), []).append(name)
    shown = [_times(group, same) for group, same in grouped.items()]
    return ", ".join(shown[:_NAMES]) + (", ..." if len(shown) > _NAMES else "")


def _shortened(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= _VALUE else f"{value[: _VALUE - 3]}..."
