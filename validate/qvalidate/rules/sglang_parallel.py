"""What SGLang refuses because of a layer's size on one GPU. That layers divide at all is checked
by rules for any engine."""

from collections.abc import Iterator

from qvalidate.context import Context, Module, positive_int
from qvalidate.layout import sizes
from qvalidate.rules import sglang_support as support
from qvalidate.rules.parallel import local_sizes
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.sglang_matching import Layer, layers
from qvalidate.rules.sglang_reading import built, read
from qvalidate.rules.sglang_support import BOTH, NEW, OLD, ONLY_OLD

# algorithm -> what the columns of a layer on one GPU must be a multiple of
_COLUMNS = {
    "NVFP4": 16,
    "NVFP4_AWQ": 16,
    "W4A16_NVFP4": 16,
    "MXFP8": 32,
    "FP8_PB_WO": support.BLOCK,
    "FP8_BLOCK_SCALES": support.BLOCK,
}
_BLOCK_FP8 = frozenset({"FP8_PB_WO", "FP8_BLOCK_SCALES"})
_MARLIN_ROWS = 64
_MARLIN_TILES = ((64, 128), (128, 64))
# what of an expert is divided by columns
_DOWN = frozenset({"down_proj", "w2"})
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@rule(
    "sglang-experts",
    severity="error",
    summary="SGLang can't divide the experts evenly over the GPUs of --ep",
    text="""Every GPU of expert parallelism takes the same number of experts; SGLang asserts it,
    where other engines give some GPUs one more.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=("SGLang 0.5.17 layers/moe/fused_moe_triton/layer.py:300",),
)
def sglang_experts(context: Context) -> Iterator[Spot]:
    experts = positive_int(context.checkpoint.config, *_EXPERTS)
    is_whole = context.model_type in support.SEPARATE_EXPERTS
    # fewer experts than GPUs are for ep-experts
    if (
        not is_whole
        and experts
        and experts > context.deployment.ep
        and experts % context.deployment.ep
    ):
        message = f"{experts} experts can't be divided evenly over {context.deployment.ep} GPUs"
        key = next((key for key in _EXPERTS if key in context.checkpoint.config), "text_config")
        yield Spot(context.config_file, f"$.{key}", message)


@rule(
    "sglang-local-size",
    severity="error",
    summary="a layer's part on one GPU is no multiple of what SGLang's method needs",
    text="""What one GPU gets of a layer's columns must be a multiple of 16 for NVFP4 ("Unsupported
    model when in features size is not multiple of 16"), 32 for MXFP8 and 128 for blocks of FP8.
    Those need a multiple of 128 rows too, in every part of a fused layer ("Weight
    output_partition_size = ... is not divisible by weight quantization block_n = 128"). Fewer GPUs
    of tensor parallelism leave larger parts.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=(
        "SGLang 0.5.23 modelopt_quant.py:1822, fp8_utils.py:594-609, fp8.py:1586-1601",
        "run on an H200 with SGLang 0.5.17: block FP8 with 64 rows",
    ),
)
def sglang_local_size(context: Context) -> Iterator[Spot]:
    for _, module, algo, (rows, columns) in _local(context):
        need = _COLUMNS.get(algo, 1)
        if columns % need:
            message = f"{columns} columns on a GPU; {algo} needs a multiple of {need}"
            yield Spot(module.file, module.weight_name, message)
        elif algo in _BLOCK_FP8 and rows % support.BLOCK:
            message = f"{rows} rows on a GPU; {algo} needs a multiple of {support.BLOCK}"
            yield Spot(module.file, module.weight_name, message)


@rule(
    "sglang-marlin-rows-0517",
    severity="error",
    summary="SGLang 0.5.17's Marlin needs rows in a multiple of 64",
    text="""On sm_80 to sm_90 NVFP4 is decoded by Marlin. 0.5.17 does not pad a dense layer, 0.5.23
    does: "NVFP4 Marlin requires output_size_per_partition to be a multiple of 64". The rows are
    those of the fused layer on one GPU.""",
    engine="sglang",
    versions=ONLY_OLD,
    effects={"sglang": "refuses"},
    evidence=("SGLang 0.5.17 layers/quantization/marlin_utils_fp4.py:143-147",),
)
def sglang_marlin_rows_0517(context: Context) -> Iterator[Spot]:
    gpu = context.deployment.gpu
    if gpu is None or gpu >= support.BLACKWELL or read(context, OLD).refusal:
        return
    totals: dict[str, int] = {}
    first: dict[str, Module] = {}
    for layer, module, algo, (rows, _) in _local(context):
        if algo in support.PACKED and not layer.is_experts:
            totals[layer.name] = totals.get(layer.name, 0) + rows
            first.setdefault(layer.name, module)
    for name, total in totals.items():
        if total % _MARLIN_ROWS:
            message = f"{name} has {total} rows on a GPU, Marlin needs a multiple of {_MARLIN_ROWS}"
            yield Spot(first[name].file, first[name].weight_name, message)


@rule(
    "sglang-marlin-experts",
    severity="error",
    summary="SGLang's Marlin has no tile for an expert's part on one GPU",
    text="""On sm_80 to sm_90 NVFP4 is decoded by Marlin, in tiles of 64 by 128 or 128 by 64.
    Experts with a gate are not padded: rows and columns on one GPU, those of gate and up together,
    must be a multiple of one of the two. Fewer GPUs of tensor parallelism, or expert parallelism,
    leave larger parts.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=(
        "SGLang 0.5.23 layers/quantization/marlin_utils_fp4.py:500-515",
        "sgl-project/sglang issue 30887",
    ),
)
def sglang_marlin_experts(context: Context) -> Iterator[Spot]:
    gpu = context.deployment.gpu
    if gpu is None or gpu >= support.BLACKWELL:
        return
    seen: set[tuple[str, str]] = set()
    for layer, module, algo, (rows, columns) in _local(context):
        leaf = module.name.rpartition(".")[2]
        if not layer.is_experts or algo not in support.PACKED or (layer.name, leaf) in seen:
            continue
        seen.add((layer.name, leaf))
        rows *= 1 if leaf in _DOWN else 2
        if not any(rows % n == 0 and columns % k == 0 for n, k in _MARLIN_TILES):
            message = f"[{rows}, {columns}] on a GPU is no multiple of [64, 128] or [128, 64]"
            yield Spot(module.file, module.weight_name, message)


def _local(context: Context) -> Iterator[tuple[Layer, Module, str, tuple[int, int]]]:
    """Yield each quantized module with its layer, its algorithm in SGLang, its size on a GPU."""
    reading = read(context, NEW)
    for layer in () if reading.refusal else layers(context.quantized, context.model_type):
        algo = built(layer, reading, context).algo
        for module in (context.quantized[part] for part in layer.parts):
            found = _size(context, module, layer)
            if algo is not None and found is not None and not module.is_stack:
                yield layer, module, algo, found


def _size(context: Context, module: Module, layer: Layer) -> tuple[int, int] | None:
    if not layer.is_experts and ".experts." not in module.name:
        return local_sizes(context, module)
    found = sizes(module, module.declared) if module.declared else None
    if found is None or not layer.is_experts:
        return found
    # the GPUs of expert parallelism are among those of tensor parallelism
    gpus = max(context.deployment.tp // context.deployment.ep, 1)
    rows, columns = found
    is_down = module.name.rpartition(".")[2] in _DOWN
    return (rows, columns // gpus) if is_down else (rows // gpus, columns)
