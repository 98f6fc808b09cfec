"""Damaged input: one clear error each, nothing written, nothing overwritten, no traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from .test_cli import W, qconvert

Make = Callable[..., Path]


def break_nothing_there(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def break_empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def break_pickled(path: Path) -> None:
    break_empty(path)
    (path / "pytorch_model.bin").write_bytes(b"\x80")


def break_truncated(path: Path) -> None:
    os.truncate(path / "b.safetensors", 1000)


def break_header_size(path: Path) -> None:
    (path / "b.safetensors").write_bytes((200 << 20).to_bytes(8, "little") + b"{")


def break_lfs(path: Path) -> None:
    (path / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _header(path: Path, text: str, nbytes: int) -> None:
    (path / "b.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text.encode() + bytes(nbytes)
    )


def _info(dtype: str, shape: list[int], begin: int, end: int) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


def break_overlap(path: Path) -> None:
    one, two = _info("U8", [4], 0, 4), _info("U8", [4], 2, 6)
    _header(path, f'{{"x":{one},"y":{two}}}', 6)


def break_range(path: Path) -> None:
    _header(path, f'{{"x":{_info("U8", [400], 0, 400)}}}', 6)


def break_duplicate(path: Path) -> None:
    one, two = _info("U8", [4], 0, 4), _info("U8", [4], 4, 8)
    _header(path, f'{{"x":{one},"x":{two}}}', 8)


def break_dtype(path: Path) -> None:
    _header(path, f'{{"x":{_info("F8_E9M9", [4], 0, 4)}}}', 4)


def break_missing_shard(path: Path) -> None:
    (path / "b.safetensors").unlink()


def _index(path: Path, **entries: str) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= entries
    file.write_text(json.dumps(index))


def break_missing_tensor(path: Path) -> None:
    _index(path, **{"model.ghost.weight": "b.safetensors"})


def break_wrong_shard(path: Path) -> None:
    _index(path, **{"a.q_proj.weight": "b.safetensors", "b.q_proj.weight": "a.safetensors"})


def break_index_path(path: Path) -> None:
    _index(path, **{"a.q_proj.weight": "../b.safetensors"})


def break_twice(path: Path) -> None:
    save_file({"a.q_proj.weight": W, "b.q_proj.weight": W.clone()}, path / "b.safetensors")


def break_config(path: Path) -> None:
    (path / "config.json").unlink()


def break_config_json(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "llama",}')


def break_index_missing(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


def break_rival_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "a.safetensors").read_bytes())


def break_pipe(path: Path) -> None:
    os.mkfifo(path / "pipe")


def break_file_name(path: Path) -> None:
    (path / os.fsdecode(b"caf\xe9.txt")).write_text("x")


def break_tensor_name(path: Path) -> None:
    _header(path, f'{{"\\ud800":{_info("U8", [4], 0, 4)}}}', 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_there, "checkpoint-missing: does not exist"),
        (break_empty, "checkpoint-empty: no *.safetensors file; the directory is empty"),
        (break_pickled, "checkpoint-pickle: holds pickled weights only (pytorch_model.bin)"),
        (break_truncated, "b.safetensors: safetensors-truncated: has 1000 bytes"),
        (break_header_size, "safetensors-header-size: header of 209715200 bytes"),
        (break_lfs, "safetensors-lfs-pointer: is a Git LFS pointer"),
        (break_overlap, "begins at byte 2, expected 4: overlaps"),
        (break_range, "b.safetensors: safetensors-truncated: "),
        (break_duplicate, "json-duplicate-key: key 'x' appears more than once"),
        (break_dtype, "unknown dtype 'F8_E9M9'"),
        (break_missing_shard, "index-missing-shard: names b.safetensors for 1 tensors"),
        (break_missing_tensor, "model.ghost.weight: index-missing-tensor: should be in b.safet"),
        (break_wrong_shard, "a.q_proj.weight: index-wrong-shard: should be in b.safetensors, is"),
        (break_index_path, "index-shard-name: expected the name of a file beside the index"),
        (break_twice, "a.q_proj.weight: tensor-duplicate: is also in a.safetensors"),
        (break_config, "config-missing: a checkpoint needs its config.json"),
        (break_config_json, "config.json::$: json-syntax: not JSON"),
        (break_index_missing, "index-missing: 2 safetensors files"),
        (break_pipe, "pipe: file-unreadable: is not a regular file"),
        (break_file_name, r"file-name: the name caf\xe9.txt is not UTF-8"),
        (break_tensor_name, "json-surrogate: a key holds half a character"),
        (break_rival_weights, "weights-ambiguous: model.safetensors and model.safetensors.index"),
    ],
)
def test_a_damaged_input_is_one_clear_error(
    tmp_path: Path, make: Make, damage: Callable[[Path], None], message: str
) -> None:
    source = make(
        shards={
            "a.safetensors": {"a.q_proj.weight": W},
            "b.safetensors": {"b.q_proj.weight": W.clone()},
        }
    )
    damage(source)

    done = qconvert(source, tmp_path / "out", "--algo", "FP8_PB_WO")

    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))
