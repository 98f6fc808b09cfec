"""What TensorRT-LLM needs of the GPUs, and of the sizes where layers are divided over several."""

from collections.abc import Iterator

from qvalidate.context import Context, Module, positive_int
from qvalidate.layout import sizes
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.trtllm_experts import experts
from qvalidate.rules.trtllm_matching import Layer
from qvalidate.rules.trtllm_support import BOTH, ENGINE, V12, V13, Support
from qvalidate.rules.trtllm_tensors import dense, model_dtype

_LINEAR = "documented: _torch/modules/linear.py"
_MATRIX = "documented: docs/source/features/quantization.md, hardware support"
_BLOCKS = "FP8_PB_WO"
_BLOCK = 128
# layers that are divided by columns; those that are fused are divided by rows
_BY_COLUMNS = frozenset({"o_proj", "down_proj"})
_KEYS = frozenset({"k_proj", "v_proj"})
_INT4 = frozenset({"W4A16_AWQ", "W4A8_AWQ"})


@rule(
    "trtllm-architecture",
    severity="error",
    summary="config.json names no architecture, by which TensorRT-LLM finds the model's class",
    text="""The class is looked up under the first of `architectures`: "Model architecture is not
    provided". Which names are registered is not known here.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=("documented: _torch/models/modeling_utils.py:get_model_architecture",),
)
def trtllm_architecture(context: Context) -> Iterator[Spot]:
    if not context.checkpoint.config.get("architectures"):
        yield Spot(context.config_file, "$.architectures", "missing or empty")


@rule(
    "trtllm-block-dtype",
    severity="error",
    summary="TensorRT-LLM's FP8 block layers run in bfloat16 only",
    text="""The layer asserts that its input is bfloat16, whatever the dtype of the model is. It
    quantizes the input too, in blocks of 128, although ModelOpt calls the format weight-only.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:FP8BlockScalesLinearMethod.apply (assert input.dtype)",),
)
def trtllm_block_dtype(context: Context) -> Iterator[Spot]:
    dtype = model_dtype(context)
    if dtype not in (None, "bfloat16") and any(own.name == _BLOCKS for _, own in context.encoded):
        yield Spot(context.config_file, "$.dtype", f"{dtype}; the input is asserted to be bfloat16")


@rule(
    "trtllm-gpu",
    severity="error",
    summary="the GPU has no arithmetic for the format in TensorRT-LLM",
    text="""FP8 needs sm_89, its blocks sm_90, FP4 with quantized inputs sm_100, W4A8_NVFP4_FP8
    sm_100 or sm_103. W4A16_NVFP4 and MXFP8 run by dequantization anywhere. --gpu says which it
    is.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(_MATRIX, f"{_LINEAR}:W4A8NVFP4FP8LinearMethod (trtllm-gen)"),
)
def trtllm_gpu(context: Context) -> Iterator[Spot]:
    gpu = context.deployment.gpu
    for name, (module, support) in _first_of_each(context).items():
        if gpu is not None and not support.gpus.allow(gpu):
            yield Spot(module.file, module.weight_name, f"no {name} on sm_{gpu}")


@rule(
    "trtllm-gpu-undocumented",
    severity="error",
    summary="TensorRT-LLM 1.3 does not list the format for this GPU",
    text="""The cell of the support matrix is empty: row-wise FP8 is listed for Hopper only, AWQ
    for Ampere to sm_103. Whether it runs elsewhere is not known.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "unknown"},
    evidence=(_MATRIX,),
)
def trtllm_gpu_undocumented(context: Context) -> Iterator[Spot]:
    for name, (module, support) in _first_of_each(context).items():
        yield from _undocumented(context, name, module, support, support.documented_13)


