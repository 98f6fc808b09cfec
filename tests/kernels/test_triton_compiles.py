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
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from qkernels import _triton_e4m3

name, types, constants = json.loads(sys.argv[1])
kernel = getattr(_triton_e4m3, name)
signature = {arg: types.get(arg, "constexpr") for arg in kernel.arg_names}
source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
options = {"num_warps": 8, "enable_fp_fusion": False}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(compiled.asm["ptx"])
"""
TILE = {"TILE_ROWS": 1, "TILE_COLS": 8192}
QUANTIZE = {
    "quantize_blocks_kernel": {"BLOCK": 128, "STEP": 16},
    "quantize_rows_kernel": {**TILE, "STEP": 2048},
    "quantize_long_rows_kernel": {"TILE_COLS": 8192},
}


def ptx(name, types, constants, cache):
    types = {"code_ptr": "*u8", "scale_ptr": "*fp32", "N": "i32", "K": "i32", **types}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([name, types, constants])],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("source", ["bf16", "fp16", "fp32"])
def test_quantize_divides_exactly_and_keeps_subnormals(name, source, tmp_path):
    tiny = 2.0**-14 if source == "fp16" else 2.0**-126
    constants = {"TINY": tiny, "FAST": True, **QUANTIZE[name]}
    if "STEP" in constants:
        constants["REREAD"] = source != "fp32"

    code = ptx(name, {"w_ptr": f"*{source}"}, constants, tmp_path)

    assert "div.rn.f32" in code
    assert "cvt.rn.satfinite.e4m3x2.f32" in code
    assert "div.full" not in code
    assert "div.approx" not in code
    assert ".ftz" not in code


@pytest.mark.parametrize(("kind", "out"), [("bf16", "*i16"), ("f16", "*i16"), ("f32", "*fp32")])
def test_dequantize_keeps_subnormals(kind, out, tmp_path):
    constants = {"KIND": kind, "BY_BLOCK": kind == "bf16", "BLOCK": 128, **TILE, "FAST": True}

    code = ptx("dequantize_tiles_kernel", {"out_ptr": out}, constants, tmp_path)

    assert ".ftz" not in code
