"""What a conversion does with damage, odd tensors, a full disk: an error or the right bytes."""

import math
import os
from pathlib import Path

import pytest
import torch

from qconvert import backends, output
from qconvert.backends import resolve
from qconvert.convert import SLACK_NBYTES, convert, needed_nbytes
from qconvert.errors import ConvertError
from qconvert.pipeline import Progress, fitting_workers
from qconvert.planner import make_plan
from qconvert.statistics import Statistics
from qschema.checkpoint import open_checkpoint
from qschema.formats import find

from .conversion import CHECKPOINTS, WRITABLE, Make, digests, made_up, recipe, run, tensors, wide


@pytest.mark.parametrize("algo", WRITABLE)
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_and_inf_are_an_error_that_counts_them_all(
    tmp_path: Path, make: Make, name: str, algo: str
) -> None:
    """Across slices, and in formats that read a weight twice: once each."""
    damaged = wide(columns=768)
    damaged[name].view(-1)[[0, 3, 650]] = torch.tensor([math.nan, math.inf, -math.inf])
    source = make(damaged)

    with pytest.raises(ConvertError, match=rf"::{name}: 3 of \d+ elements are NaN or Inf"):
        run(source, tmp_path / "out", algo=algo, budget=2 << 20)

    assert not (tmp_path / "out").exists()


def test_nan_and_inf_can_be_allowed_and_are_reported(tmp_path: Path, make: Make) -> None:
    damaged = wide()
    damaged["model.layers.0.mlp.up_proj.weight"].view(-1)[[0, 3]] = torch.tensor(
        [math.nan, math.inf]
    )

    report = run(make(damaged), tmp_path / "out", allow_nonfinite=True)

    (entry,) = (entry for entry in report.tensors if entry.algo)
    assert entry.num_nonfinite == 2
    codes = tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)
    assert codes[0, [0, 3]].tolist() == [0x7F, 0x7E]


def test_empty_tensors_and_scalars_pass_through(tmp_path: Path, make: Make) -> None:
    source = make(
        {**wide(), "model.a": torch.zeros(0, 4), "model.b": torch.tensor(2.5), "empty.weight": W0}
    )

    run(source, tmp_path / "out")

    after = tensors(tmp_path / "out")
    assert list(after["model.a"].shape) == [0, 4]
    assert after["model.b"].item() == 2.5
    assert list(after["empty.weight"].shape) == [0, 8]


W0 = torch.zeros(0, 8)


def test_a_shard_of_kept_tensors_only_is_copied_bit_for_bit(tmp_path: Path, make: Make) -> None:
    kept = {"model.embed_tokens.weight": torch.randn(300, 200).to(torch.float16)}
    source = make(shards={"b.safetensors": kept, "a.safetensors": wide()})

    run(source, tmp_path / "out")

    assert digests(tmp_path / "out")["b.safetensors"] == digests(source)["b.safetensors"]


def test_a_source_that_shrinks_after_its_header_was_read_is_refused(
    tmp_path: Path, make: Make
) -> None:
    source = make(wide())
    checkpoint = open_checkpoint(source)
    os.truncate(source / "model.safetensors", 100_000)

    with pytest.raises(ConvertError, match="changed after its header was read"):
        convert(
            checkpoint,
            make_plan(checkpoint, recipe()),
            tmp_path / "out",
            statistics=Statistics(),
            device=resolve("cpu", codecs=["FP8_PB_WO"]),
            workers=2,
            budget=2 << 20,
            watch=lambda progress: None,
        )

    assert not list(tmp_path.glob("out*"))


def test_too_little_space_is_refused_before_a_byte_is_written(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(wide())
    stats = os.statvfs(tmp_path)
    full = os.statvfs_result((*stats[:4], 10, *stats[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)

    with pytest.raises(ConvertError, match=r"the result takes .* the disk has 40.0 KiB free"):
        run(source, tmp_path / "out")

    assert not list(tmp_path.glob("out*"))


def test_a_machine_without_kernels_of_any_kind_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QKERNELS_NATIVE", "0")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)

    with pytest.raises(ConvertError, match=r"pip install 'qconvert\[convert\]'"):
        resolve("cpu", codecs=["FP8_PB_WO"])


def test_a_mask_of_infinities_is_kept_and_counted(tmp_path: Path, make: Make) -> None:
    report = run(make({**wide(), "model.mask": torch.full((4, 4), -math.inf)}), tmp_path / "out")

    (entry,) = (entry for entry in report.tensors if entry.source == "model.mask")
    assert entry.num_nonfinite == 16


def test_the_default_workers_fit_the_budget(make: Make) -> None:
    """A wide weight on a machine with many cores: fewer workers, not an error."""
    weight = torch.zeros(128, 53248, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(make({"model.layers.0.mlp.down_proj.weight": weight}))
    plan = make_plan(checkpoint, recipe())

    # 19.5 MiB for one block of rows
    assert fitting_workers(plan, wanted=192, budget=1 << 30) == 52
    assert fitting_workers(plan, wanted=8, budget=1 << 30) == 8
    assert fitting_workers(plan, wanted=8, budget=1) == 1


def test_what_a_killed_run_left_does_not_count_twice(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(wide())
    plan = make_plan(open_checkpoint(source), recipe())
    shard = tmp_path / "out.partial" / "model.safetensors"
    (shard.parent / ".qconvert").mkdir(parents=True)
    shard.write_bytes(bytes(plan.shards[0].nbytes))
    os.sync()
    stats = os.statvfs(tmp_path)
    free = needed_nbytes(plan) - shard.stat().st_blocks * 512
    tight = os.statvfs_result((*stats[:4], -(-free // stats.f_frsize), *stats[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: tight)

    run(source, tmp_path / "out")

    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_space_that_is_asked_for_holds_report_index_and_journal(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many small tensors they are most of it."""
    names = [f"model.layers.{n // 64}.mlp.experts.{n % 64}.up_proj.weight" for n in range(1500)]
    source = make(shards={"a.safetensors": {name: torch.ones(16, 16) for name in names}})
    plan = make_plan(open_checkpoint(source), recipe(algo="W4A16_NVFP4"))
    taken = []
    real = output.forget

    def weighed(path: Path) -> None:
        taken.extend(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
        real(path)

    monkeypatch.setattr(output, "forget", weighed)
    run(source, tmp_path / "out", algo="W4A16_NVFP4")

    assert sum(taken) <= needed_nbytes(plan) - SLACK_NBYTES


@pytest.mark.parametrize("algo", ["FP8_PB_WO", "FP8", "NVFP4", "W4A8_AWQ"])
@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_progress_ends_at_its_total(tmp_path: Path, model: str, algo: str) -> None:
    """Formats that read a weight twice count it twice."""
    checkpoint = open_checkpoint(CHECKPOINTS / model)
    statistics = made_up(checkpoint, tmp_path)
    seen: list[Progress] = []

    convert(
        checkpoint,
        make_plan(checkpoint, recipe(algo=algo), statistics),
        tmp_path / "out",
        statistics=statistics,
        device=resolve("cpu", codecs=[find(algo).codec]),
        workers=2,
        budget=1 << 20,
        watch=seen.append,
    )

    assert sum(seen[-1].done) == seen[-1].total
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert (seen[-1].total > nbytes) == bool(find(algo).specs("global"))
