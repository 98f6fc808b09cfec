"""What is noted of copies between tensors without data: the parts, what is left, the dtypes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvalidate.engines import dry_record as record


def base_of(tensor: torch.Tensor) -> Any:
    return (record.geometry(tensor), tensor.storage_offset(), tensor.element_size())


View = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("shape", "view", "box"),
    [
        ((4, 6), lambda t: t, ((0, 4), (0, 6))),
        ((4, 6), lambda t: t.narrow(0, 1, 2), ((1, 3), (0, 6))),
        ((4, 6), lambda t: t.narrow(1, 2, 3), ((0, 4), (2, 5))),
        ((4, 6), lambda t: t.t().narrow(0, 2, 3), ((0, 4), (2, 5))),
        ((4, 6), lambda t: t.view(-1), ((0, 4), (0, 6))),
        ((4, 6), lambda t: t.view(2, 2, 6)[1], ((2, 4), (0, 6))),
        ((4, 6), lambda t: t[3], ((3, 4), (0, 6))),
        ((4, 6), lambda t: t[3, 2], ((3, 4), (2, 3))),
        ((4, 1, 6, 1), lambda t: t.squeeze().narrow(0, 2, 1), ((2, 3), (0, 6))),
        ((2, 4, 6), lambda t: t[1].narrow(0, 2, 2), ((1, 2), (2, 4), (0, 6))),
        ((2, 4, 6), lambda t: t.unsqueeze(0).unbind()[0][1].chunk(2, 0)[0],
         ((1, 2), (0, 2), (0, 6))),
        ((), lambda t: t.reshape(1), ()),
        ((1,), lambda t: t[0], ()),
        # every second row is no box
        ((4, 6), lambda t: t[::2], None),
        ((4, 6), lambda t: t.view(-1)[3:9], None),
    ],
)  # fmt: skip
def test_the_part_that_a_view_shows(
    shape: tuple[int, ...], view: View, box: record.Box | None
) -> None:
    tensor = torch.empty(shape, device="meta")

    assert record.box_of(base_of(tensor), view(tensor)) == box


@pytest.mark.parametrize(
    ("boxes", "count", "empty"),
    [
        (set(), 24, (((0, 4), (0, 6)),)),
        ({((0, 4), (0, 6))}, 0, ()),
        ({((0, 2), (0, 6)), ((2, 4), (0, 6))}, 0, ()),
        # written twice is not written elsewhere
        ({((0, 2), (0, 6)), ((1, 2), (0, 6))}, 12, (((2, 4), (0, 6)),)),
        ({((0, 4), (0, 3)), ((0, 2), (3, 6))}, 6, (((2, 4), (3, 6)),)),
    ],
)
def test_what_no_box_holds(
    boxes: set[record.Box], count: int, empty: tuple[record.Box, ...]
) -> None:
    assert record.gaps((4, 6), frozenset(boxes)) == (count, empty)


def recorded(work: Callable[[dict[str, torch.Tensor], torch.Tensor], object]) -> Any:
    """Return feed, target and mode after `work` on the tensors of a checkpoint and a parameter."""
    feed = record.Feed(torch)
    for name, dtype in (("a", "F32"), ("b", "BF16")):
        feed.sources[name] = record.Source(name, feed.empty(dtype, [2, 6]))
    parameter = torch.empty(4, 6, device="meta")
    target = record.Target("p", parameter)
    mode = record.recorder(torch, feed, {record.key(parameter): target})
    with mode:
        work({name: source.tensor for name, source in feed.sources.items()}, parameter)
    return feed, target, mode


def test_a_copy_into_a_part_is_noted() -> None:
    feed, target, mode = recorded(lambda t, p: p.data.narrow(0, 2, 2).copy_(t["a"]))

    assert target.written == {((2, 4), (0, 6))}
    assert feed.sources["a"].read == {((0, 2), (0, 6))}
    assert feed.sources["b"].read == set()
    assert mode.casts == set()


def test_an_assignment_is_a_copy_and_a_conversion() -> None:
    feed, target, mode = recorded(lambda t, p: p.__setitem__(3, t["b"][1]))

    assert target.written == {((3, 4), (0, 6))}
    assert feed.sources["b"].read == {((1, 2), (0, 6))}
    assert mode.casts == {("b", "p", "bfloat16", "float32")}


def test_what_a_tensor_was_computed_from_counts_as_read() -> None:
    feed, target, mode = recorded(
        lambda t, p: p.copy_(torch.cat([t["a"], t["b"][:1].float()]).repeat_interleave(2, 0)[:4])
    )

    assert target.written == {((0, 4), (0, 6))}
    assert feed.sources["a"].read == {((0, 2), (0, 6))}
    assert feed.sources["b"].read == {((0, 1), (0, 6))}
    assert mode.casts == {("b", "", "bfloat16", "float32")}


def test_a_filled_part_is_written() -> None:
    _, target, _ = recorded(lambda t, p: p[3:].data.fill_(0))

    assert target.written == {((3, 4), (0, 6))}


def test_headers_become_empty_tensors_in_the_order_of_shards_and_names(tmp_path: Path) -> None:
    files = []
    for shard, names in (("model-10.safetensors", ["a"]), ("model-2.safetensors", ["c", "b"])):
        header = {n: {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]} for n in names}
        text = json.dumps({"__metadata__": {}, **header}).encode()
        (tmp_path / shard).write_bytes(len(text).to_bytes(8, "little") + text)
        files.append(str(tmp_path / shard))

    fed = list(record.Feed(torch)(files))

    assert [name for name, _ in fed] == ["b", "c", "a"]
    assert {(tuple(t.shape), t.dtype, t.device.type) for _, t in fed} == {
        ((2, 3), torch.float8_e4m3fn, "meta")
    }
