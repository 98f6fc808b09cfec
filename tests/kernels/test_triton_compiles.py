"""The Triton kernels compile for a Hopper GPU, which needs no GPU.

The interpreter runs Python: what the compiler refuses, or compiles to another arithmetic, shows
here. One process compiles all, which is most of the time.
"""

import json
import os
import subprocess
import sys

import pytest

# a process of its own, since the interpreter replaces the kernels in this one
SCRIPT = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def ptx(kernel, types, constants):
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    constants = {arg: constants.get(arg) for arg in kernel.arg_names if arg not in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

found = {}
for case, (module, name, variants) in json.load(sys.stdin).items():
    kernel = getattr(importlib.import_module("qkernels." + module), name)
    try:
        found[case] = [ptx(kernel, *variant) for variant in variants]
    except Exception as error:
        found[case] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
TINY = {"bf16": 2.0**-126, "fp16": 2.0**-14, "fp32": 2.0**-126}
KINDS = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
MATRIX = {"code_ptr": "*u8", "scale_ptr": "*fp32", "N": "i32", "K": "i32"}
ROWS = {"LARGEST": 448.0, "TILE_ROWS": 1, "TILE_COLS": 1024, "NUM_TILES": 3}
BLOCKS = {"LARGEST": 448.0, "BLOCK": 128, "STEP": 16}
GROUPS = {"code_ptr": "*i32", "scale_ptr": "*u8", "num_groups": "i32"}
WHOLE = {"global_ptr": "*fp32"}
PAIRS = {"code_ptr": "*u8", "scale_ptr": "*fp32", "P": "i32", "B": "i32"}
PAIR_TILE = {"BLOCK": 128, "TILE_PAIRS": 2, "TILE": 4}
FLAT = {"code_ptr": "*u8", "scale_ptr": "*fp32", "numel": "i64"}
WORDS = {"word_ptr": "*i32", "scale_ptr": "*u8", "num_words": "i64"}

# module, kernel, types but the weight's, constants but the source's
QUANTIZE = {
    "blocks": ("_triton_bytes", "quantize_blocks_kernel", MATRIX, {"CODES": "e4m3", **BLOCKS}),
    "rows": ("_triton_bytes", "quantize_rows_kernel", MATRIX, {"CODES": "e4m3", **ROWS}),
    "int8 rows": ("_triton_bytes", "quantize_rows_kernel", MATRIX, {"CODES": "int8", **ROWS}),
    "long rows": (
        "_triton_bytes",
        "quantize_long_rows_kernel",
        {name: MATRIX[name] for name in ("code_ptr", "scale_ptr", "K")},
        {"CODES": "e4m3", "LARGEST": 448.0, "TILE_COLS": 1024},
    ),
    "matrices": ("_triton_bytes", "quantize_matrices_kernel", FLAT, {"CODES": "e4m3", "TILE": 512}),
    "nvfp4": (
        "_triton_groups",
        "quantize_fp4_kernel",
        {**GROUPS, **WHOLE},
        {"SCALES": "e4m3", "GROUP": 16, "TILE": 128, "TURNS": 4},
    ),
    "mxfp4": (
        "_triton_groups",
        "quantize_fp4_kernel",
        GROUPS,
        {"SCALES": "e8m0", "GROUP": 32, "TILE": 128, "TURNS": 1},
    ),
    "mxfp8": (
        "_triton_groups",
        "quantize_mxfp8_kernel",
        {"code_ptr": "*u8", "scale_ptr": "*u8", "num_eights": "i64"},
        {"GROUP": 32, "TILE": 256},
    ),
    "int4 pairs": ("_triton_pairs", "quantize_pairs_kernel", PAIRS, PAIR_TILE),
}
DEQUANTIZE = {
    "blocks": (
        "_triton_bytes",
        "dequantize_tiles_kernel",
        MATRIX,
        {"CODES": "e4m3", "BY_BLOCK": True, "BLOCK": 128, "TILE_ROWS": 32, "TILE_COLS": 128},
    ),
    "int8 rows": (
        "_triton_bytes",
        "dequantize_tiles_kernel",
        MATRIX,
        {"CODES": "int8", "BY_BLOCK": False, "BLOCK": 0, "TILE_ROWS": 32, "TILE_COLS": 128},
    ),
    "matrices": ("_triton_bytes", "dequantize_flat_kernel", FLAT, {"GROUP": 0, "TILE": 2048}),
    "mxfp8": (
        "_triton_bytes",
        "dequantize_flat_kernel",
        {**FLAT, "scale_ptr": "*u8"},
        {"GROUP": 32, "TILE": 2048},
    ),
    "nvfp4": (
        "_triton_groups",
        "dequantize_fp4_kernel",
        {**WORDS, **WHOLE},
        {"SCALES": "e4m3", "GROUP": 16, "TILE": 256},
    ),
    "mxfp4": (
        "_triton_groups",
        "dequantize_fp4_kernel",
        WORDS,
        {"SCALES": "e8m0", "GROUP": 32, "TILE": 256},
    ),
    "int4 pairs": ("_triton_pairs", "dequantize_pairs_kernel", PAIRS, PAIR_TILE),
}


STATS = {
    "code_ptr": "*u8",
    "err2_ptr": "*fp64",
    "ref2_ptr": "*fp64",
    "nonfinite_ptr": "*i64",
    "clipped_ptr": "*i64",
    "N": "i32",
    "K": "i32",
}
STATS_TILE = {"LOW": -464.0, "HIGH": 464.0, "TILE_ROWS": 1, "TILE_SEGMENTS": 8}
SCALES = {"f32": {"scale_ptr": "*fp32"}, "e8m0": {"scale_ptr": "*u8"}}
SCALES |= {"e4m3": {"scale_ptr": "*u8", **WHOLE}, "whole": WHOLE}
# codes, scales, and how many rows and columns have one in common
LAYOUTS = [
    ("e4m3", "whole", 1, 1 << 30),
    ("e4m3", "f32", 128, 128),
    ("int8", "f32", 1, 1 << 30),
    ("int4", "f32", 1, 128),
    ("e4m3", "e8m0", 1, 32),
    ("e2m1", "e4m3", 1, 16),
    ("e2m1", "e8m0", 1, 32),
]
AMAX = {"amax_ptr": "*i32", "M": "i64", "chunk": "i32"}


def of_source(types, constants, source, fast):
    """Types and constants of a quantize kernel for a source type."""
    # groups are read as words
    pointer = "i32" if "num_groups" in types else source
    own = {"FAST": fast, "REREAD": not fast, "TINY": TINY[source], "SOURCE": KINDS[source]}
    return {**types, "w_ptr": f"*{pointer}"}, {**constants, **own}


def quantize_variants(types, constants):
    """With the short path, beside which there is the other one; and that alone, for older GPUs."""
    sources = [(source, True) for source in TINY] + [("bf16", False)]
    return [of_source(types, constants, source, fast) for source, fast in sources]


def dequantize_variants(types, constants):
    """Of every output type, with the GPU's conversions and without."""
    return [
        (
            {**types, "out_ptr": "*fp32" if kind == "f32" else "*i16"},
            {**constants, "KIND": kind, "FAST": fast},
        )
        for kind in KINDS.values()
        for fast in (True, False)
    ]


def stats_variants(codes, scales, rows, cols):
    """Of every source type, the first with the GPU's conversions and without."""
    constants = {"CODES": codes, "SCALES": scales, "SCALE_ROWS": rows, "SCALE_COLS": cols}
    constants |= {"SCALE_STEP": min(cols, 128), **STATS_TILE}
    sources = [(source, True) for source in TINY] + [("bf16", False)]
    return [
        ({**STATS, **SCALES[scales], "w_ptr": f"*{source}"}, {**constants, "FAST": fast})
        for source, fast in sources
    ]


def cases():
    """Case -> module, kernel, and its variants as types and constants."""
    found = {}
    for name, (module, kernel, types, constants) in QUANTIZE.items():
        found[f"quantize {name}"] = module, kernel, quantize_variants(types, constants)
    for name, (module, kernel, types, constants) in DEQUANTIZE.items():
        found[f"dequantize {name}"] = module, kernel, dequantize_variants(types, constants)
    for layout in LAYOUTS:
        kernel = "row_stats_kernel"
        found[f"stats {layout}"] = "_triton_stats", kernel, stats_variants(*layout)
    amax = [({**AMAX, "w_ptr": f"*{source}"}, {"TILE": 2048}) for source in TINY]
    return {**found, "amax": ("_triton_amax", "_amax_kernel", amax)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Case -> the code of each variant, or what the compiler said."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = tmp_path_factory.mktemp("triton")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(cases()),
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def codes_of(compiled, case):
    """The code of each variant of a case, and its constants."""
    assert isinstance(compiled[case], list), compiled[case]
    return [
        (code, constants)
        for code, (_, constants) in zip(compiled[case], cases()[case][2], strict=True)
    ]


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize_divides_exactly_and_keeps_subnormals(compiled, name):
    for code, constants in codes_of(compiled, f"quantize {name}"):
        assert "div.rn.f32" in code
        if constants["FAST"] and name not in ("int8 rows", "int4 pairs", "mxfp4"):
            assert "cvt.rn.satfinite.e4m3x2.f32" in code
        assert "div.full" not in code
        assert "div.approx" not in code
        assert ".ftz" not in code


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_dequantize_rounds_products_and_keeps_subnormals(compiled, name):
    for code, _ in codes_of(compiled, f"dequantize {name}"):
        assert "fma." not in code
        assert ".ftz" not in code


def test_amax_is_one_atomic_maximum(compiled):
    for code, _ in codes_of(compiled, "amax"):
        assert "atom.global.gpu.relaxed.max.s32" in code or "red." in code


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_stats_round_each_operation_and_need_no_shared_layouts(compiled, layout):
    """Shared memory is for the sums over lanes alone: a lane is a thread."""
    for code, _ in codes_of(compiled, f"stats {layout}"):
        assert "div.rn.f32" in code
        assert "fma." not in code
        assert ".ftz" not in code
        assert code.count("st.shared") <= 8
