"""What vLLM refuses by the form of the config, or by where quantized tensors stand."""

from collections.abc import Iterator

from qschema.architectures import experts_of, keep_reason
from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.vllm_support import (
    STACKED_EXPERTS,
    STACKS_WITHOUT,
    SUPPORT,
    VERSIONS,
)


@rule(
    "vllm-nested-config",
    severity="error",
    summary="the nested config can't name this algorithm, or lacks a key, for vLLM",
    text="""The nested form, {producer, quantization}, is what vLLM reads where config.json has no
    quantization_config, and is legal inside it. With producer "modelopt" vLLM takes five names
    there and stops at the others, also at W4A16_NVFP4 and MXFP8: "Unknown ModelOpt quant algo". For
    NVFP4 and MXFP8 it asks for keys that may be null, but must be there. The flat form in
    config.json has none of these limits.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 transformers_utils/model_arch_config_convertor.py:255-270",
        "vLLM 0.33.0 modelopt.py:817-829, :1273-1283; run",
        "run with vLLM 0.32.0 on CPU: 'Unknown ModelOpt quant algo: MXFP8'",
    ),
)
def vllm_nested_config(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    support = SUPPORT.get((obeyed.algo or "").upper()) if obeyed else None
    if obeyed is None or support is None or not obeyed.is_nested:
        return
    if not support.is_nested and "quant_method" not in obeyed.raw:
        message = f"Unknown ModelOpt quant algo: {obeyed.algo}, in the nested form"
        yield Spot(obeyed.file, obeyed.where("quant_algo"), message)
    for key in support.nested_keys:
        if key not in obeyed.body:
            message = f"missing; vLLM asks for it in the nested form of {obeyed.algo}"
            yield Spot(obeyed.file, obeyed.where(key), message)


@rule(
    "vllm-stacked-experts",
    severity="error",
    summary="quantized experts stacked in one tensor, in a model that vLLM loads expert by expert",
    text="""vLLM loads the stacked layout with its scales (experts.gate_up_proj_weight_scale) in
    Llama 4 with its vision part only. A text-only Llama 4 takes the scale for the weight (KeyError:
    "...w2_weight_input_scale"); gpt-oss has no biases beside quantized experts (KeyError:
    "...w2_bias"). Other models stop with an AttributeError at the scale: write their experts one by
    one, as experts.E.gate_proj.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 layers/fused_moe/routed_experts.py:1049, run with its own loader",
        "run on an H200 with vLLM 0.33.0: Llama4ForCausalLM in FP8 and NVFP4, gpt_oss in NVFP4",
        "vLLM 0.32.0 models/mllama4.py:1062-1091, models/llama4.py:431-452; dry loads of both",
    ),
)
def vllm_stacked_experts(context: Context) -> Iterator[Spot]:
    model_type = context.model_type
    lost = STACKS_WITHOUT.get(model_type or "")
    message = f"vLLM's loader for {model_type} "
    message += (
        f"has no place for {lost} of quantized stacks" if lost else "takes experts one by one"
    )
    for module in context.quantized.values():
        if module.is_stack and model_type not in STACKED_EXPERTS:
            yield Spot(module.file, module.name, message)


@rule(
    "vllm-embedding",
    severity="error",
    summary="an embedding is stored quantized, which vLLM never loads",
    text="""vLLM has no quantized embedding for ModelOpt's formats. It builds a plain one, whatever
    the config says, and meets codes of another dtype or shape, and scales that it does not
    know.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 modelopt.py get_quant_method: Linear, lm_head, experts, attention",
        "run with vLLM 0.32.0 on CPU: 'no module or parameter named embed_tokens.weight_scale'",
    ),
)
def vllm_embedding(context: Context) -> Iterator[Spot]:
    config = context.checkpoint.config
    for name, module in context.quantized.items():
        # experts by the thousand are none, and asking takes long
        if experts_of(name) is None and keep_reason(name, config=config) == "embedding":
            yield Spot(module.file, module.weight_name, "vLLM builds a plain embedding")
