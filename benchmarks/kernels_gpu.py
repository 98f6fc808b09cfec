"""Time the Triton kernels on a CUDA GPU against the device's own copy bandwidth.

    python benchmarks/kernels_gpu.py [--csv kernels_gpu.csv] [--rounds 30] [--sweep]

First the gate: triton and torch give the same bytes and statistics, or nothing is timed. Then
rounds of one call each of a device copy and of every case, so that a slow moment falls on all; the
median of the rounds counts. GB/s counts bytes read and written once, and the weight once more where
its amax is taken first (`.quantize_own`, under the weight's own global scale; `.quantize` has it
given). A time is the GPU's (CUDA events, with the launch already queued); the L2 cache holds
unrelated clean data at the start of each call. --sweep prints launch choices, best first, instead.
"""

import argparse
import datetime
import importlib
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
from rows import append, commit
from torch import Tensor

import qkernels
from qkernels._triton_launch import Config
from qkernels.codec import Codec
from qkernels.stats import RowStats

SHAPES = [(8192, 28672), (4096, 4096), (128, 768, 2048)]
COPY_NBYTES = 4 << 30
FLUSH_NBYTES = 512 << 20
# about 1 ms, in which the host queues what is timed
QUEUE_CYCLES = 2_000_000


@dataclass
class Row:
    """One line of the CSV."""

    date: str
    commit: str
    op: str
    shape: str
    dtype: str
    gpu: str
    torch: str
    triton: str
    us: float
    gb_per_s: float
    share_of_copy: float


@dataclass
class Case:
    """One timed call and the bytes that it reads and writes."""

    op: str
    shape: str
    nbytes: int
    call: Callable[[], object]


