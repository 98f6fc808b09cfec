"""The bytes of a conversion: right, and the same whatever the budget, workers or backend."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qconvert import backends
from qconvert.backends import resolve
from qconvert.convert import convert
from qconvert.errors import ConvertError
from qconvert.pipeline import fitting_workers
from qconvert.planner import make_plan
from qkernels import kernels_for
from qschema.checkpoint import open_checkpoint
from qschema.formats import find, formats
from qschema.recipe import Recipe, Rule
from qschema.report import Report

CHECKPOINTS = Path(__file__).parents[2] / "fixtures" / "checkpoints"
MODELS = ("llama", "qwen3", "mixtral", "llama_odd", "llama_adv")
Make = Callable[..., Path]


def run(
    source: Path,
    output: Path,
    *,
    algo: str = "FP8_PB_WO",
    workers: int = 2,
    budget: int = 64 << 20,
    allow_nonfinite: bool = False,
) -> Report:
    checkpoint = open_checkpoint(source)
    recipe = Recipe(rules=[Rule(match="*", algo=algo)], allow_nonfinite=allow_nonfinite)
    return convert(
        checkpoint,
        make_plan(checkpoint, recipe),
        output,
        device=resolve("cpu", formats=[find(algo).name]),
        workers=workers,
        budget=budget,
        watch=lambda progress: None,
    )


def digests(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())
    }


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def wide(rows: int = 1000, columns: int = 700) -> dict[str, torch.Tensor]:
    """Return a checkpoint whose weight takes several slices under a small budget."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, columns, generator=generator)
    return {"model.layers.0.mlp.up_proj.weight": weight, "model.norm.weight": torch.ones(columns)}


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("model", MODELS)
def test_bytes_do_not_depend_on_budget_or_workers(tmp_path: Path, model: str, algo: str) -> None:
    source = CHECKPOINTS / model
    run(source, tmp_path / "a", algo=algo, workers=1, budget=4 << 30)
    run(source, tmp_path / "b", algo=algo, workers=2, budget=64 << 20)
    # small enough to cut the larger weights into slices
    run(source, tmp_path / "c", algo=algo, workers=3, budget=3 * 280_000)

    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")


@pytest.mark.parametrize("algo", list(formats()))
def test_bytes_do_not_depend_on_the_backend(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch, algo: str
) -> None:
    source = make(wide())
    assert resolve("cpu", formats=[algo]).name == "cpu (native)"
    run(source, tmp_path / "native", algo=algo, budget=2 << 20)
    monkeypatch.setenv("QKERNELS_NATIVE", "0")
    assert resolve("cpu", formats=[algo]).name == "cpu (torch)"
    run(source, tmp_path / "torch", algo=algo, budget=4 << 20)

    assert digests(tmp_path / "native") == digests(tmp_path / "torch")


@pytest.mark.parametrize("algo", list(formats()))
@pytest.mark.parametrize("model", MODELS)
def test_weights_equal_the_reference_and_the_rest_is_untouched(
    tmp_path: Path, model: str, algo: str
) -> None:
    run(CHECKPOINTS / model, tmp_path / "out", algo=algo)

    before, after = tensors(CHECKPOINTS / model), tensors(tmp_path / "out")
    report = Report.parse(
        json.loads((tmp_path / "out" / "qconvert_report.json").read_text()), file="report"
    )
    for entry in report.tensors:
        if entry.algo is None:
            expected = {entry.source: before[entry.source]}
        else:
            reference = kernels_for(entry.algo).quantize_torch(before[entry.source])
            module = entry.source.removesuffix("weight")
            expected = {module + suffix: tensor for suffix, tensor in reference.items()}
        assert [written.name for written in entry.outputs] == list(expected)
        for written in entry.outputs:
            data = after[written.name].reshape(-1).view(torch.uint8)
            assert torch.equal(data, expected[written.name].reshape(-1).view(torch.uint8))
            assert list(after[written.name].shape) == list(expected[written.name].shape)
            assert written.sha256 == hashlib.sha256(bytes(data.tolist())).hexdigest()
    assert sorted(after) == sorted(out.name for entry in report.tensors for out in entry.outputs)


