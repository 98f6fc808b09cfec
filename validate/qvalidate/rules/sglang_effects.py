"""What SGLang does with what breaks a rule for any engine. It declares no rule of its own.

What depends on SGLang's own reading of lists and names (excluded-but-quantized, orphan-tensor, ...)
is not here: the sglang rules look at it.
"""

from qvalidate.rules import (  # noqa: F401  (they declare the rules that are named below)
    codes,
    kv,
    mixed,
    modules,
    siblings,
    sizes,
    tensors,
    values,
)
from qvalidate.rules.registry import effect_of
from qvalidate.rules.sglang_support import BOTH

_UNCHECKED = "SGLang 0.5.23 modelopt_quant.py:600-609, :1866; no loader looks for what is missing"

effect_of(
    "missing-tensor",
    "wrong",
    engine="sglang",
    versions=BOTH,
    evidence=(
        f"{_UNCHECKED}: FP8's scales stay the smallest f32, NVFP4's memory as it was, input scales "
        "of NVFP4 and of experts 1.0",
    ),
)
effect_of(
    "missing-module",
    "wrong",
    engine="sglang",
    versions=BOTH,
    evidence=(f"{_UNCHECKED}",),
)
effect_of(
    "wrong-dtype",
    "unknown",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang 0.5.23, run with its own loader: copy_ casts the values in silence",),
)
effect_of(
    "wrong-shape",
    "refuses",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang 0.5.23 layers/parameter.py:110, :433-441, linear.py:587, :1547, :1708",),
)
effect_of(
    "shape-disagrees-with-config",
    "unknown",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang 0.5.23 layers/parameter.py:110: rows are cut before shapes are compared",),
)
effect_of(
    "fused-scale-differs",
    "wrong",
    engine="sglang",
    versions=BOTH,
    evidence=(
        "SGLang 0.5.23 modelopt_quant.py:1887-1914 (the largest, blocks as they are), "
        ":2738-2765 (of an expert's gate and up the gate's, under Marlin)",
    ),
)
effect_of(
    "nonfinite-scale",
    "wrong",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang 0.5.23 modelopt_quant.py:617-642, :1887-1914: nothing is checked",),
)
effect_of(
    "nonpositive-scale",
    "wrong",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang 0.5.23 modelopt_quant.py:617-642, :1887-1914: nothing is checked",),
)
effect_of(
    "codes-nan",
    "wrong",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang 0.5.23 modelopt_quant.py:617-642, :1887-1914: nothing is checked",),
)
effect_of(
    "kv-scale-unpaired",
    "unknown",
    engine="sglang",
    versions=BOTH,
    evidence=(
        "SGLang 0.5.23 layers/quantization/kv_cache.py:63-86: the keys' scale serves both, the "
        "values' alone is an AssertionError; models that drop scales do not mind",
    ),
)
effect_of(
    "kv-scale-incomplete",
    "wrong",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang 0.5.23 layers/quantization/kv_cache.py:57-62: a layer without has 1.0",),
)
effect_of(
    "kv-scale-shape",
    "unknown",
    engine="sglang",
    versions=BOTH,
    evidence=(
        "SGLang 0.5.23 model_loader/weight_utils.py default_weight_loader compares sizes; models "
        "that drop scales do not mind",
    ),
)
effect_of(
    "config-number",
    "unknown",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang takes config.json's numbers as they are",),
)
effect_of(
    "unknown-layer-algo",
    "unknown",
    engine="sglang",
    versions=BOTH,
    evidence=("SGLang 0.5.23 modelopt_quant.py:1053-1063: built unquantized",),
)
effect_of(
    "stack-unsupported",
    "unknown",
    engine="sglang",
    versions=BOTH,
    evidence=("no run: no engine is known to read such a stack",),
)
