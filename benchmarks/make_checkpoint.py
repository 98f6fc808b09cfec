"""Write a benchmark checkpoint: random bf16 weights in a Llama shape, at the speed of the disk.

    python benchmarks/make_checkpoint.py OUT_DIR --shape bench --layout shards

Needs Python 3.11+ and NumPy only. One pool of 256 MiB of normal-distributed bf16 values is drawn
from a fixed seed; each tensor is that pool, wrapped around, from an offset that its name decides.
So memory stays constant, and the same command gives the same bytes on every machine and with every
number of threads. Blocks repeat only after 256 MiB, which no quantizer can notice. Shards are
written side by side.
"""

import argparse
import json
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

SEED = 20_480
POOL_SIZE = 1 << 27
CHUNK_NBYTES = 1 << 24
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, and how many shards `--layout shards` makes of it."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    num_shards: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape in the order of the model."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            found |= {
                f"{prefix}input_layernorm.weight": (self.hidden,),
                f"{prefix}self_attn.q_proj.weight": (q_width, self.hidden),
                f"{prefix}self_attn.k_proj.weight": (kv_width, self.hidden),
                f"{prefix}self_attn.v_proj.weight": (kv_width, self.hidden),
                f"{prefix}self_attn.o_proj.weight": (self.hidden, q_width),
                f"{prefix}post_attention_layernorm.weight": (self.hidden,),
                f"{prefix}mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}mlp.down_proj.weight": (self.hidden, self.intermediate),
            }
        return found | {
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocab, self.hidden),
        }

    def num_values(self) -> int:
        """Returns how many weights the model has."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def with_layers(self, num_layers: int) -> "Shape":
        """Returns this shape with as many layers, in shards about as large as its own."""
        other = replace(self, num_layers=num_layers)
        ratio = other.num_values() / self.num_values()
        return replace(other, num_shards=max(1, round(self.num_shards * ratio)))

    def config(self) -> dict[str, object]:
        """Returns config.json as transformers writes it for a Llama."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": WEIGHT_STD,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab,
        }


SHAPES = {
    # 747,694,080 parameters: 1.495 GB
    "bench": Shape(2048, 5632, 14, 16, 2, 128, 32000, 1e4, num_shards=6),
    # Llama 3 8B: 8,030,261,248 parameters: 16.06 GB
    "llama8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, 5e5, num_shards=4),
    # Llama 3 70B: 70,553,706,496 parameters: 141.1 GB; the hub's has 30 shards, these are smaller
    # so that a few layers of it still make many
    "llama70b": Shape(8192, 28672, 80, 64, 8, 128, 128256, 5e5, num_shards=83),
}


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Returns the bits of finite f32 values rounded to bf16, ties to even."""
    bits = values.view(np.uint32)
    # the addition cannot carry past the exponent: every value here is small
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def make_pool(workers: ThreadPoolExecutor) -> npt.NDArray[np.uint16]:
    """Returns POOL_SIZE bf16 bit patterns of a normal distribution with std WEIGHT_STD."""
    pool = np.empty(POOL_SIZE, np.uint16)
    step = POOL_SIZE // 32

    def draw(i: int) -> None:
        values = np.random.default_rng([SEED, i]).standard_normal(step, dtype=np.float32)
        pool[i * step : (i + 1) * step] = to_bf16(values * np.float32(WEIGHT_STD))

    list(workers.map(draw, range(32)))
    return pool


def split(shapes: dict[str, tuple[int, ...]], num_shards: int) -> list[list[str]]:
    """Returns the names per shard, in order, each shard about as large as the others."""
    total = sum(math.prod(shape) for shape in shapes.values())
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    done = 0
    for name, shape in shapes.items():
        # a tensor goes where its middle lies
        middle = done + math.prod(shape) / 2
        shards[min(int(middle * num_shards / total), num_shards - 1)].append(name)
        done += math.prod(shape)
    return shards


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns name -> file offset of its data; the file then has its header and full length."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, shape in shapes.items():
        begins[name], end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begins[name], end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return {name: 8 + len(encoded) + begin for name, begin in begins.items()}


def chunks(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yields (begin in the tensor, begin in the pool, length), in bytes, for one weight."""
    pool_nbytes, total = 2 * POOL_SIZE, 2 * math.prod(shape)
    start = zlib.crc32(name.encode()) % POOL_SIZE * 2
    begin = 0
    while begin < total:
        source = (start + begin) % pool_nbytes
        length = min(CHUNK_NBYTES, total - begin, pool_nbytes - source)
        yield begin, source, length
        begin += length


def write_shard(
    path: Path, shapes: dict[str, tuple[int, ...]], pool: npt.NDArray[np.uint16]
) -> None:
    """Writes one safetensors file; norm weights lie near 1, all others come from the pool."""
    offsets = write_header(path, shapes)
    pool_bytes = pool.data.cast("B")
    fd = os.open(path, os.O_WRONLY)
    try:
        for name, shape in shapes.items():
            if len(shape) == 1:
                rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
                values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
                os.pwrite(fd, to_bf16(values + np.float32(1)).tobytes(), offsets[name])
                continue
            for begin, source, length in chunks(name, shape):
                data = pool_bytes[source : source + length]
                if os.pwrite(fd, data, offsets[name] + begin) != length:
                    raise OSError(f"{path}: short write, is the disk full?")
    finally:
        os.close(fd)


def make(out_dir: Path, shape: Shape, *, num_shards: int, num_threads: int) -> int:
    """Returns the bytes of all weights; writes the checkpoint into `out_dir`."""
    shapes = shape.tensors()
    names = ["model.safetensors"]
    if num_shards > 1:
        names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    shards = dict(zip(names, split(shapes, num_shards), strict=True))
    total = 2 * shape.num_values()
    with ThreadPoolExecutor(num_threads) as workers:
        pool = make_pool(workers)

        # a thread per file: the kernel lets one write at a time into each
        def write(file_name: str) -> None:
            part = {name: shapes[name] for name in shards[file_name]}
            write_shard(out_dir / file_name, part, pool)

        list(workers.map(write, shards))
    documents: dict[str, object] = {
        "config.json": shape.config(),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
    }
    if num_shards > 1:
        weight_map = {name: file_name for file_name, part in shards.items() for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        documents["model.safetensors.index.json"] = index
    for file_name, document in documents.items():
        (out_dir / file_name).write_text(json.dumps(document, indent=2) + "\n")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="bench")
    parser.add_argument("--layout", choices=["shards", "single"], default="shards")
    parser.add_argument("--layers", type=int, help="other than the shape's; shards stay as large")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1))
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    if args.layers is not None:
        if args.layers < 1:
            parser.error(f"--layers must be at least 1, got {args.layers}")
        shape = shape.with_layers(args.layers)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if any(args.out_dir.iterdir()):
        parser.error(f"{args.out_dir} is not empty")
    start = time.perf_counter()
    num_shards = shape.num_shards if args.layout == "shards" else 1
    nbytes = make(args.out_dir, shape, num_shards=num_shards, num_threads=args.threads)
    seconds = time.perf_counter() - start
    print(f"{args.out_dir}: {nbytes / 1e9:.3f} GB, {num_shards} file(s), {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
