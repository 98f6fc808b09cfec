"""What TensorRT-LLM does with what breaks rules that hold for any engine.

Only what its sources tell. Rules about tensors, exclusions and mixed lists are not here: modules
of its own say what it makes of them. No rule is declared here.
"""

from qvalidate.rules import agreement, codes, kv, modules, sizes, tensors, values
from qvalidate.rules.registry import effect_of
from qvalidate.rules.trtllm_support import BOTH, ENGINE, V12, V13

_COPY = "documented: _torch/modules/linear.py:copy_weight"
_LOAD = "documented: _torch/models/modeling_utils.py:_load_weights_impl_v2"
_READER = "documented: _torch/model_config.py:ModelConfig.from_pretrained"

# the rules have to be declared before anything can be said about them
_DECLARING = (agreement, codes, kv, modules, sizes, tensors, values)

effect_of(
    "no-quantization-config",
    "unknown",
    engine=ENGINE,
    versions=V13,
    evidence=(f"{_READER} (plain layers; {_COPY} casts codes, or stops at their sizes)",),
)
effect_of(
    "config-algo-disagrees",
    "unknown",
    engine=ENGINE,
    versions=BOTH,
    evidence=(f"{_READER} (hf_quant_config.json goes first)",),
)
effect_of(
    "missing-module",
    "refuses",
    engine=ENGINE,
    versions=V12,
    evidence=(f"{_LOAD} (1.2: load_weights of nothing, which asserts a weight)",),
)
effect_of(
    "missing-module",
    "wrong",
    engine=ENGINE,
    versions=V13,
    evidence=(f"{_LOAD} (1.3: returns where no key has the prefix)",),
)
effect_of(
    "kv-scale-shape",
    "unknown",
    engine=ENGINE,
    versions=V13,
    evidence=("documented: _torch/modules/linear.py:load_kv_scales (reshape, in FP8 and NVFP4)",),
)
effect_of(
    "shape-disagrees-with-config",
    "refuses",
    engine=ENGINE,
    versions=BOTH,
    evidence=(f"{_COPY} (copy_ of another shape)",),
)
effect_of(
    "wrong-dtype",
    "unknown",
    engine=ENGINE,
    versions=BOTH,
    evidence=(f"{_COPY} (casts by value; some dtypes are asserted)",),
)
effect_of(
    "nonfinite-scale",
    "wrong",
    engine=ENGINE,
    versions=BOTH,
    evidence=(f"{_COPY} (no value is looked at)",),
)
effect_of(
    "nonpositive-scale",
    "wrong",
    engine=ENGINE,
    versions=BOTH,
    evidence=(f"{_COPY} (no value is looked at)",),
)
effect_of(
    "codes-nan",
    "wrong",
    engine=ENGINE,
    versions=BOTH,
    evidence=(f"{_COPY} (no value is looked at)",),
)
