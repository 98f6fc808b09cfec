"""What vLLM refuses by format, by shape or by layer."""

from collections.abc import Iterable, Iterator

from qschema.architectures import experts_of, text_config
from qvalidate.context import LM_HEAD, Context, Module
from qvalidate.rules.parallel import local_sizes
from qvalidate.rules.registry import Spot, rule, some
from qvalidate.rules.vllm_matching import layers
from qvalidate.rules.vllm_support import SUPPORT, VERSIONS, support_of


@rule(
    "vllm-algo-unsupported",
    severity="error",
    summary="vLLM has no method for the quant_algo",
    text="""vLLM takes seven names, in any case, and stops at every other one: "ModelOpt
    currently only supports: [...] quantizations in vLLM" or "Unknown ModelOpt quant algo".""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0 modelopt.py:396-402; run, both layouts, 15 names",),
)
def vllm_algo_unsupported(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is not None and (obeyed.algo or "").upper() not in SUPPORT:
        message = f"vLLM refuses {obeyed.algo!r}; it takes {', '.join(SUPPORT)}"
        yield Spot(obeyed.file, obeyed.where("quant_algo"), message)


@rule(
    "vllm-experts-unsupported",
    severity="error",
    summary="vLLM has no ModelOpt method for experts in this format",
    text="""For FP8_PER_CHANNEL_PER_TOKEN and FP8_PB_WO vLLM knows dense layers only. A model
    whose routed experts are in one of them reaches the per-tensor FP8 method for experts,
    which finds a vector where it expects one number: "shape '[]' is invalid for input of size
    N". Keep the experts unquantized, or write them in another dialect (compressed-tensors for
    channels).""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 modelopt.py:256, layers/fused_moe/routed_experts.py:335",
        "run on an H200 with vLLM 0.33.0: mixtral FP8_PER_CHANNEL_PER_TOKEN",
        "run with vLLM 0.32.0 on CPU: the same words, at experts.0.w2.weight_scale",
    ),
)
def vllm_experts_unsupported(context: Context) -> Iterator[Spot]:
    for declared in context.assignment.formats:
        support = SUPPORT.get(declared.name)
        names = [module.name for module, own in context.encoded if own == declared]
        found = [layer for layer in layers(names).values() if layer.is_experts]
        if support is None or support.experts is None or not found:
            continue
        module = context.quantized[found[0].parts[0]]
        where = some([layer.name for layer in found])
        message = f"{support.experts} ({declared.name} in {where})"
        yield Spot(module.file, module.weight_name, message)


@rule(
    "vllm-columns",
    severity="error",
    summary="a layer's columns are not a multiple of what vLLM's method needs",
    text="""vLLM does not pad columns. For FP8_PB_WO it stops with "FP8_PB_WO requires in
    divisible by 128, got 192"; the format itself allows ragged blocks. With tensor
    parallelism, the columns of o_proj and down_proj are divided first.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.32.0 modelopt.py:2231-2232",
        "run on an H200 with vLLM 0.33.0: 'requires in divisible by 128, got 192'",
    ),
)
def vllm_columns(context: Context) -> Iterator[Spot]:
    modules = (module for module, _ in context.encoded)
    for name, (_, columns) in _sizes(context, modules).items():
        module = context.quantized[name]
        support = support_of(module)
        if support is not None and module.declared and columns % support.multiple_of_k:
            message = (
                f"{module.declared.name} requires in divisible by {support.multiple_of_k}, "
                f"got {columns}{_on_each(context)}"
            )
            yield Spot(module.file, module.weight_name, message)


@rule(
    "vllm-fused-rows",
    severity="error",
    summary="a part of a fused layer does not end on a block boundary",
    text="""vLLM stacks q, k and v (and gate and up) into one matrix with one grid of scales.
    With blocks of 128 rows, every part but the last must have a multiple of 128 rows, or its
    last block would hold rows of the next part; vLLM stops with "start (x) + length (y)
    exceeds dimension size".""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0, run with its own loader: 64-row k and v fail at one rank",),
)
def vllm_fused_rows(context: Context) -> Iterator[Spot]:
    # experts are fused otherwise
    dense = [module for module, _ in context.encoded if experts_of(module.name) is None]
    found = _sizes(context, dense)
    for layer in layers(found).values():
        for name in () if layer.is_experts else layer.parts[:-1]:
            module, rows = context.quantized[name], found[name][0]
            support = support_of(module)
            if support is not None and rows % support.fused_rows:
                message = (
                    f"has {rows} rows{_on_each(context)}, no multiple of {support.fused_rows}, and "
                    f"is not the last part of {layer.name}"
                )
                yield Spot(module.file, module.weight_name, message)


