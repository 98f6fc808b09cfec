"""What SGLang 0.5.17 and 0.5.23 take of ModelOpt checkpoints, as data, and by which names.

Paths are below sglang/srt of the version's wheel; modelopt_quant.py and fp8.py are in
layers/quantization. Where only 0.5.23 is cited, 0.5.17 has the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass

FP8 = "modelopt_fp8"
FP4 = "modelopt_fp4"
MIXED = "modelopt_mixed"
MXFP8 = "mxfp8"
# what a MIXED_PRECISION without an NVFP4 layer is taken for: INT4 experts, dense FP8 in blocks
W4AFP8 = "w4afp8"

BOTH = ">=0.5.17,<0.5.24"
ONLY_OLD = ">=0.5.17,<0.5.18"
ONLY_NEW = ">=0.5.23,<0.5.24"


@dataclass(frozen=True)
class Version:
    """What one version does with names of algorithms, all of them case-sensitive.

    `fp8` and `fp4` are what the two methods take; `in_mixed` what a layer of a mixed checkpoint may
    have. `is_substring` says whether any name with FP8 in it goes to the FP8 method, and
    `has_mxfp8` whether MXFP8 has a method of its own. `is_unwrapped` says whether the nested form
    is understood inside config.json, and `fp4_lists` are the keys of the flat form that NVFP4
    looks for exclusions under.
    """

    name: str
    fp4: tuple[str, ...]
    in_mixed: tuple[str, ...]
    is_substring: bool
    has_mxfp8: bool
    is_unwrapped: bool
    fp4_lists: tuple[str, ...]
    fp8_refusal: str
    fp4_refusal: str


OLD = Version(
    name="0.5.17",
    fp4=("NVFP4", "NVFP4_AWQ"),
    in_mixed=("FP8", "MXFP8", "NVFP4", "W4A16_NVFP4"),
    is_substring=True,
    has_mxfp8=False,
    is_unwrapped=False,
    fp4_lists=("ignore",),
    fp8_refusal="ModelOptFp8Config only supports static FP8 quantization in SGLang",
    fp4_refusal="ModelOpt currently only supports: FP8, NVFP4, NVFP4_AWQ",
)
NEW = Version(
    name="0.5.23",
    fp4=("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"),
    in_mixed=("FP8", "FP8_PB_WO", "FP8_BLOCK_SCALES", "MXFP8", "NVFP4", "W4A16_NVFP4"),
    is_substring=False,
    has_mxfp8=True,
    is_unwrapped=True,
    fp4_lists=("ignore", "modules_to_not_convert", "exclude_modules"),
    fp8_refusal="ModelOptFp8Config only supports regular FP8 quantization",
    fp4_refusal="ModelOpt currently only supports: FP8, NVFP4, NVFP4_AWQ, W4A16_NVFP4",
)

# method -> the least compute capability, times ten (get_min_capability)
MIN_CAPABILITY: Mapping[str, int] = {FP8: 89, FP4: 80, MIXED: 80, MXFP8: 100, W4AFP8: 90}
# from here on NVFP4 has kernels of its own; below, Marlin decodes it
BLACKWELL = 100

# two codes to a byte, so that an unquantized weight is of another shape
PACKED = frozenset({"NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"})
# algorithms whose scale SGLang calls weight_scale_inv
INVERSE = frozenset({"MXFP8", "FP8_PB_WO", "FP8_BLOCK_SCALES"})
# what the rows of every part, and the columns, of a block-FP8 layer must be divisible by
BLOCK = 128

# leaf names that SGLang loads as one layer -> that layer's name
FUSED_NAMES: Mapping[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj_with_mqa",
}
FUSED_LEAVES = frozenset(leaf for group in FUSED_NAMES for leaf in group)

# model types whose experts are layers of their own when they are quantized, each whole on one GPU
# (model_loader/utils.py:206-219, models/mixtral_quant.py)
SEPARATE_EXPERTS = frozenset({"mixtral"})
# model types whose lm_head is built without a quantization config (models/mixtral_quant.py)
PLAIN_HEADS = frozenset({"mixtral"})
# model types whose class declares no packed_modules_mapping (models/*.py)
WITHOUT_MAPPING = frozenset({"llama", "mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3"})
# model types whose loader stops with a KeyError at an unknown tensor of a fused layer; the others
# that were read log a warning or say nothing (models/qwen3.py load_weights)
STRICT = frozenset({"qwen3"})
# the same, where SGLang takes the model for unquantized (models/mixtral.py load_weights)
STRICT_IF_PLAIN = frozenset({"mixtral", "qwen3"})
# model types whose loader renames weight_scale_inv to weight_scale (models/llama.py, subclasses)
RENAMES_INVERSE = frozenset({"llama", "mistral", "phi3"})
# model types that drop the scales of a KV cache
WITHOUT_KV_SCALES = frozenset({"mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
# model types whose loader takes experts one by one, and drops stacked ones
SPLIT_EXPERTS = frozenset({"mixtral", "qwen3_moe"})
