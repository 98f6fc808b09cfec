"""What a loader copies from where to where, seen from outside: which part of which tensor.

Runs inside an engine's interpreter, copied beside `dry_vllm.py`: the standard library, torch and
numpy (Python 3.10+), nothing of qvalidate, and nothing of the engine. No tensor here has data.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from math import prod
from typing import Any

# what changes a tensor in place; the rest of torch's are not used by loaders
WRITES = {
    "copy_", "fill_", "zero_", "index_copy_", "index_fill_", "masked_fill_", "masked_scatter_",
    "scatter_", "normal_", "uniform_",
}  # fmt: skip
# safetensors' names of dtypes, and torch's
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32",
    "U32": "uint32", "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2", "C64": "complex64",
}  # fmt: skip
# one per dimension, largest stride first: [start, stop)
Box = tuple[tuple[int, int], ...]
Boxes = frozenset[Box]


def geometry(tensor: Any) -> list[tuple[int, int]]:
    """Return (size, stride) of the dimensions that hold more than one element, outermost first."""
    dims = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s > 0]
    return sorted(dims, key=lambda dim: -dim[1])


def box_of(base: Any, view: Any) -> "Box | None":
    """Return the part of `base` that `view` shows, None if it is not one box.

    base: (dims as in `geometry`, offset, bytes per element); the strides of `base` are dense.
    """
    dims, base_offset, itemsize = base
    if view.element_size() != itemsize:
        return None
    rest, starts = view.storage_offset() - base_offset, []
    for size, stride in dims:
        start, rest = divmod(rest, stride)
        if start >= size:
            return None
        starts.append(start)
    extents, at = [1] * len(dims), {stride: index for index, (_, stride) in enumerate(dims)}
    parts: list[tuple[int, int]] = []
    for size, stride in reversed(geometry(view)):
        if parts and stride == parts[-1][0] * parts[-1][1]:
            parts[-1] = (parts[-1][0] * size, parts[-1][1])
        else:
            parts.append((size, stride))
    for size, stride in parts:
        index = at.get(stride, -1)
        while size > 1:
            if index < 0:
                return None
            room = dims[index][0]
            if starts[index] + size <= room:
                extents[index], size = size, 1
            elif starts[index] == 0 and size % room == 0:
                extents[index], size, index = room, size // room, index - 1
            else:
                return None
    return tuple((start, start + n) for start, n in zip(starts, extents, strict=True))


@cache
def grown(boxes: Boxes, box: Box) -> Boxes:
    """Return `boxes` and `box`, as one object for the many tensors that are read alike."""
    return boxes | {box}


@cache
def gaps(sizes: tuple[int, ...], boxes: Boxes) -> tuple[int, tuple[Box, ...]]:
    """Return how many elements no box holds, and the parts that they make up."""
    import numpy as np

    full = tuple((0, size) for size in sizes)
    if full in boxes:
        return 0, ()
    if not boxes:
        return prod(sizes), (full,)
    cuts = [
        sorted({0, size, *(edge for box in boxes for edge in box[dim])})
        for dim, size in enumerate(sizes)
    ]
    index = [{edge: at for at, edge in enumerate(edges)} for edges in cuts]
    grid = np.zeros([len(edges) - 1 for edges in cuts], bool)
    for box in boxes:
        grid[tuple(slice(index[d][a], index[d][b]) for d, (a, b) in enumerate(box))] = True
    empty = tuple(
        tuple((cuts[d][at], cuts[d][at + 1]) for d, at in enumerate(cell))
        for cell in np.argwhere(~grid).tolist()
    )
    return sum(prod(stop - start for start, stop in box) for box in empty), empty


class Source:
    """One tensor of the checkpoint and what was read of it, over all ranks."""

    def __init__(self, name: str, tensor: Any) -> None:
        self.name = name
        self.tensor = tensor
        self.base = (geometry(tensor), 0, tensor.element_size())
        self.sizes = tuple(size for size, _ in self.base[0])
        self.read: Boxes = frozenset()


class Target:
    """One parameter of the model and what was written into it on one rank."""

    def __init__(self, name: str, tensor: Any) -> None:
        self.name = name
        self.tensor = tensor
        self.base = (geometry(tensor), tensor.storage_offset(), tensor.element_size())
        self.sizes = tuple(size for size, _ in self.base[0])
        self.written: set[Box] = set()


class Feed:
    """The tensors of the checkpoint, in the order in which vLLM's own iterator gives them."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.sources: dict[str, Source] = {}
        # what the loader has in hand, and for which rank
        self.current: Source | None = None
        self.rank = 0

    def __call__(self, files: Iterable[str], *args: object, **kwargs: object) -> Iterator[Any]:
        for file in sorted(files, key=natural):
            for name, dtype, shape in sorted(headers(file)):
                if name not in self.sources:
                    self.sources[name] = Source(name, self.empty(dtype, shape))
                self.current = self.sources[name]
                # vLLM hangs attributes on what it is given: each rank gets an object of its own
                yield name, self.current.tensor.detach()
        self.current = None

    def empty(self, dtype: str, shape: list[int]) -> Any:
        if dtype == "F4":
            shape = [*shape[:-1], shape[-1] // 2]
        found = getattr(self.torch, DTYPES.get(dtype, ""), None)
        if found is None:
            raise ValueError(f"this torch has no dtype for safetensors' {dtype}")
        return self.torch.empty(shape, dtype=found, device="meta")


def natural(file: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file)]