@rule(
    "vllm-lm-head",
    severity="error",
    summary="vLLM can't load a quantized lm_head in this format",
    text="""The vocabulary layer's loader knows one-dimensional sharding and meets the
    two-dimensional grid of FP8_PB_WO: AssertionError, without a name. Exclude lm_head, as
    every preset does.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0 model_executor/layers/vocab_parallel_embedding.py:515; run",),
)
def vllm_lm_head(context: Context) -> Iterator[Spot]:
    for name, module in context.quantized.items():
        support = support_of(module)
        if name.rpartition(".")[2] == LM_HEAD and support is not None and support.lm_head:
            yield Spot(module.file, module.weight_name, support.lm_head)


@rule(
    "vllm-stray-weights",
    severity="error",
    summary="vLLM reads a stray safetensors file as weights of the model",
    text="""Without an index vLLM loads every *.safetensors of the folder, and stops at the
    first name that the model does not have. With an index vLLM reads the files that it names and
    no others.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.32.0 model_loader/weight_utils.py:585-611 filter_duplicate_safetensors_files",
        "run on an H200 with vLLM 0.33.0: 'There is no module or parameter named'",
    ),
)
def vllm_stray_weights(context: Context) -> Iterator[Spot]:
    if context.checkpoint.index is None:
        for name in context.checkpoint.stray_shards:
            if "/" not in name:
                message = "without an index vLLM reads every *.safetensors here; remove it"
                yield Spot(str(context.path / name), "", message)


@rule(
    "vllm-model-dtype",
    severity="note",
    summary="the model's dtype is one that vLLM's quantized layers do not run in",
    text="""With dtype "auto" vLLM turns float32 into the platform's 16-bit type; with
    --dtype float32 it refuses: "torch.float32 is not supported for quantization method
    modelopt". Say bfloat16 in config.json if that is what the model is. A float16 model in MXFP8
    is refused as it is, an error: that method runs in bfloat16 only.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.32.0 config/model.py:2422-2424, vLLM 0.33.0 config/vllm.py:937",),
)
def vllm_model_dtype(context: Context) -> Iterator[Spot]:
    where, dtype = _model_dtype(context)
    if dtype == "float32":
        message = "float32 runs as the platform's 16-bit type; --dtype float32 is refused"
        yield Spot(context.config_file, where, message)
    support = (
        SUPPORT.get(context.obeyed.algo.upper()) if context.obeyed and context.obeyed.algo else None
    )
    if support is not None and dtype == "float16" and dtype not in support.dtypes:
        message = f"float16, but vLLM's {support.method} runs in {', '.join(support.dtypes)} only"
        yield Spot(context.config_file, where, message, "error")


def _model_dtype(context: Context) -> tuple[str, str | None]:
    """Return the JSON path and the value of the model's dtype."""
    for key in ("dtype", "torch_dtype"):
        for config in (context.checkpoint.config, text_config(context.checkpoint.config)):
            found = config.get(key)
            if isinstance(found, str):
                return f"$.{key}", found
    return "", None


def _on_each(context: Context) -> str:
    """Return what goes behind a size that is that of each GPU's part."""
    return "" if context.deployment.tp == 1 else f" on each of {context.deployment.tp} GPUs"


def _sizes(context: Context, modules: Iterable[Module]) -> dict[str, tuple[int, int]]:
    """Return module -> (rows, columns) on each GPU of those whose codes have the right rank."""
    found = {module.name: local_sizes(context, module) for module in modules}
    return {name: size for name, size in found.items() if size is not None}