@pytest.mark.parametrize("algo", list(formats()))
def test_the_reported_error_is_that_of_the_dequantized_weight(
    tmp_path: Path, make: Make, algo: str
) -> None:
    source = make(wide())

    report = run(source, tmp_path / "out", algo=algo)

    weight = wide()["model.layers.0.mlp.up_proj.weight"]
    after = tensors(tmp_path / "out")
    kernels = kernels_for(algo)
    restored = kernels.dequantize_torch(
        {suffix: after[f"model.layers.0.mlp.up_proj.{suffix}"] for suffix in find_suffixes(algo)},
        dtype=torch.float32,
    )
    expected = (restored.double() - weight.double()).norm() / weight.double().norm()
    (entry,) = (entry for entry in report.tensors if entry.algo)
    assert entry.relative_error is not None
    assert math.isclose(entry.relative_error, expected.item(), rel_tol=1e-5)
    # e4m3 keeps 4 significant bits: at most half of 2^-3, on average far less
    assert 0.01 < entry.relative_error < 0.04
    assert (entry.num_saturated, entry.num_nonfinite) == (0, 0)


def find_suffixes(algo: str) -> list[str]:
    return [spec.suffix for spec in find(algo).tensors]


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_and_inf_are_an_error_that_counts_them_all(
    tmp_path: Path, make: Make, name: str
) -> None:
    damaged = wide()
    damaged[name].view(-1)[[0, 3, 650]] = torch.tensor([math.nan, math.inf, -math.inf])
    source = make(damaged)

    with pytest.raises(ConvertError, match=rf"::{name}: 3 of \d+ elements are NaN or Inf"):
        run(source, tmp_path / "out", budget=2 << 20)

    assert not list(tmp_path.glob("out*"))


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

    with pytest.raises(ConvertError, match=r"has 100000 bytes, its header described at least"):
        convert(
            checkpoint,
            make_plan(checkpoint, Recipe(rules=[Rule(match="*", algo="FP8_PB_WO")])),
            tmp_path / "out",
            device=resolve("cpu", formats=["FP8_PB_WO"]),
            workers=2,
            budget=2 << 20,
            watch=lambda progress: None,
        )

    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(wide())
    real = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if offset > 100_000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)

    with pytest.raises(ConvertError, match="the disk is full; nothing was left behind"):
        run(source, tmp_path / "out", budget=2 << 20)

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


def test_short_reads_and_writes_are_continued(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(wide())
    run(source, tmp_path / "whole")
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: read(fd, [to[0][:4093]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:1021], at))

    run(source, tmp_path / "pieces")

    assert digests(tmp_path / "whole") == digests(tmp_path / "pieces")


def test_a_machine_without_kernels_of_any_kind_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QKERNELS_NATIVE", "0")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)

    with pytest.raises(ConvertError, match=r"pip install 'qconvert\[convert\]'"):
        resolve("cpu", formats=["FP8_PB_WO"])


def test_a_mask_of_infinities_is_kept_and_counted(tmp_path: Path, make: Make) -> None:
    report = run(make({**wide(), "model.mask": torch.full((4, 4), -math.inf)}), tmp_path / "out")

    (entry,) = (entry for entry in report.tensors if entry.source == "model.mask")
    assert entry.num_nonfinite == 16


def test_the_default_workers_fit_the_budget(make: Make) -> None:
    """A wide weight on a machine with many cores: fewer workers, not an error."""
    weight = torch.zeros(128, 53248, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(make({"model.layers.0.mlp.down_proj.weight": weight}))
    plan = make_plan(checkpoint, Recipe(rules=[Rule(match="*", algo="FP8_PB_WO")]))

    # 19.5 MiB for one block of rows
    assert fitting_workers(plan, wanted=192, budget=1 << 30) == 52
    assert fitting_workers(plan, wanted=8, budget=1 << 30) == 8
    assert fitting_workers(plan, wanted=8, budget=1) == 1


def test_what_a_killed_run_left_does_not_count_as_used_space(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(wide())
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".qconvert-partial").touch()
    (partial / "half").write_bytes(b"x")
    stats = os.statvfs(tmp_path)
    full = os.statvfs_result((*stats[:4], 10, *stats[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full if (partial / "half").exists() else stats)

    run(source, tmp_path / "out")

    assert (tmp_path / "out" / "model.safetensors").exists()