@rule(
    "trtllm-gpu-undocumented-12",
    severity="error",
    summary="TensorRT-LLM 1.2 does not list the format for this GPU",
    text="""As trtllm-gpu-undocumented; in 1.2's matrix AWQ ends with Hopper.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "unknown"},
    evidence=(_MATRIX,),
)
def trtllm_gpu_undocumented_12(context: Context) -> Iterator[Spot]:
    for name, (module, support) in _first_of_each(context).items():
        yield from _undocumented(context, name, module, support, support.documented_12)


def _undocumented(
    context: Context, name: str, module: Module, support: Support, listed: frozenset[int] | None
) -> Iterator[Spot]:
    gpu = context.deployment.gpu
    if gpu is None or listed is None or gpu in listed or not support.gpus.allow(gpu):
        return
    known = ", ".join(f"sm_{number}" for number in sorted(listed))
    message = f"{name} is listed for {known}, not for sm_{gpu}"
    yield Spot(module.file, module.weight_name, message)


@rule(
    "trtllm-experts-gpu",
    severity="error",
    summary="TensorRT-LLM has no kernel for experts in this format on this GPU",
    text="""The kernels for experts are for fewer GPUs than those of dense layers: NVFP4 for
    Blackwell, W4A8_AWQ for sm_89 and sm_90, MXFP8 and W4A8_MXFP4_FP8 for sm_100 and sm_103, FP8
    blocks for sm_90, sm_120 and, by another backend, sm_100 and sm_103.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=("documented: _torch/modules/fused_moe/fused_moe_cutlass.py:_QUANT_SUPPORT_TABLE",),
)
def trtllm_experts_gpu(context: Context) -> Iterator[Spot]:
    gpu, seen = context.deployment.gpu, set[str]()
    for layer, modules, support in experts(context):
        name = modules[0].declared.name if modules[0].declared else ""
        if gpu is None or support.experts or support.expert_gpus.allow(gpu) or name in seen:
            continue
        seen.add(name)
        message = f"no kernel for {name} in {layer.name} on sm_{gpu}"
        yield Spot(modules[0].file, modules[0].weight_name, message)


@rule(
    "trtllm-tp-rows",
    severity="error",
    summary="the rows of a fused layer can't be divided over the GPUs in TensorRT-LLM",
    text="""With --tp the rows of q, k, v, gate and up are divided evenly: it is asserted. Of AWQ
    two rows share a byte, so that half of them has to divide. k and v of fewer heads than GPUs
    are duplicated.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:Linear.__init__ (assert out_features % tp_size)",),
)
def trtllm_tp_rows(context: Context) -> Iterator[Spot]:
    tp = context.deployment.tp
    for layer, module, (rows, _) in _sizes(context):
        leaf = module.name.rpartition(".")[2]
        if layer.kind == "linear" or (leaf in _KEYS and tp > _heads(context)):
            continue
        units = rows // 2 if module.declared and module.declared.name in _INT4 else rows
        if units % tp:
            what = f"{rows} rows, two to a byte," if units != rows else f"{rows} rows"
            yield Spot(module.file, module.weight_name, f"{what} over {tp} GPUs")


@rule(
    "trtllm-tp-columns",
    severity="error",
    summary="the columns of a layer can't be divided evenly over the GPUs in TensorRT-LLM 1.3",
    text="""With --tp the columns of o_proj and down_proj are divided. 1.3 has uneven division for
    some methods, with conditions that are not known here.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "unknown"},
    evidence=(f"{_LINEAR}:Linear.__init__ (1.3)",),
)
@rule(
    "trtllm-tp-columns-12",
    severity="error",
    summary="the columns of a layer can't be divided over the GPUs in TensorRT-LLM 1.2",
    text="""With --tp the columns of o_proj and down_proj are divided evenly: it is asserted.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:Linear.__init__ (assert in_features % tp_size)",),
)
def trtllm_tp_columns(context: Context) -> Iterator[Spot]:
    tp = context.deployment.tp
    for _, module, (_, columns) in _sizes(context):
        if module.name.rpartition(".")[2] in _BY_COLUMNS and columns % tp:
            yield Spot(module.file, module.weight_name, f"{columns} columns over {tp} GPUs")


@rule(
    "trtllm-tp-group",
    severity="error",
    summary="a GPU's share of the columns is no multiple of the format's group in TensorRT-LLM",
    text="""Each GPU makes parameters for its own columns, which have to be a multiple of 16 in
    the NVFP4 formats, of 32 in the MX formats and W4A8_NVFP4_FP8, of group_size in AWQ.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_LINEAR}:create_weights (in_features % scaling_vector_size, group_size)",),
)
def trtllm_tp_group(context: Context) -> Iterator[Spot]:
    tp = context.deployment.tp
    for layer, modules, support in dense(context) if tp > 1 else ():
        for module in modules:
            found = sizes(module, module.declared) if module.declared else None
            if found is None or layer.name.rpartition(".")[2] not in _BY_COLUMNS or found[1] % tp:
                continue
            if found[1] // tp % support.local_columns:
                message = f"{found[1] // tp} columns on each of {tp} GPUs, no multiple of "
                yield Spot(module.file, module.weight_name, f"{message}{support.local_columns}")


