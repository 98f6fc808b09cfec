"""Faults of values outside the codes: tensors that are kept, shards as a whole, and side files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from catalogue import PB_WO, PC_PT, K, Q
from checkpoints import FIXTURES, Draft
from value_faults import (
    EXIT,
    FIRST_DOWN,
    VALUE_FAULTS,
    Level,
    Spoil,
    ValueFault,
    Values,
    edit,
    right,
    values,
)

from qschema.strict import Json

NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
UP = "model.layers.0.mlp.up_proj"
ONE = 0x3F80


def files(
    level: Level, *rules: str, where: str = "", model: str = "llama", algo: str = PB_WO
) -> Callable[[Spoil], Spoil]:
    """Put the decorated function, which changes a directory, into the catalogue."""

    def declare(spoil: Spoil) -> Spoil:
        VALUE_FAULTS.append(
            ValueFault(None, spoil, level, frozenset(rules), where, model, algo, "plain")
        )
        return spoil

    return declare


def as_f32(bits: Values) -> Values:
    return (bits.astype("<u4") << 16).view("<f4")


def as_bits(numbers: Values) -> Values:
    return numbers.astype("<f4").view("<u4") >> 16


def rewrite(path: Path, name: str, change: Callable[[dict[str, Json]], None]) -> None:
    """Change the JSON object in the file `name`."""
    document = json.loads((path / name).read_text())
    before = json.dumps(document)
    change(document)
    assert json.dumps(document) != before
    (path / name).write_text(json.dumps(document))


def vocabulary(tokenizer: dict[str, Json]) -> dict[str, Json]:
    """Return token -> id of a tokenizer.json."""
    model = tokenizer["model"]
    assert isinstance(model, dict)
    vocab = model["vocab"]
    assert isinstance(vocab, dict)
    return vocab


def other(algo: str = PB_WO) -> Draft:
    """Return a checkpoint of the same shapes from other weights: the source's, rows reversed."""
    made = right("llama", algo, "plain")
    for tensors in made.shards.values():
        for name, (dtype, shape, _) in list(tensors.items()):
            if len(shape) == 2 or dtype == "BF16":
                edit(made, name, lambda values: values[::-1])
    return made


@values("weights", "kept-tensor-differs", where=NORM)
def norm_of_ones(draft: Draft) -> None:
    edit(draft, NORM, lambda bits: bits * 0 + ONE)


@values("weights", "kept-tensor-differs", where=NORM)
def norm_off_by_one(draft: Draft) -> None:
    """As Gemma's are kept, which multiply with 1 + weight."""
    edit(draft, NORM, lambda bits: as_bits(as_f32(bits) - 1))


@values("weights", "kept-tensor-differs", where=EMBEDDING)
def rows_of_the_embedding_permuted(draft: Draft) -> None:
    edit(draft, EMBEDDING, lambda bits: np.roll(bits, 1, axis=0))


@values("weights", "kept-tensor-differs", where=HEAD)
def rows_of_the_head_permuted(draft: Draft) -> None:
    edit(draft, HEAD, lambda bits: bits[::-1])


@values("weights", "kept-tensor-differs", where=HEAD)
def head_tied_that_is_not(draft: Draft) -> None:
    draft.put(HEAD, draft.tensor(EMBEDDING))


@values("weights", "kept-tensor-differs", where=EMBEDDING)
def one_bit_of_the_embedding(draft: Draft) -> None:
    """A disk's or a network's error: safetensors has no checksum."""

    def flip(bits: Values) -> Values:
        made = bits.copy()
        made[7, 7] ^= 0x4000
        return made

    edit(draft, EMBEDDING, flip)


@values("weights", "kept-tensor-differs", where=NORM)
def bf16_under_the_label_of_f16(draft: Draft) -> None:
    _, shape, data = draft.tensor(NORM)
    draft.put(NORM, ("F16", shape, data))


@values("weights", "kept-tensor-differs", where=NORM)
def nan_in_a_norm(draft: Draft) -> None:
    edit(draft, NORM, lambda bits: np.where(np.arange(bits.size) == 3, 0x7FC0, bits))


@values("weights", "kept-tensor-differs", where=ROUTER, model="mixtral", algo="FP8")
def rows_of_the_router_permuted(draft: Draft) -> None:
    edit(draft, ROUTER, lambda bits: bits[::-1])


@values("weights", "config-differs", where="$.attention_bias")
def biases_that_only_the_config_has(draft: Draft) -> None:
    draft.config["attention_bias"] = True


@values("dry", "dry-refused", where="model.layers.0.self_attn.q_norm.weight")
def norm_that_the_model_does_not_have(draft: Draft) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    draft.put(name, ("BF16", (64,), bytes(128)), beside=NORM)


@values("weights", "tensor-missing", where=f"{Q}.bias", base="biased")
def bias_dropped(draft: Draft) -> None:
    draft.pop(f"{Q}.bias")


@values("weights", "kept-tensor-differs", where=f"{K}.bias", base="biased")
def bias_of_zeros(draft: Draft) -> None:
    edit(draft, f"{K}.bias", lambda bits: bits * 0)


@values("weights", "weight-error", "kept-tensor-differs", where=f"{FIRST_DOWN}.weight")
def shard_of_another_conversion(draft: Draft) -> None:
    draft.shards[SECOND] = other().shards[SECOND]


@values("rules", "wrong-shape", where=f"{FIRST_DOWN}.weight_scale")
def shard_of_another_format(draft: Draft) -> None:
    """An older run wrote it, with a scale for each row."""
    draft.shards[SECOND] = right("llama", PC_PT, "plain").shards[SECOND]


