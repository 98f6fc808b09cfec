"""What TensorRT-LLM 1.2 and 1.3 take of ModelOpt checkpoints in the PyTorch backend, as data.

Read in its repository, not run: single files from before and after the 1.2 releases, and from the
release candidates of 1.3; which of them is exactly 1.2.1's is not known. Paths in the evidence are
those below tensorrt_llm/. Of _torch/modules/linear.py an older version and two newer ones were
read, which differ in whether a missing scale stops the loader: where 1.2.1 could be either, the
effect is "unknown".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qvalidate.context import Module

ENGINE = "tensorrt-llm"
V12 = ">=1.2,<1.3"
V13 = ">=1.3.0rc0,<1.4"
BOTH = ">=1.2,<1.4"

# quantization/mode.py, enum QuantAlgo: the text of quant_algo has to be one of these, in upper case
MEMBERS_12 = frozenset(
    {
        "W8A16",
        "W4A16",
        "W4A16_AWQ",
        "W4A8_AWQ",
        "W8A16_GPTQ",
        "W4A16_GPTQ",
        "W8A8_SQ_PER_CHANNEL",
        "W8A8_SQ_PER_TENSOR_PLUGIN",
        "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
        "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
        "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
        "W4A8_QSERVE_PER_GROUP",
        "W4A8_QSERVE_PER_CHANNEL",
        "FP8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8_BLOCK_SCALES",
        "INT8",
        "MIXED_PRECISION",
        "NVFP4",
        "W4A8_NVFP4_FP8",
        "W4A8_MXFP4_FP8",
        "W4A8_MXFP4_MXFP8",
        "W4A16_MXFP4",
        "NO_QUANT",
    }
)
MEMBERS_13 = MEMBERS_12 | {"NVFP4_AWQ", "NVFP4_ARC", "W4A16_NVFP4", "MXFP8"}
# ModelOpt's guide names it for 1.2 as well, while the enum that was read has it in 1.3 only
UNPROVEN_12 = frozenset({"NVFP4_AWQ"})
# rewritten to FP8_BLOCK_SCALES, in this spelling and at the top level only
REWRITTEN = "fp8_pb_wo"
# linear.py get_quant_method has a class for them
WITH_LINEAR = frozenset(
    {
        "FP8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8_BLOCK_SCALES",
        "NVFP4",
        "NVFP4_AWQ",
        "NVFP4_ARC",
        "W4A16_NVFP4",
        "W4A8_NVFP4_FP8",
        "W4A8_MXFP4_FP8",
        "W4A8_MXFP4_MXFP8",
        "MXFP8",
        "W8A16",
        "W4A16",
        "W4A16_AWQ",
        "W4A8_AWQ",
    }
)
# QuantMode.from_quant_algo asserts it
KV_ALGOS = frozenset({"FP8", "INT8", "NVFP4"})
# quant_method in config.json that 1.3 reads beside ModelOpt's
OTHER_METHODS = frozenset({"fp8", "mxfp4", "mxfp8", "nvfp4", "compressed-tensors"})


@dataclass(frozen=True)
class Gpus:
    """Compute capabilities, times ten: at least `minimum`, and one of `only` if that is given."""

    minimum: int = 0
    only: frozenset[int] | None = None

    def allow(self, gpu: int) -> bool:
        """Return whether `gpu` is among them."""
        return gpu >= self.minimum and (self.only is None or gpu in self.only)


@dataclass(frozen=True)
class Support:
    """How TensorRT-LLM loads one format.

    Of a dense layer, which may be several fused modules:
    needed: tensors that it looks up, and stops without; needed_fused: in fused modules only.
    needed_once: the same, but one of the fused modules is enough. unloaded, unloaded_once: what
    stays uninitialised memory, or 1.0, silently. all_or_none: what all of the fused modules may
    lack, but not some of them. smoothing_needed: whether a layer that is not fused has to have a
    pre_quant_scale; smoothing_ignored: the fused layers that have no use for one.
    equal: numbers that it asserts to be equal in fused modules. scale_dtype: the dtype of
    weight_scale that it asserts.

    experts: why it refuses routed experts, None if it does not; experts_needed and experts_unloaded
    as above, of every expert.

    local_columns: what the columns of a layer on each GPU must be divisible by. duplicates: whether
    weight_scale is duplicated with the weights of k and v where there are more GPUs than heads.
    gpus have the arithmetic; documented_12 and documented_13 are those of the support matrix, None
    where it does not have the format; expert_gpus those of the kernels for experts.
    """

    needed: tuple[str, ...] = ()
    needed_fused: tuple[str, ...] = ()
    needed_once: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    unloaded_once: tuple[str, ...] = ()
    all_or_none: tuple[str, ...] = ()
    smoothing_needed: bool = False
    smoothing_ignored: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    scale_dtype: str | None = None
    experts: str | None = None
    experts_needed: tuple[str, ...] = ()
    experts_unloaded: tuple[str, ...] = ()
    local_columns: int = 1
    duplicates: bool = False
    gpus: Gpus = Gpus()
    documented_12: frozenset[int] | None = None
    documented_13: frozenset[int] | None = None
    expert_gpus: Gpus = Gpus()


_SCALES = ("weight_scale", "weight_scale_2", "input_scale")
_SHARED = ("input_scale", "weight_scale_2")
_BLACKWELL = frozenset({100, 103, 120, 121})
_DATACENTER = frozenset({100, 103})
_NO_EXPERTS = "the kernels for experts have no method for it: can_implement is false, or ValueError"

_NVFP4 = Support(
    needed_fused=("weight_scale",),
    needed_once=("weight_scale_2",),
    unloaded=("weight_scale",),
    unloaded_once=("input_scale",),
    equal=_SHARED,
    scale_dtype="F8_E4M3",
    experts_needed=_SCALES,
    local_columns=16,
    duplicates=True,
    gpus=Gpus(100),
    documented_12=_BLACKWELL,
    documented_13=_BLACKWELL,
    expert_gpus=Gpus(only=_BLACKWELL),
)

# by the format's name; one that is not here has no method in TensorRT-LLM
SUPPORT: Mapping[str, Support] = {
    "FP8": Support(
        unloaded=("weight_scale",),
        all_or_none=("input_scale",),
        experts_unloaded=("weight_scale", "input_scale"),
        duplicates=True,
        gpus=Gpus(89),
        documented_12=_BLACKWELL | {89, 90},
        documented_13=_BLACKWELL | {89, 90},
        expert_gpus=Gpus(89),
    ),
    "FP8_PER_CHANNEL_PER_TOKEN": Support(
        unloaded=("weight_scale",),
        experts=_NO_EXPERTS,
        gpus=Gpus(89),
        documented_12=frozenset({90}),
        documented_13=frozenset({90}),
    ),
    "FP8_PB_WO": Support(
        unloaded=("weight_scale",),
        gpus=Gpus(90),
        documented_12=_DATACENTER | {90},
        documented_13=_DATACENTER | {90},
        expert_gpus=Gpus(only=_DATACENTER | {90, 120}),
    ),
    "NVFP4": _NVFP4,
    "NVFP4_AWQ": replace(_NVFP4, smoothing_ignored=("qkv",)),
    "W4A16_NVFP4": Support(
        needed_fused=("weight_scale",),
        unloaded=("weight_scale",),
        unloaded_once=("weight_scale_2",),
        equal=("weight_scale_2",),
        scale_dtype="F8_E4M3",
        experts_needed=("weight_scale", "weight_scale_2"),
        local_columns=16,
        duplicates=True,
        expert_gpus=Gpus(80),
    ),
    "W4A8_NVFP4_FP8": Support(
        needed=("weight_scale",),
        needed_once=_SHARED,
        equal=_SHARED,
        scale_dtype="F8_E4M3",
        experts=_NO_EXPERTS + "; moe_backend TRTLLM has one",
        local_columns=32,
        gpus=Gpus(only=_DATACENTER),
    ),
    "W4A8_MXFP4_FP8": Support(
        needed=("weight_scale",),
        scale_dtype="U8",
        experts_needed=("weight_scale",),
        local_columns=32,
        gpus=Gpus(100),
        documented_12=_BLACKWELL,
        documented_13=_BLACKWELL,
        expert_gpus=Gpus(only=_DATACENTER),
    ),
    "MXFP8": Support(
        needed=("weight_scale",),
        scale_dtype="U8",
        local_columns=32,
        expert_gpus=Gpus(only=_DATACENTER),
    ),
    "W4A16_AWQ": Support(
        needed=("weight_scale",),
        smoothing_needed=True,
        smoothing_ignored=("qkv", "gate_up"),
        experts=_NO_EXPERTS,
        local_columns=128,
        gpus=Gpus(80),
        documented_12=frozenset({80, 86, 89, 90}),
        documented_13=frozenset({80, 86, 89, 90, 100, 103}),
    ),
    "W4A8_AWQ": Support(
        needed=("weight_scale",),
        smoothing_needed=True,
        needed_once=_SHARED,
        equal=_SHARED,
        experts_needed=(*_SCALES, "pre_quant_scale"),
        local_columns=128,
        gpus=Gpus(89),
        documented_12=frozenset({89, 90}),
        documented_13=frozenset({89, 90, 100, 103}),
        expert_gpus=Gpus(only=frozenset({89, 90})),
    ),
    "W8A16": Support(
        needed=("weight_scale",), experts_needed=("weight_scale",), expert_gpus=Gpus(80)
    ),
}

# model types with a loader for experts stacked in one tensor
STACKED_EXPERTS = frozenset({"gpt_oss", "llama4", "llama4_text"})


def support_of(module: Module) -> Support | None:
    """Return how the module's format is loaded, None if it is not, or if no format is known."""
    return SUPPORT.get(module.declared.name) if module.declared else None


def is_packed(module: Module) -> bool:
    """Return whether its codes share bytes, so that its weight has not the shape of a plain one."""
    return module.tensors["weight"].dtype == "U8"
