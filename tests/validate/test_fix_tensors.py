"""Names, ranks and dtype labels that `qvalidate fix` puts right over the same bytes."""

from pathlib import Path

import pytest
from catalogue import DOWN, PB_WO, K
from checkpoints import MIXED, bytes_of, draft, f32
from fixing import in_json, planted, repaired, rules_of, written

from qvalidate.fix import fix
from qvalidate.loader import load


@pytest.mark.parametrize("algo", [PB_WO, "MXFP8"])
def test_block_scale_called_inverse_gets_its_name(algo: str, tmp_path: Path) -> None:
    made = draft("llama", algo)
    name = f"{DOWN}.weight_scale"
    made.put(f"{name}_inv", made.pop(name), beside=f"{DOWN}.weight")
    report = repaired(made, tmp_path)

    renamed = [repair for repair in report.repairs if repair.id == "tensor-renamed"]
    assert [(repair.was, repair.becomes) for repair in renamed] == [(f"{name}_inv", name)]
    assert rules_of(report) == set()
    index = in_json(tmp_path / "out", "model.safetensors.index.json")
    assert f"{name}_inv" not in index["weight_map"]  # type: ignore[operator]


def test_inverse_with_two_dimensions_gets_name_and_rank(tmp_path: Path) -> None:
    made = draft("llama", PB_WO)
    name = f"{DOWN}.weight_scale"
    dtype, shape, data = made.pop(name)
    made.put(f"{name}_inv", (dtype, (shape[0], shape[2]), data), beside=f"{DOWN}.weight")
    report = repaired(made, tmp_path)

    assert {repair.id for repair in report.repairs} == {
        "tensor-renamed",
        "tensor-reshaped",
        "index-corrected",
    }
    assert rules_of(report) == set()


def test_channel_scale_called_inverse_may_be_a_reciprocal_and_stays(tmp_path: Path) -> None:
    report = fix(written(planted("scale_named_scale_inv"), tmp_path / "made"), tmp_path / "out")

    assert report.repairs == []


@pytest.mark.parametrize("algo", ["FP8", MIXED])
def test_names_of_memory_become_those_of_the_hub(algo: str, tmp_path: Path) -> None:
    """ModelOpt 0.47.0 leaves them in a Mixtral in FP8 blocks; vLLM 0.33.0 knows no layers.0.mlp."""
    path = draft("mixtral", algo).write(tmp_path / "right")
    made = draft("mixtral", algo)
    for tensors in made.shards.values():
        for name in [name for name in tensors if "block_sparse_moe" in name]:
            tensors[in_memory(name)] = tensors.pop(name)
    for config, key in zip(made.each_config(), ("ignore", "exclude_modules"), strict=True):
        if key in config:
            config[key] = [in_memory(name) for name in config[key]]  # type: ignore[attr-defined]
        if algo == MIXED:
            layers = config["quantized_layers"]
            config["quantized_layers"] = {in_memory(name): layers[name] for name in layers}  # type: ignore[attr-defined,index]
    report = repaired(made, tmp_path)

    assert rules_of(report) == set()
    assert report.left == []
    found, wanted = load(tmp_path / "out"), load(path)
    assert found.checkpoint.tensors.keys() == wanted.checkpoint.tensors.keys()
    assert set(found.exclude) == set(wanted.exclude)
    assert found.assignment == wanted.assignment
    for name, stored in wanted.checkpoint.tensors.items():
        assert bytes_of(found.checkpoint.tensors[name]) == bytes_of(stored)


def in_memory(name: str) -> str:
    """Return what Transformers 5 calls a tensor or module of a Mixtral."""
    found = name.replace("block_sparse_moe", "mlp")
    for hub, memory in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        found = found.replace(f".{hub}", f".{memory}")
    return found


def test_wrapped_scalars_become_scalars(tmp_path: Path) -> None:
    made = draft("qwen3", "FP8")
    name = "model.layers.0.mlp.up_proj.input_scale"
    dtype, _, data = made.tensor(name)
    made.put(name, (dtype, (1,), data))
    report = repaired(made, tmp_path)

    assert [(repair.id, repair.was, repair.becomes) for repair in report.repairs] == [
        ("tensor-reshaped", "[1]", "[]")
    ]
    assert rules_of(report) == set()


def test_wrapped_scale_of_the_cache_becomes_a_scalar(tmp_path: Path) -> None:
    made = draft("llama", "FP8")
    made.quantize_cache("FP8")
    made.put(f"{K}.k_scale", ("F32", (1, 1), f32(0.5)))
    report = repaired(made, tmp_path)

    assert [repair.id for repair in report.repairs] == ["tensor-reshaped"]
    assert rules_of(report) == set()