class Timer:
    """Times single calls on the GPU."""

    def __init__(self) -> None:
        self.flush = torch.zeros(FLUSH_NBYTES // 4, device="cuda")

    def us(self, call: Callable[[], object]) -> float:
        """Microseconds that the GPU spends in one call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # reading evicts the rest and leaves nothing to write back
        self.flush.amax()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1000


def medians_us(cases: list[Case], rounds: int) -> list[float]:
    """Median time of each case over interleaved rounds, after three untimed ones."""
    timer = Timer()
    for case in cases:
        for _ in range(3):
            case.call()
    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for samples, case in zip(times, cases, strict=True):
            samples.append(timer.us(case.call))
    return [statistics.median(samples) for samples in times]


def random_weight(*shape: int) -> Tensor:
    """Normal-distributed bf16."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def nbytes(*tensors: Tensor) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def label(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def copy_case() -> Case:
    """The yardstick: torch's copy of a tensor far larger than the cache."""
    source = torch.zeros(COPY_NBYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Case("copy", str(COPY_NBYTES), 2 * COPY_NBYTES, lambda: target.copy_(source))


def codec_cases(codec: Codec, w: Tensor) -> Iterator[Case]:
    """Everything that a codec does with a weight, outputs allocated in the call."""
    tensors = codec.quantize_triton(w)
    shape, size = label(tuple(w.shape)), nbytes(w, *tensors.values())
    scale = tensors[codec.global_scale.suffix] if codec.global_scale else None
    name = codec.name
    yield Case(
        f"{name}.quantize", shape, size, lambda: codec.quantize_triton(w, global_scale=scale)
    )
    if scale is not None:
        own = size + nbytes(w)
        yield Case(f"{name}.quantize_own", shape, own, lambda: codec.quantize_triton(w))
    yield Case(f"{name}.dequantize", shape, size, lambda: codec.dequantize_triton(tensors))
    if w.ndim == 2:
        yield Case(f"{name}.row_stats", shape, size, lambda: codec.row_stats_triton(w, tensors))


def kernel_cases() -> Iterator[Case]:
    """Every codec at every shape, and amax, which they share."""
    for shape in SHAPES:
        w = random_weight(*shape)
        codecs = [qkernels.kernels_for(name) for name in qkernels.codecs()]
        yield Case("amax", label(shape), nbytes(w), partial(codecs[0].amax_triton, w))
        for codec in codecs:
            yield from codec_cases(codec, w)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """True for equal shapes, dtypes and bytes."""
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def same_statistics(a: RowStats, b: RowStats) -> bool:
    """True for the same counts, and sums to 13 digits."""
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.allclose(x, y, rtol=1e-13, atol=0.0) for x, y in pairs)


def gate() -> list[str]:
    """What differs between triton and torch; speed means nothing unless this is empty."""
    failures = []
    for name, shape in itertools.product(qkernels.codecs(), SHAPES):
        codec, w = qkernels.kernels_for(name), random_weight(*shape)
        actual, expected = codec.quantize_triton(w), codec.quantize_torch(w)
        failures += [
            f"{name} {label(shape)} {suffix}"
            for suffix in expected
            if not same_bytes(actual[suffix], expected[suffix])
        ]
        if not same_bytes(codec.dequantize_triton(actual), codec.dequantize_torch(expected)):
            failures.append(f"{name} {label(shape)} dequantize")
        if w.ndim == 2 and not same_statistics(
            codec.row_stats_triton(w, actual), codec.row_stats_torch(w, actual)
        ):
            failures.append(f"{name} {label(shape)} row_stats")
    return failures


def block_choices(base: Config) -> Iterator[Config]:
    """Blocks kept in registers, or read again by steps."""
    for warps, limit in itertools.product((4, 8, 16), (None, 48, 64, 80)):
        yield replace(base, num_warps=warps, maxnreg=limit, reread=False)
    for warps, step in itertools.product((4, 8, 16), (8, 16, 32)):
        yield replace(base, num_warps=warps, step=step, reread=True)


def row_choices(base: Config) -> Iterator[Config]:
    """Tiles of a row kept in registers, or read again."""
    base = replace(base, maxnreg=None)
    if base.tile_cols < 4096:
        for warps, rows in itertools.product((2, 4, 8), (1, 2, 4)):
            yield replace(base, num_warps=warps, tile_rows=rows)
        return
    for warps, tile in itertools.product((4, 8, 16), (1024, 2048, 4096, 8192)):
        if 8 <= tile // warps // 32 <= 32:
            limits = {4: (None, 168, 128), 8: (None, 128, 96, 80), 16: (None, 64, 48)}[warps]
            for limit in limits:
                yield replace(base, tile_cols=tile, num_warps=warps, maxnreg=limit, reread=False)
            yield replace(base, tile_cols=tile, num_warps=warps, reread=True)


def flat_choices(base: Config) -> Iterator[Config]:
    """So many elements per thread, in programs of so many warps."""
    for warps, each in itertools.product((1, 2, 4, 8), (8, 16, 32, 64)):
        yield replace(base, tile_cols=warps * 32 * each, num_warps=warps)


def eight_choices(base: Config) -> Iterator[Config]:
    """So many eights of elements per thread."""
    for warps, each in itertools.product((1, 2, 4, 8), (1, 2, 4)):
        yield replace(base, tile_cols=warps * 32 * each, num_warps=warps)


def group_choices(base: Config) -> Iterator[Config]:
    """So many groups per thread, and tiles per program."""
    for warps, each, turns in itertools.product((1, 2, 4), (1, 2), (1, 2, 4, 8, 16)):
        yield replace(base, tile_rows=warps * 32 * each, num_warps=warps, turns=turns)
    for limit, turns in itertools.product((48, 56, 64, 96), (4, 8, 16)):
        yield replace(base, tile_rows=32, num_warps=1, turns=turns, maxnreg=limit)


def amax_choices(base: Config) -> Iterator[Config]:
    """So many elements per thread at a time, and in all."""
    for warps, each, turns in itertools.product((4, 8), (8, 16, 32), (4, 8, 16, 32)):
        yield replace(base, tile_cols=warps * 32 * each, num_warps=warps, turns=turns)


def pair_choices(base: Config) -> Iterator[Config]:
    """So many blocks of a pair of rows."""
    for warps, tile in itertools.product((1, 2, 4, 8), (2, 4, 8, 16)):
        yield replace(base, tile_rows=1, tile_cols=tile, num_warps=warps)


def stats_choices(base: Config) -> Iterator[Config]:
    """So many segments of 128 columns, one or two lanes to a thread."""
    for warps, each in itertools.product((2, 4, 8, 16), (2, 4)):
        yield replace(base, tile_rows=1, tile_cols=warps * each, num_warps=warps)


def tile_choices(base: Config) -> Iterator[Config]:
    """Tiles that lie inside a block."""
    for rows, warps in itertools.product((8, 16, 32, 64), (2, 4, 8)):
        yield replace(base, tile_rows=rows, tile_cols=128, num_warps=warps)


def long_tile_choices(base: Config) -> Iterator[Config]:
    """Tiles of any form."""
    yield from tile_choices(base)
    for (rows, cols), warps in itertools.product([(1, 8192), (1, 4096), (4, 2048)], (4, 8)):
        yield replace(base, tile_rows=rows, tile_cols=cols, num_warps=warps)


# where each launch looks up its choices, and what to try
TUNED: dict[str, tuple[str, str, Callable[[Config], Iterator[Config]]]] = {
    **{
        f"{name}.row_stats": ("_triton_stats", "stats_config", stats_choices)
        for name in qkernels.codecs()
    },
    "amax": ("_triton_amax", "amax_config", amax_choices),
    "FP8.quantize": ("_triton_fp8", "flat_config", flat_choices),
    "FP8.dequantize": ("_triton_fp8", "decode_config", flat_choices),
    "FP8_PB_WO.quantize": ("_triton_fp8", "block_config", block_choices),
    "FP8_PB_WO.dequantize": ("_triton_rows", "tile_config", tile_choices),
    "FP8_PER_CHANNEL_PER_TOKEN.quantize": ("_triton_rows", "row_config", row_choices),
    "FP8_PER_CHANNEL_PER_TOKEN.dequantize": ("_triton_rows", "tile_config", long_tile_choices),
    "MXFP4.quantize": ("_triton_fp4", "group_config", group_choices),
    "MXFP4.dequantize": ("_triton_fp4", "word_config", eight_choices),
    "MXFP8.quantize": ("_triton_mx", "eight_config", eight_choices),
    "MXFP8.dequantize": ("_triton_fp8", "decode_config", flat_choices),
    "NVFP4.quantize": ("_triton_fp4", "group_config", group_choices),
    "NVFP4.dequantize": ("_triton_fp4", "word_config", eight_choices),
    "W4A16_AWQ.quantize": ("_triton_integer", "pair_config", pair_choices),
    "W4A16_AWQ.dequantize": ("_triton_integer", "pair_decode_config", pair_choices),
    "W4A8_NVFP4_FP8.quantize": ("_triton_fp4", "group_config", group_choices),
    "W4A8_NVFP4_FP8.dequantize": ("_triton_fp4", "word_config", eight_choices),
    "W8A16.quantize": ("_triton_rows", "row_config", row_choices),
    "W8A16.dequantize": ("_triton_rows", "tile_config", long_tile_choices),
}


def chosen(
    call: Callable[[], object], place: tuple[str, str], config: Config
) -> Callable[[], None]:
    """The call, which finds this launch choice where it looks for one."""
    module = importlib.import_module(f"qkernels.{place[0]}")
    usual = getattr(module, place[1])

    def run() -> None:
        setattr(module, place[1], lambda *_, **__: config)
        try:
            call()
        finally:
            setattr(module, place[1], usual)

    return run


def usual_choice(call: Callable[[], object], place: tuple[str, str]) -> Config:
    """What the call would choose by itself."""
    module = importlib.import_module(f"qkernels.{place[0]}")
    usual, seen = getattr(module, place[1]), []

    def record(*args: object, **kwargs: object) -> Config:
        seen.append(usual(*args, **kwargs))
        return seen[-1]

    setattr(module, place[1], record)
    try:
        call()
    finally:
        setattr(module, place[1], usual)
    return seen[0]


def sweep_cases(pattern: str) -> Iterator[tuple[Case, Config]]:
    """Every launch choice worth trying of the ops whose name has the pattern in it."""
    for case in kernel_cases():
        if case.op in TUNED and re.search(pattern, case.op):
            *place, choices = TUNED[case.op]
            where = (place[0], place[1])
            for config in dict.fromkeys(choices(usual_choice(case.call, where))):
                yield replace(case, call=chosen(case.call, where, config)), config


def sweep(rounds: int, pattern: str, compile_only: str) -> None:
    """Print the launch choices of each kernel, best first."""
    pairs = list(sweep_cases(pattern))
    if compile_only:
        part, parts = map(int, compile_only.split("/"))
        for case, _ in pairs[part::parts]:
            case.call()
        return
    copy = copy_case()
    copy_us, *times = medians_us([copy, *(case for case, _ in pairs)], rounds)
    copy_rate = copy.nbytes / copy_us
    results = [
        (case.op, case.shape, case.nbytes / us / copy_rate, us, config)
        for us, (case, config) in zip(times, pairs, strict=True)
    ]
    for op, shape, share, us, config in sorted(results, key=lambda r: (r[0], r[1], -r[2])):
        print(
            f"{op:36} {shape:12} {share:6.1%} {us:8.1f} us  tile {config.tile_rows}x"
            f"{config.tile_cols} warps {config.num_warps} maxnreg {config.maxnreg} "
            f"step {config.step} reread {config.reread} turns {config.turns}"
        )


def measure(rounds: int) -> list[Row]:
    """One row per case, the copy first."""
    cases = [copy_case(), *kernel_cases()]
    times = medians_us(cases, rounds)
    copy_rate = cases[0].nbytes / times[0]
    return [
        Row(
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            commit=commit(),
            op=case.op,
            shape=case.shape,
            dtype="uint8" if case.op == "copy" else "bf16",
            gpu=torch.cuda.get_device_name(),
            torch=torch.__version__,
            triton=triton.__version__,
            us=round(us, 2),
            gb_per_s=round(case.nbytes / us / 1000, 1),
            share_of_copy=round(case.nbytes / us / copy_rate, 4),
        )
        for us, case in zip(times, cases, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--csv", type=Path, default=Path(__file__).with_name("kernels_gpu.csv"))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sweep", nargs="?", const="", help="of ops that match this pattern")
    parser.add_argument("--compile-only", default="", metavar="I/N", help="a part of the sweep")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("kernels_gpu.py: no CUDA GPU")
    if not options.compile_only:
        failures = gate()
        if failures:
            sys.exit(f"kernels_gpu.py: triton and torch differ: {', '.join(failures)}")
        torch.cuda.empty_cache()
    if options.sweep is not None:
        sweep(options.rounds, options.sweep, options.compile_only)
        return
    rows = measure(options.rounds)
    for row in rows:
        print(
            f"{row.op:38} {row.shape:>12} {row.us:9.1f} us {row.gb_per_s:8.1f} GB/s "
            f"{row.share_of_copy:6.1%}"
        )
    append(options.csv, rows)


if __name__ == "__main__":
    main()
