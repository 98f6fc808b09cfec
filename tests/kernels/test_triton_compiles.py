"""The Triton kernels compile for a Hopper GPU, which needs no GPU.

The interpreter runs Python: what the compiler refuses, or compiles to another arithmetic, shows
here.
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

module, name, variants = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module("qkernels." + module), name)
texts = []
for types, constants in variants:
    signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
    constants = {arg: constants.get(arg) for arg in kernel.arg_names if arg not in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    texts.append(compiled.asm["ptx"])
print(json.dumps(texts))
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


def ptx(module, name, variants, cache):
    """The code of a kernel for each pair of types and constants."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([module, name, variants])],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def of_source(case, source, fast):
    """Types and constants of a quantize kernel for a source type."""
    _, _, types, constants = case
    # groups are read as words
    pointer = "i32" if "num_groups" in types else source
    own = {"FAST": fast, "REREAD": not fast, "TINY": TINY[source], "SOURCE": KINDS[source]}
    return {**types, "w_ptr": f"*{pointer}"}, {**constants, **own}


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize_divides_exactly_and_keeps_subnormals(name, tmp_path):
    """With the short path and without it, which also is what older GPUs run."""
    case = QUANTIZE[name]
    variants = [of_source(case, source, fast) for source in TINY for fast in (True, False)]

    codes = ptx(case[0], case[1], variants, tmp_path)

    for (_, constants), code in zip(variants, codes, strict=True):
        assert "div.rn.f32" in code
        if constants["FAST"] and name not in ("int8 rows", "int4 pairs", "mxfp4"):
            assert "cvt.rn.satfinite.e4m3x2.f32" in code
        assert "div.full" not in code
        assert "div.approx" not in code
        assert ".ftz" not in code


@pytest.mark.parametrize("name", DEQUANTIZE)
def test_dequantize_rounds_products_and_keeps_subnormals(name, tmp_path):
    module, kernel, types, constants = DEQUANTIZE[name]
    variants = [
        (
            {**types, "out_ptr": "*fp32" if kind == "f32" else "*i16"},
            {**constants, "KIND": kind, "FAST": fast},
        )
        for kind in KINDS.values()
        for fast in (True, False)
    ]

    for code in ptx(module, kernel, variants, tmp_path):
        assert "fma." not in code
        assert ".ftz" not in code


def test_amax_compiles(tmp_path):
    types = {"amax_ptr": "*i32", "M": "i64", "chunk": "i32"}
    variants = [({**types, "w_ptr": f"*{source}"}, {"TILE": 2048}) for source in TINY]

    for code in ptx("_triton_amax", "_amax_kernel", variants, tmp_path):
        assert "atom.global.gpu.relaxed.max.s32" in code or "red." in code