def headers(file: str) -> Iterator[tuple[str, str, list[int]]]:
    """Yield name, dtype and shape of every tensor in a safetensors file."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry["dtype"], entry["shape"]


def recorder(torch: Any, feed: Feed, targets: dict[int, Target]) -> Any:
    """Return a mode that notes, for as long as it is entered, what is copied from where to where.

    Storages tell tensors apart: a view of a parameter shares the parameter's. A tensor that is
    computed from the checkpoint's gets a storage of its own; what it was made from counts as read.
    """
    from torch.overrides import TorchFunctionMode

    sources = {key(source.tensor): source for source in feed.sources.values()}
    kept: list[Any] = []

    class Recorder(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            # (tensor, parameter, dtype, dtype of the copy)
            self.casts: set[tuple[str, str, str, str]] = set()
            # storage -> the tensor that it was computed from
            self.derived: dict[int, str] = {}
            self.num_irregular = 0

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.__name__
            if name in WRITES:
                self.write(args[0], [*args[1:], *(kwargs or {}).values()])
            elif name == "__setitem__":
                self.write(args[0][args[1]], [args[2]])
            elif isinstance(result, torch.Tensor):
                self.made(result, args, name)
            return result

        def write(self, into: Any, values: list[Any]) -> None:
            if not isinstance(into, torch.Tensor) or not into.numel():
                return
            target = targets.get(key(into))
            if target is not None:
                box = box_of(target.base, into)
                self.num_irregular += box is None
                target.written.add(box or tuple((0, size) for size in target.sizes))
            for value in values:
                if isinstance(value, torch.Tensor):
                    self.read(value)
                    self.cast(value, into.dtype, target.name if target else "")

        def read(self, value: Any) -> None:
            source = self.source_of(value)
            if source is None or not value.numel():
                return
            box = box_of(source.base, value) if value.device.type == "meta" else None
            self.num_irregular += box is None
            box = box or tuple((0, size) for size in source.sizes)
            source.read = grown(source.read, box)

        def source_of(self, value: Any) -> "Source | None":
            found = sources.get(key(value))
            if found is None and feed.current is not None:
                # the tensor in hand is known from here on
                sources[key(feed.current.tensor)] = feed.current
                found = sources.get(key(value))
            return found

        def cast(self, value: Any, dtype: Any, parameter: str) -> None:
            source = self.source_of(value)
            name = source.name if source else self.derived.get(key(value), "")
            if name and value.dtype != dtype:
                self.casts.add((name, parameter, plain(value.dtype), plain(dtype)))

        def made(self, result: Any, args: Any, name: str) -> None:
            own = key(result)
            if own in targets or own in sources:
                return
            for value in flat(args):
                source = self.source_of(value)
                name_of = source.name if source else self.derived.get(key(value))
                if name_of is None or key(value) == own:
                    continue
                if source is not None:
                    self.read(value)
                self.derived[own] = name_of
                # a storage that lives on keeps its address
                kept.append(result)
                if name in ("to", "type", "float", "half", "bfloat16", "double"):
                    self.cast(value, result.dtype, "")

    def flat(values: Any) -> Iterator[Any]:
        for value in values:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from flat(value)

    return Recorder()


def key(tensor: Any) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
