"""qdiff on tensors and files: what is there under which name, before any number is looked at."""

import json
import shutil
from pathlib import Path

import pytest
from catalogue import PB_WO
from checkpoints import FIXTURES, Draft, Tensor, bytes_of, f32, write_safetensors
from encoded import converted
from qdiff_edits import DOWN, NORM, Edit, after, between, weights_of

from qschema.checkpoint import open_checkpoint
from qvalidate.diff.comparison import compare
from qvalidate.diff.names import kind_of, layer_of, pattern


def test_added_removed_and_reshaped_tensors_are_listed(tmp_path: Path) -> None:
    def change(made: Draft) -> None:
        made.put("model.extra", ("I64", (2,), bytes(16)), beside=NORM)
        made.put(NORM, ("F32", (256,), bytes(1024)))
        made.pop(f"{DOWN}.weight_scale")

    tensors = after(tmp_path, change).tensors

    assert [entry.name for entry in tensors.added] == ["model.extra"]
    assert [entry.name for entry in tensors.removed] == [f"{DOWN}.weight_scale"]
    assert [(entry.name, entry.a.dtype, entry.b.dtype) for entry in tensors.retyped] == [
        (NORM, "BF16", "F32")
    ]


def test_other_bytes_that_are_no_numbers_are_listed(tmp_path: Path) -> None:
    result = between(
        tmp_path,
        put("model.mask", ("U8", (4,), b"0000")),
        put("model.mask", ("U8", (4,), b"0001")),
    )

    assert result.areas == ("tensors",)
    assert result.tensors.undecoded == ["model.mask"]


def put(name: str, tensor: Tensor) -> Edit:
    """Return the edit that adds a tensor."""
    return lambda made: made.put(name, tensor, beside=NORM)


def rename(made: Draft, module: str, new: str) -> None:
    for tensors in made.shards.values():
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            tensors[f"{new}{name.removeprefix(module)}"] = tensors.pop(name)


def test_renamed_module_is_known_by_its_bytes(tmp_path: Path) -> None:
    result = after(tmp_path, lambda made: rename(made, DOWN, "model.layers.0.ffn.w2"))
    tensors = result.tensors

    assert result.areas == ("tensors",)
    assert [(pair.a, pair.b, pair.by) for pair in tensors.renamed] == [
        (f"{DOWN}.weight", "model.layers.0.ffn.w2.weight", "bytes"),
        (f"{DOWN}.weight_scale", "model.layers.0.ffn.w2.weight_scale", "module"),
    ]
    assert tensors.added == tensors.removed == []


def test_experts_are_known_by_both_spellings_of_their_names(tmp_path: Path) -> None:
    def spell(made: Draft) -> None:
        for tensors in made.shards.values():
            for name in [name for name in tensors if ".block_sparse_moe." in name]:
                new = name.replace("block_sparse_moe", "mlp").replace(".w1.", ".gate_proj.")
                new = new.replace(".w3.", ".up_proj.").replace(".w2.", ".down_proj.")
                tensors[new] = tensors.pop(name)

    result = after(tmp_path, spell, model="mixtral")
    renamed = {pair.a: (pair.b, pair.by) for pair in result.tensors.renamed}

    assert renamed["model.layers.1.block_sparse_moe.experts.3.w2.weight_scale"] == (
        "model.layers.1.mlp.experts.3.down_proj.weight_scale",
        "names",
    )
    assert weights_of(result).differing == []
    assert result.tensors.added == []


def test_equal_numbers_are_no_proof_of_a_new_name(tmp_path: Path) -> None:
    one, other = (put(name, ("F32", (), f32(1.0))) for name in ("model.old", "model.new"))
    result = between(tmp_path, one, other)

    assert result.tensors.renamed == []


