"""Shared by the converter's tests: conversions in one call, their bytes, made-up statistics."""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from qconvert.backends import Device, resolve
from qconvert.convert import convert
from qconvert.planner import make_plan
from qconvert.statistics import Statistics, open_statistics
from qschema.checkpoint import Checkpoint, open_checkpoint
from qschema.formats import find, formats
from qschema.plan import Plan
from qschema.recipe import Recipe, Rule
from qschema.report import Report

CHECKPOINTS = Path(__file__).parents[2] / "fixtures" / "checkpoints"
MODELS = ("llama", "qwen3", "mixtral", "llama_odd", "llama_adv")
WRITABLE = tuple(name for name, declared in formats().items() if not declared.read_only)
Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def recipe(*rules: tuple[str, str], algo: str = "FP8_PB_WO", **fields: object) -> Recipe:
    """Return a recipe of (match, algo) rules, or of one format for all."""
    found = [Rule(match=match, algo=name) for match, name in rules or (("*", algo),)]
    return Recipe.model_validate({"rules": found, **fields})


def run(
    source: Path,
    output: Path,
    *,
    algo: str = "FP8_PB_WO",
    asked: Recipe | None = None,
    statistics: Statistics | None = None,
    device: Device | None = None,
    workers: int = 2,
    budget: int = 64 << 20,
    fresh: bool = False,
    **fields: object,
) -> Report:
    """Return the report of a conversion by `asked`, or of everything to `algo`.

    Formats that need statistics get made-up ones unless some are given.
    """
    checkpoint = open_checkpoint(source)
    asked = asked or recipe(algo=algo, **fields)
    if statistics is None:
        statistics = made_up(checkpoint, output.parent)
    plan = make_plan(checkpoint, asked, statistics)
    convert(
        checkpoint,
        plan,
        output,
        statistics=statistics,
        device=device or resolve("cpu", codecs=[find(name).codec for name in plan.algos]),
        workers=workers,
        budget=budget,
        watch=lambda progress: None,
        fresh=fresh,
    )
    return report_in(output)


def report_in(output: Path) -> Report:
    """Return the report that a conversion left in `output`."""
    return Report.model_validate_json((output / "qconvert_report.json").read_bytes())


def planned(source: Path, *rules: tuple[str, str], **fields: object) -> Plan:
    """Return the plan of a recipe, with made-up statistics."""
    checkpoint = open_checkpoint(source)
    with TemporaryDirectory() as folder:
        statistics = made_up(checkpoint, Path(folder))
    return make_plan(checkpoint, recipe(*rules, **fields), statistics)


def amax_of(module: str) -> float:
    """Return a made-up largest input, different for almost any two modules."""
    return 1.0 + zlib.crc32(module.encode()) % 997 / 64


def made_up(checkpoint: Checkpoint, folder: Path) -> Statistics:
    """Return statistics of every module of `checkpoint`, from a file in `folder`."""
    modules = [name.removesuffix(".weight") for name in checkpoint.tensors]
    inputs = {module: amax_of(module) for module in modules}
    return measured(folder, inputs=inputs, name="made_up.json")


def measured(
    folder: Path,
    *,
    inputs: Mapping[str, float] | None = None,
    kv_cache: Mapping[str, Mapping[str, float]] | None = None,
    vectors: Mapping[str, torch.Tensor] | None = None,
    name: str = "stats.json",
) -> Statistics:
    """Return the statistics that a file in `folder` holds after this."""
    document: dict[str, object] = {"document": "qconvert-amax", "version": 1}
    document |= {"inputs": dict(inputs or {}), "kv_cache": dict(kv_cache or {})}
    if vectors is not None:
        save_file(dict(vectors), folder / "vectors.safetensors")
        document["vectors"] = "vectors.safetensors"
    (folder / name).write_text(json.dumps(document))
    return open_statistics(folder / name)


def digests(path: Path) -> dict[str, str]:
    """Return file name -> sha256 of every file of a directory."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())
    }


def tensors(path: Path) -> Tensors:
    """Return every tensor of a checkpoint."""
    found: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def raw(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Compare names, then dtype, shape and bytes of each tensor."""
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert (name, tensor.dtype, list(tensor.shape)) == (name, other.dtype, list(other.shape))
        num_different = sum(a != b for a, b in zip(raw(tensor), raw(other), strict=True))
        assert num_different == 0, f"{name}: {num_different} of {tensor.nbytes} bytes differ"


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return normal numbers that depend on nothing but `seed`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(rows: int = 1000, columns: int = 700, *, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return a checkpoint whose weight takes several slices under a small budget."""
    weight = randn(rows, columns, seed=5, dtype=dtype)
    return {"model.layers.0.mlp.up_proj.weight": weight, "model.norm.weight": torch.ones(columns)}