@values("rules", "fused-scale-differs", where=f"{UP}.input_scale", algo="NVFP4")
def shard_of_an_older_calibration(draft: Draft) -> None:
    """Gate and up lie in two shards here."""
    for name in [name for name in draft.shards[SECOND] if name.endswith("input_scale")]:
        edit(draft, name, lambda scale: scale * 1.5)


@files("rules", "index-wrong-shard", where=f"{Q}.weight")
def index_of_another_sharding(path: Path) -> None:
    def rename(document: dict[str, Json]) -> None:
        found = document["weight_map"]
        assert isinstance(found, dict)
        found[f"{Q}.weight"] = SECOND

    rewrite(path, INDEX, rename)


@files("rules", "unindexed-tensor", "index-total-size", where=f"{Q}.weight_scale")
def index_of_the_source(path: Path) -> None:
    shutil.copy(FIXTURES / "llama" / INDEX, path / INDEX)


@files("rules", "safetensors-truncated")
def shard_truncated(path: Path) -> None:
    with open(path / SECOND, "r+b") as file:
        file.truncate((path / SECOND).stat().st_size - 1)


def never_written(path: Path, share: float) -> None:
    """Make the last part of the second shard a hole: its size is right, it reads as zeros."""
    size = (path / SECOND).stat().st_size
    with open(path / SECOND, "r+b") as file:
        file.truncate(round(size * (1 - share)))
        file.truncate(size)


@files("rules", "codes-constant", where="model.layers.1.self_attn.q_proj.weight")
def half_of_a_shard_never_written(path: Path) -> None:
    never_written(path, 0.5)


@files("weights", "weight-error", where="model.layers.1.self_attn.v_proj.weight")
def last_page_of_a_shard_never_written(path: Path) -> None:
    never_written(path, 0.01)


@files("rules", "file-unreadable", "index-missing-shard")
def shard_is_a_link_to_nothing(path: Path) -> None:
    (path / SECOND).unlink()
    (path / SECOND).symlink_to(path / "blobs" / "0123")


@files("rules", EXIT)
def shard_may_not_be_read(path: Path) -> None:
    (path / SECOND).chmod(0)


@files("rules", "safetensors-lfs-pointer")
def shard_is_a_pointer(path: Path) -> None:
    (path / SECOND).write_text("version https://git-lfs.github.com/spec/v1\n")


@files("weights", "config-differs", where="$.rope_parameters.rope_theta")
def stale_rope_theta(path: Path) -> None:
    rope: dict[str, Json] = {"rope_theta": 1000000.0, "rope_type": "default"}
    rewrite(path, "config.json", lambda config: config.update(rope_parameters=rope))


@files("weights", "config-differs", where="$.rms_norm_eps")
def stale_epsilon(path: Path) -> None:
    rewrite(path, "config.json", lambda config: config.update(rms_norm_eps=0.1))


@files("weights", "config-differs", where="$.rms_norm_eps")
def stale_epsilon_that_is_almost_right(path: Path) -> None:
    """1e-5 for 1e-6, as the next release of a model has it."""
    rewrite(path, "config.json", lambda config: config.update(rms_norm_eps=1e-5))


@files("weights", "config-differs", where="$.hidden_act")
def stale_activation(path: Path) -> None:
    rewrite(path, "config.json", lambda config: config.update(hidden_act="gelu"))


@files("weights", "config-differs", where="$.num_experts_per_tok", model="mixtral", algo="FP8")
def stale_number_of_experts_per_token(path: Path) -> None:
    rewrite(path, "config.json", lambda config: config.update(num_experts_per_tok=1))


@files("weights", "config-differs", where="$.head_dim")
def stale_number_of_heads(path: Path) -> None:
    """Half as many of twice the size: all shapes stay."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    rewrite(path, "config.json", lambda config: config.update(heads))


@files("weights", "config-differs", where="$.tie_word_embeddings")
def head_declared_tied(path: Path) -> None:
    rewrite(path, "config.json", lambda config: config.update(tie_word_embeddings=True))


@files("weights", "config-differs", where="$.max_position_embeddings")
def stale_length_of_the_context(path: Path) -> None:
    rewrite(path, "config.json", lambda config: config.update(max_position_embeddings=131072))


@files("weights", "side-file-differs")
def tokenizer_of_another_model(path: Path) -> None:
    """Of as many tokens: both sides of a comparison get the ids that it gives."""

    def renumber(document: dict[str, Json]) -> None:
        vocab = vocabulary(document)
        added = document["added_tokens"]
        assert isinstance(added, list)
        plain = [token for token in vocab if vocab[token] not in range(len(added))]
        vocab.update(zip(plain, [vocab[token] for token in reversed(plain)], strict=True))

    rewrite(path, "tokenizer.json", renumber)


@files("weights", "side-file-differs")
def ids_swapped_in_the_tokenizer(path: Path) -> None:
    def swapped(document: dict[str, Json]) -> None:
        vocab = vocabulary(document)
        one, two = list(vocab)[-2:]
        vocab[one], vocab[two] = vocab[two], vocab[one]

    rewrite(path, "tokenizer.json", swapped)


@files("weights", "side-file-differs")
def end_of_text_is_another_token(path: Path) -> None:
    rewrite(path, "generation_config.json", lambda document: document.update(eos_token_id=3))


@files("weights", "config-differs", where="$.eos_token_id")
def end_of_text_of_the_config_is_another_token(path: Path) -> None:
    rewrite(path, "config.json", lambda config: config.update(eos_token_id=3))


@files("weights", "side-file-differs")
def chat_template_of_another_model(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


@files("weights", "side-file-missing", where="chat_template.jinja")
def chat_template_is_missing(path: Path) -> None:
    (path / "chat_template.jinja").unlink()


@files("weights", "side-file-missing", where="generation_config.json")
def generation_config_is_missing(path: Path) -> None:
    (path / "generation_config.json").unlink()
