"""Planning a model of many tensors: work and memory grow with their number, no faster."""

import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from qconvert.planner import make_plan
from qschema.checkpoint import open_checkpoint
from qschema.plan import Plan
from qschema.recipe import Recipe, Rule

LAYERS, WIDTH = 10, 128
PARTS = ("gate", "up", "down")
RECIPE = Recipe(
    rules=[Rule(match="*.experts.*", algo="W4A16_NVFP4"), Rule(match="*", algo="FP8_PB_WO")],
    exclude=["model.layers.3.self_attn", "*.nothing"],
)


def sparse(path: Path, *, experts: int) -> Path:
    """Write a checkpoint with `experts` in each layer, a shard per layer: headers, then holes."""
    path.mkdir()
    nbytes, weight_map = 2 * WIDTH * WIDTH, {}
    for layer in range(LAYERS):
        parts = [f"experts.{expert}.{part}_proj" for expert in range(experts) for part in PARTS]
        names = [
            *(f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkvo"),
            *(f"model.layers.{layer}.mlp.{part}.weight" for part in ("gate", *parts)),
        ]
        header = {
            name: {
                "dtype": "BF16",
                "shape": [WIDTH, WIDTH],
                "data_offsets": [place * nbytes, (place + 1) * nbytes],
            }
            for place, name in enumerate(names)
        }
        text, file = json.dumps(header).encode(), f"model-{layer}.safetensors"
        with open(path / file, "wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + len(names) * nbytes)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    return path


def planned(path: Path) -> Plan:
    return make_plan(open_checkpoint(path), RECIPE)


def num_calls(work: Callable[[], object]) -> int:
    """Return how many functions, Python's own included, `work` calls: its time, without noise."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


def test_work_grows_with_the_tensors_and_no_faster(tmp_path: Path) -> None:
    few, many = (sparse(tmp_path / str(n), experts=n) for n in (83, 666))
    # what is compiled and remembered once
    num_few, num_many = len(planned(few).steps), len(planned(many).steps)

    calls_few, calls_many = num_calls(lambda: planned(few)), num_calls(lambda: planned(many))

    assert num_many > 20_000
    assert calls_many / num_many <= 1.1 * calls_few / num_few
    # about 200 when this was written; a search through all formats and patterns makes it 600
    assert calls_many <= 300 * num_many


def test_a_plan_takes_a_few_kilobytes_per_tensor(tmp_path: Path) -> None:
    path = sparse(tmp_path / "in", experts=166)
    planned(path)

    tracemalloc.start()
    try:
        found = planned(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    # about 3.2 and 4.0 KB on CPython 3.11, the headers included
    assert kept <= 5000 * len(found.steps)
    assert peak <= 7000 * len(found.steps)
