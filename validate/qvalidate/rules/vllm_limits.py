"""What vLLM refuses by format, by shape or by layer."""

from collections.abc import Iterator

from qschema.architectures import text_config
from qvalidate.context import LM_HEAD, Context, axes, codes_spec
from qvalidate.rules.registry import Spot, rule, some
from qvalidate.rules.vllm_matching import layers
from qvalidate.rules.vllm_support import SUPPORT, VERSIONS, Support


def support_of(context: Context) -> Support | None:
    """Return what vLLM says of the obeyed algorithm, None if it refuses it or none is named."""
    algo = context.obeyed.algo if context.obeyed else None
    return SUPPORT.get((algo or "").upper())


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
    if obeyed is not None and support_of(context) is None:
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
    support = support_of(context)
    if support is None or support.experts is None:
        return
    found = [layer for layer in layers(context.quantized).values() if layer.is_experts]
    if found:
        module = context.quantized[found[0].parts[0]]
        algo = context.obeyed.algo if context.obeyed else None
        names = some([layer.name for layer in found])
        yield Spot(module.file, f"{module.name}.weight", f"{support.experts} ({algo} in {names})")


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
    support = support_of(context)
    if support is None or context.declared is None:
        return
    for name, (_, columns) in _sizes(context).items():
        if columns % support.multiple_of_k:
            message = (
                f"{context.declared.name} requires in divisible by {support.multiple_of_k}, "
                f"got {columns}"
            )
            yield Spot(context.quantized[name].file, f"{name}.weight", message)


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
    support = support_of(context)
    if support is None:
        return
    sizes = _sizes(context)
    for layer in layers(sizes).values():
        for name in () if layer.is_experts else layer.parts[:-1]:
            rows = sizes[name][0]
            if rows % support.fused_rows:
                message = (
                    f"has {rows} rows, no multiple of {support.fused_rows}, and is not the last "
                    f"part of {layer.name}"
                )
                yield Spot(context.quantized[name].file, f"{name}.weight", message)


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
    support = support_of(context)
    if support is None or support.lm_head is None:
        return
    for name, module in context.quantized.items():
        if name.rpartition(".")[2] == LM_HEAD:
            yield Spot(module.file, f"{name}.weight", support.lm_head)


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
    summary="the model's dtype is float32, which vLLM's quantized layers do not run in",
    text="""With dtype "auto" vLLM turns float32 into the platform's 16-bit type; with
    --dtype float32 it refuses: "torch.float32 is not supported for quantization method
    modelopt". Say bfloat16 in config.json if that is what the model is.""",
    engine="vllm",
    versions=VERSIONS,
    evidence=("vLLM 0.32.0 config/model.py:2422-2424, vLLM 0.33.0 config/vllm.py:937",),
)
def vllm_model_dtype(context: Context) -> Iterator[Spot]:
    for key in ("dtype", "torch_dtype"):
        for config in (context.checkpoint.config, text_config(context.checkpoint.config)):
            if config.get(key) == "float32":
                message = "float32 runs as the platform's 16-bit type; --dtype float32 is refused"
                yield Spot(context.config_file, f"$.{key}", message)
                return


def _sizes(context: Context) -> dict[str, tuple[int, int]]:
    """Return module -> (rows, columns) of the quantized modules whose codes have the right rank."""
    if context.declared is None:
        return {}
    spec = codes_spec(context.declared)
    found = {
        name: axes(spec, weight.shape)
        for name, module in context.quantized.items()
        if (weight := module.codes(context.declared)) is not None
    }
    return {name: size for name, size in found.items() if size is not None}