def stack_experts(source: Path, out: Path) -> Path:
    """Write the unquantized Mixtral `source` with its experts stacked, in one shard."""
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, bytes] = {}
    for name, stored in open_checkpoint(source).tensors.items():
        data = bytes_of(stored)
        owner, is_expert, place = name.partition(".experts.")
        if not is_expert:
            tensors[name] = (stored.dtype, stored.shape, data)
        else:
            matrices[f"{owner}/{place.removesuffix('.weight')}"] = data
    for owner in {key.partition("/")[0] for key in matrices}:
        gate_up = b"".join(
            matrices[f"{owner}/{expert}.{leaf}"] for expert in range(4) for leaf in ("w1", "w3")
        )
        down = b"".join(matrices[f"{owner}/{expert}.w2"] for expert in range(4))
        tensors[f"{owner}.experts.gate_up_proj"] = ("BF16", (4, 256, 256), gate_up)
        tensors[f"{owner}.experts.down_proj"] = ("BF16", (4, 256, 128), down)
    shutil.copytree(source, out)
    for file in [*out.glob("*.safetensors"), *out.glob("*.index.json")]:
        file.unlink()
    write_safetensors(out / "model.safetensors", tensors)
    return out


@pytest.mark.parametrize("side", ["a", "b"])
def test_stacked_experts_are_those_of_a_split_checkpoint(tmp_path: Path, side: str) -> None:
    source = FIXTURES / "mixtral"
    stacked = stack_experts(source, tmp_path / "stacked")
    result = compare(stacked, source) if side == "a" else compare(source, stacked)
    tensors = result.tensors

    assert {stack.side for stack in tensors.restacked} == {side}
    assert sorted(stack.num_parts for stack in tensors.restacked) == [4, 4, 8, 8]
    assert (tensors.added, tensors.removed, tensors.changed) == ([], [], [])


def test_stacked_experts_are_the_source_of_quantized_ones(tmp_path: Path) -> None:
    stacked = stack_experts(FIXTURES / "mixtral", tmp_path / "stacked")
    result = compare(stacked, converted("mixtral", PB_WO, tmp_path / "out"))
    errors = [error.relative_error or 0 for error in weights_of(result).differing]

    assert len(errors) == result.b.num_quantized == 32
    assert all(0.02 < error < 0.03 for error in errors)


def test_another_sharding_is_a_note(tmp_path: Path) -> None:
    def merge(made: Draft) -> None:
        merged = {name: tensor for shard in made.shards.values() for name, tensor in shard.items()}
        made.shards, made.index = {"model.safetensors": merged}, None

    result = after(tmp_path, merge)

    assert (result.areas, result.notes) == ((), ["A has 3 shards, B has 1"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tokenizer.json", "tokenizer"),
        ("chat_template.jinja", "chat template"),
        ("modeling_new.py", "code"),
        ("preprocessor_config.json", "processor"),
        ("adapter.bin", "other"),
    ],
)
@pytest.mark.parametrize("has_it", [True, False], ids=["changed", "added"])
def test_file_beside_the_shards_counts(tmp_path: Path, name: str, kind: str, has_it: bool) -> None:
    def before(made: Draft) -> None:
        made.files.pop(name, None)
        made.files |= {name: b"[1]"} if has_it else {}

    result = between(tmp_path, before, lambda made: made.files.update({name: b"[2]"}))
    (change,) = result.files

    assert result.areas == ("files",)
    assert (change.name, change.kind) == (name, kind)
    assert change.change == ("changed" if has_it else "added")
    assert (change.a_sha256 is not None) == has_it


@pytest.mark.parametrize("name", ["README.md", "qconvert_report.json", "LICENSE"])
def test_file_that_no_engine_reads_is_no_difference(tmp_path: Path, name: str) -> None:
    result = after(tmp_path, lambda made: made.files.update({name: b"{}"}))

    assert [change.name for change in result.files] == [name]
    assert result.areas == ()


def test_same_json_in_other_words_is_spelling(tmp_path: Path) -> None:
    def indent(made: Draft) -> None:
        text = json.loads(made.files["tokenizer_config.json"])
        made.files["tokenizer_config.json"] = json.dumps(text, indent=7).encode()

    result = after(tmp_path, indent)

    assert (result.areas, result.files) == ((), [])
    assert result.spelling == ["tokenizer_config.json is other text for the same JSON"]


def test_names_are_shown_by_layer_and_kind() -> None:
    name = "model.layers.12.mlp.experts.3.w1"

    assert layer_of(name) == "model.layers.12"
    assert kind_of(name) == "mlp.experts.*.w1"
    assert pattern(name) == "model.layers.*.mlp.experts.*.w1"
    assert (layer_of("lm_head"), kind_of("lm_head")) == ("", "lm_head")