@rule(
    "trtllm-blocks-misaligned",
    severity="error",
    summary="TensorRT-LLM 1.3 applies block scales to rows or columns of other blocks",
    text="""The grid of scales of a fused layer is that of the joined rows, and each part is placed
    at its first row divided by 128, rounded up: a part that ends inside a block shifts the scales
    of the next. With --tp, a GPU's share of the grid is rounded up in the same way, so that rows
    and columns on each GPU have to be multiples of 128.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "wrong"},
    evidence=(
        f"{_LINEAR}:FP8BlockScalesLinearMethod.remap_fused_shard_indices_by_divisible_factor",
        f"{_LINEAR}:load_weight_shard (rounds up)",
    ),
)
@rule(
    "trtllm-blocks-misaligned-12",
    severity="error",
    summary="TensorRT-LLM 1.2 stops at block scales that do not align, or applies them to others",
    text="""As trtllm-blocks-misaligned. An older loader joined the scales and stopped at their
    number, a newer one places them; which of them 1.2.1 has is not known.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "unknown"},
    evidence=(f"{_LINEAR}:FP8BlockScalesLinearMethod (two versions)",),
)
def trtllm_blocks_misaligned(context: Context) -> Iterator[Spot]:
    tp = context.deployment.tp
    for layer, module, (rows, columns) in _sizes(context):
        if module.declared is None or module.declared.name != _BLOCKS:
            continue
        leaf = module.name.rpartition(".")[2]
        is_last = leaf in ("v_proj", "up_proj")
        if layer.kind != "linear" and rows % tp == 0:
            if rows // tp % _BLOCK and (tp > 1 or not is_last):
                yield Spot(module.file, module.weight_name, _share(rows, "rows", tp))
        elif leaf in _BY_COLUMNS and tp > 1 and columns % tp == 0 and columns // tp % _BLOCK:
            yield Spot(module.file, module.weight_name, _share(columns, "columns", tp))


def _share(size: int, what: str, tp: int) -> str:
    return f"{size // tp} {what} on each of {tp} GPUs, no multiple of {_BLOCK}"


@rule(
    "trtllm-kv-heads",
    severity="error",
    summary="there are more GPUs than KV heads, and TensorRT-LLM does not duplicate the scales",
    text="""Where --tp is larger than num_key_value_heads, the weights of k and v are duplicated.
    Of their scales only weight_scale of NVFP4 is, in most models: those of rows, blocks and groups
    no longer belong to the rows they stand beside.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "unknown"},
    evidence=("documented: _torch/models/checkpoints/hf/weight_mapper.py:HfWeightMapper",),
)
def trtllm_kv_heads(context: Context) -> Iterator[Spot]:
    tp, heads = context.deployment.tp, _heads(context)
    for layer, modules, support in dense(context) if tp > heads else ():
        if layer.kind == "qkv" and not support.duplicates:
            keys = [module for module in modules if module.name.endswith("k_proj")]
            for module in keys:
                message = f"{heads} KV heads over {tp} GPUs"
                yield Spot(module.file, module.tensor_name("weight_scale"), message)


def _heads(context: Context) -> int:
    """Return the number of KV heads; as many as could ever be, where config.json does not tell."""
    config = context.checkpoint.config
    return positive_int(config, "num_key_value_heads", "num_attention_heads") or 1 << 30


def _sizes(context: Context) -> Iterator[tuple[Layer, Module, tuple[int, int]]]:
    """Yield the modules of dense layers with their (rows, columns)."""
    for layer, modules, _ in dense(context):
        for module in modules:
            found = sizes(module, module.declared) if module.declared else None
            if found is not None:
                yield layer, module, found


def _first_of_each(context: Context) -> dict[str, tuple[Module, Support]]:
    """Return format -> the first module of a dense layer in it."""
    found: dict[str, tuple[Module, Support]] = {}
    for _, modules, support in dense(context):
        declared = modules[0].declared
        if declared is not None:
            found.setdefault(declared.name, (modules[0], support))
    return found
