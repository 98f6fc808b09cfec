"""Going on after an interruption: what is kept, what is redone, what is refused."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qschema.checkpoint import open_checkpoint

from .conversion import CHECKPOINTS, Make, digests, recipe, wide
from .interrupted import Stop, go


def test_a_second_run_redoes_only_what_is_missing(
    tmp_path: Path, stop_after: Stop, converted: list[str]
) -> None:
    source = CHECKPOINTS / "llama"
    go(source, tmp_path / "whole")
    num_units = len(converted)
    with stop_after(4):
        go(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    converted.clear()

    outcome = go(source, tmp_path / "out")

    assert len(converted) == num_units - 4
    assert outcome.timings.reused_nbytes > 0
    assert "went on from an interrupted run" in outcome.notes[0]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_fresh_starts_over(tmp_path: Path, stop_after: Stop, converted: list[str]) -> None:
    source = CHECKPOINTS / "llama"
    with stop_after(4):
        go(source, tmp_path / "out")
    converted.clear()

    outcome = go(source, tmp_path / "out", fresh=True)

    assert len(converted) == len(open_checkpoint(source).tensors)
    assert (outcome.notes, outcome.timings.reused_nbytes) == ([], 0)


def test_a_run_that_did_nothing_leaves_nothing(tmp_path: Path, stop_after: Stop) -> None:
    with stop_after(0):
        go(CHECKPOINTS / "llama", tmp_path / "out")

    assert not list(tmp_path.iterdir())


def test_a_changed_recipe_redoes_only_what_it_touches(
    tmp_path: Path, stop_after: Stop, converted: list[str]
) -> None:
    """Every offset moves, the bytes of the other tensors are taken over."""
    source = CHECKPOINTS / "llama"
    changed = recipe(exclude=["model.layers.0.mlp.*"])
    go(source, tmp_path / "whole", changed)
    with stop_after(len(converted) - 1):
        go(source, tmp_path / "out")
    done = set(converted)
    converted.clear()

    outcome = go(source, tmp_path / "out", changed)

    mlp = {name for name in done if name.startswith("model.layers.0.mlp.")}
    assert mlp <= set(converted)
    assert len(converted) == len(mlp) + 1
    assert "the plan has changed" in outcome.notes[0]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_plans_that_alternate_lose_nothing(
    tmp_path: Path, stop_after: Stop, converted: list[str]
) -> None:
    source = CHECKPOINTS / "llama"
    first, second = recipe(), recipe(exclude=["model.layers.0.*"])
    go(source, tmp_path / "whole")
    with stop_after(8):
        go(source, tmp_path / "out", first)
    with stop_after(2):
        go(source, tmp_path / "out", second)
    converted.clear()

    go(source, tmp_path / "out", first)

    assert len(converted) <= len(open_checkpoint(source).tensors) - 8
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def damage_journal(partial: Path) -> None:
    journal = partial / ".qconvert" / "journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 0x20
    journal.write_bytes(data[:-3])


def no_journal(partial: Path) -> None:
    (partial / ".qconvert" / "journal").unlink()


def empty_journal(partial: Path) -> None:
    (partial / ".qconvert" / "journal").write_bytes(b"")


def another_head(partial: Path) -> None:
    journal = partial / ".qconvert" / "journal"
    journal.write_bytes(b"0" + journal.read_bytes()[1:])


def short_shard(partial: Path) -> None:
    shard = next(partial.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)


def no_shard(partial: Path) -> None:
    next(partial.glob("*.safetensors")).unlink()


def other_bytes(partial: Path) -> None:
    for shard in partial.glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        for place in range(0, len(data), 997):
            data[place] ^= 1
        shard.write_bytes(data)


def long_shard(partial: Path) -> None:
    shard = next(partial.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"x" * 1000)


@pytest.mark.parametrize(
    "damage",
    [
        damage_journal,
        no_journal,
        empty_journal,
        another_head,
        short_shard,
        no_shard,
        other_bytes,
        long_shard,
    ],
)
@pytest.mark.parametrize("changed", [False, True])
def test_damage_costs_work_and_no_byte(
    tmp_path: Path, stop_after: Stop, damage: Callable[[Path], None], changed: bool
) -> None:
    source = CHECKPOINTS / "llama"
    asked = recipe(exclude=["model.layers.1.*"]) if changed else recipe()
    go(source, tmp_path / "whole", asked)
    with stop_after(9):
        go(source, tmp_path / "out")
    damage(tmp_path / "out.partial")

    go(source, tmp_path / "out", asked)

    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_journal_of_another_version_is_not_trusted(
    tmp_path: Path, stop_after: Stop, monkeypatch: pytest.MonkeyPatch, converted: list[str]
) -> None:
    source = CHECKPOINTS / "llama"
    with monkeypatch.context() as patch, stop_after(4):
        patch.setattr("qconvert.planner.__version__", "0.0.1")
        go(source, tmp_path / "out")
    converted.clear()

    outcome = go(source, tmp_path / "out")

    assert "was begun with qconvert 0.0.1; starting over" in outcome.notes[0]
    assert len(converted) == len(open_checkpoint(source).tensors)


def test_a_run_that_fails_while_setting_aside_loses_nothing(
    tmp_path: Path, stop_after: Stop, converted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CHECKPOINTS / "llama"
    changed = recipe(exclude=["model.layers.0.mlp.*"])
    go(source, tmp_path / "whole", changed)
    with stop_after(len(converted) - 1):
        go(source, tmp_path / "out")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("qconvert.output.Journal", fail)
        with pytest.raises(ConvertError, match="the disk is full"):
            go(source, tmp_path / "out", changed)
    converted.clear()

    go(source, tmp_path / "out", changed)

    assert len(converted) <= 4
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("changed", [False, True])
def test_a_file_of_somebody_else_is_neither_published_nor_removed(
    tmp_path: Path, stop_after: Stop, changed: bool
) -> None:
    source = CHECKPOINTS / "llama"
    with stop_after(4):
        go(source, tmp_path / "out")
    foreign = tmp_path / "out.partial" / "extra.safetensors"
    foreign.write_text("precious")

    with pytest.raises(ConvertError, match=r"holds extra.safetensors, no part of this conversion"):
        go(source, tmp_path / "out", recipe(exclude=["model.layers.0.*"]) if changed else None)

    assert foreign.read_text() == "precious"
    go(source, tmp_path / "out", fresh=True)


def test_many_shards_are_gone_on_from_with_few_descriptors(
    tmp_path: Path, make: Make, stop_after: Stop
) -> None:
    shards = {
        f"{number:02}.safetensors": {f"model.layers.{number}.mlp.up_proj.weight": torch.ones(8, 8)}
        for number in range(60)
    }
    source = make(shards=shards)
    with stop_after(59):
        go(source, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        go(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_reused_is_counted_once(tmp_path: Path, stop_after: Stop) -> None:
    """In a format that reads its source twice."""
    source, asked = CHECKPOINTS / "llama", recipe(algo="W4A16_NVFP4")
    plan = make_plan(open_checkpoint(source), asked)
    with stop_after(len(plan.units) - 1):
        go(source, tmp_path / "out", asked)

    timings = go(source, tmp_path / "out", asked).timings

    assert 0 < timings.reused_nbytes < timings.source_nbytes


def test_a_shard_that_could_not_be_flushed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages may look right in the cache and never have reached the disk."""
    source = CHECKPOINTS / "llama"
    real = os.fsync
    names: list[str] = []

    def fail(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".safetensors"):
            names.append(name)
            raise OSError(5, "Input/output error")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ConvertError, match="Input/output error"):
            go(source, tmp_path / "out")

    assert names
    assert not Path(names[0]).exists()


def test_a_weight_with_nan_is_refused_again_when_it_was_allowed_before(
    tmp_path: Path, make: Make, stop_after: Stop
) -> None:
    damaged = wide()
    damaged["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    source = make(damaged)
    with stop_after(1):
        go(source, tmp_path / "out", recipe(allow_nonfinite=True))

    with pytest.raises(ConvertError, match="1 of 700000 elements are NaN or Inf"):
        go(source, tmp_path / "out")


def test_side_files_of_an_earlier_plan_do_not_stay(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(wide())
    (source / "notes.txt").write_text("x")

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("qconvert.output._sync_directories", fail)
        with pytest.raises(ConvertError, match="Input/output error"):
            go(source, tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes.txt").exists()

    go(source, tmp_path / "out", recipe(leave=["notes.txt"]))

    assert not (tmp_path / "out" / "notes.txt").exists()
