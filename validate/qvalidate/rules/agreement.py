"""config.json and hf_quant_config.json say the same, and say something that engines understand."""

from collections.abc import Iterator, Mapping

from qschema.formats import formats
from qschema.hf_quant_config import HfQuantConfig
from qschema.quantization_config import ModelConfig
from qschema.strict import DocumentError, Json, Strict
from qvalidate.context import Context
from qvalidate.documents import HF_QUANT_CONFIG, QuantConfig
from qvalidate.rules.registry import Spot, rule, some


@rule(
    "not-quantized",
    severity="error",
    summary="nothing is quantized, and no config asks for it",
    text="""There is nothing here to validate: no quantized weight, and no config that says there
    should be one (or one that excludes every Linear). Engines load such a checkpoint as the plain
    one that it is. A conversion that ended like this did nothing.""",
    evidence=("run with vLLM 0.32.0 on CPU: a bf16 checkpoint loads as unquantized",),
)
def not_quantized(context: Context) -> Iterator[Spot]:
    if context.quantized:
        return
    if context.obeyed is None:
        message = f"no quantized module, no quantization_config here and no {HF_QUANT_CONFIG}"
        yield Spot(context.config_file, "$.quantization_config", message)
    elif all(context.excluded_by(module) for module in context.unquantized):
        where = context.obeyed.where(context.obeyed.exclude_key)
        yield Spot(context.obeyed.file, where, "excludes every Linear, and none is quantized")


@rule(
    "no-quantization-config",
    severity="error",
    summary="modules are quantized, but no config says so",
    text="""Without quantization_config in config.json and without hf_quant_config.json, every
    engine takes the checkpoint for a plain one. vLLM then stops at the first scale, whose name no
    plain layer has; models that skip such names read the codes as weights.""",
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0 transformers_utils/config.py:953-965",),
)
def no_quantization_config(context: Context) -> Iterator[Spot]:
    if context.obeyed is None and context.quantized:
        message = (
            f"{len(context.quantized)} quantized modules, but there is no quantization_config here "
            f"and no {HF_QUANT_CONFIG}"
        )
        yield Spot(context.config_file, "$.quantization_config", message)


@rule(
    "no-quantized-module",
    severity="error",
    summary="a config says that the checkpoint is quantized, but no module is",
    text="""Engines build quantized layers where the config asks for them. vLLM casts the
    16-bit weights to the quantized dtype by value and multiplies with scales that were never
    loaded: no message, and garbage. Either the conversion did nothing, or the config was copied
    from another checkpoint.""",
    effects={"vllm": "wrong"},
    evidence=("run with vLLM 0.32.0 on CPU: bf16 weights under such a config load, as garbage",),
)
def no_quantized_module(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is None or context.quantized or _is_kv_only(obeyed):
        return
    if not all(context.excluded_by(module) for module in context.unquantized):
        message = f"says {obeyed.algo}, but no module's weight is quantized"
        yield Spot(obeyed.file, obeyed.where("quant_algo"), message)


@rule(
    "quant-method-missing",
    severity="error",
    summary='the obeyed config lacks quant_method "modelopt"',
    text="""vLLM decides by quant_method which method to use. Without it (and, in the nested form,
    without producer.name "modelopt") the model is taken for unquantized, without a word about it:
    vLLM stops at the first scale, whose name no plain layer has, and models that skip such names
    read the codes as weights.""",
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 model_executor/layers/quantization/modelopt.py:343-362",
        "run with vLLM 0.32.0 on CPU: no error about the config, then one about a weight_scale",
    ),
)
def quant_method_missing(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is not None and not (obeyed.method or "").lower().startswith("modelopt"):
        found = "nothing" if obeyed.method is None else repr(obeyed.method)
        message = f'expected "modelopt", found {found}; engines take the model for something else'
        yield Spot(obeyed.file, obeyed.where("quant_method"), message)


@rule(
    "unknown-algo",
    severity="error",
    summary="quant_algo is missing, or names a format that is not declared here",
    text="""The tensors are checked against the declaration of the format that quant_algo
    names. Without one, nothing about tensors and scales can be said, and silence would look
    like approval.""",
    effects={"vllm": "unknown"},
)
def unknown_algo(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is None or obeyed.is_mixed or _is_kv_only(obeyed):
        return
    if context.assignment.whole is None:
        message = (
            f"found {obeyed.body.get('quant_algo')!r}, so that no tensor could be checked; "
            f"declared: {', '.join(formats())}"
        )
        yield Spot(obeyed.file, obeyed.where("quant_algo"), message)


@rule(
    "config-algo-disagrees",
    severity="error",
    summary="config.json and hf_quant_config.json name different algorithms",
    text="""Engines that read one file and engines that read the other would load different
    things. vLLM obeys config.json and does not look at hf_quant_config.json; TensorRT-LLM
    reads the latter.""",
    evidence=("vLLM 0.33.0 transformers_utils/config.py:953-965; run",),
)
def config_algo_disagrees(context: Context) -> Iterator[Spot]:
    config, file = context.in_config, context.in_file
    if config and file and (config.algo or "").upper() != (file.algo or "").upper():
        message = f"says {file.algo!r}, config.json says {config.algo!r}"
        yield Spot(file.file, file.where("quant_algo"), message)


@rule(
    "config-kv-disagrees",
    severity="error",
    summary="only one of config.json and hf_quant_config.json quantizes the KV cache",
    text="""The cache's dtype follows the file that an engine happens to read, so that two
    engines, or two versions of one, would serve the same checkpoint with different caches.""",
)
def config_kv_disagrees(context: Context) -> Iterator[Spot]:
    config, file = context.in_config, context.in_file
    if config and file and (config.kv_algo is None) != (file.kv_algo is None):
        message = f"{'quantizes' if file.kv_algo else 'does not quantize'} the KV cache, "
        message += f"config.json {'does' if config.kv_algo else 'does not'}"
        yield Spot(file.file, file.where("kv_cache_quant_algo"), message)


def _is_kv_only(config: QuantConfig) -> bool:
    """Whether it quantizes the KV cache and no weight."""
    return config.algo is None and config.kv_algo is not None


@rule(
    "config-exclusions-disagree",
    severity="error",
    summary="config.json and hf_quant_config.json exclude different modules",
    text="""`ignore` of config.json and `exclude_modules` of hf_quant_config.json are the
    same list in two places. Where they differ, one of the engines that read them builds the
    wrong layers.""",
    evidence=("ModelOpt 0.47.0 export/convert_hf_config.py:188-282 writes one from the other",),
)
def config_exclusions_disagree(context: Context) -> Iterator[Spot]:
    config, file = context.in_config, context.in_file
    if not config or not file or set(config.exclude) == set(file.exclude):
        return
    only_config = sorted(set(config.exclude) - set(file.exclude))
    only_file = sorted(set(file.exclude) - set(config.exclude))
    parts = [
        f"{label}: {some(names)}"
        for label, names in (("only here", only_file), ("only in config.json", only_config))
        if names
    ]
    yield Spot(file.file, file.where(file.exclude_key), "; ".join(parts))


@rule(
    "config-incomplete",
    severity="warning",
    summary="one of config.json's quantization_config and hf_quant_config.json is missing",
    text="""ModelOpt writes both. vLLM and Transformers read the first, TensorRT-LLM the
    second; a checkpoint with one of them is quantized for some readers and plain for others.""",
)
def config_incomplete(context: Context) -> Iterator[Spot]:
    if context.in_config is None and context.in_file is not None:
        message = f"missing, only {HF_QUANT_CONFIG} says how the model is quantized"
        yield Spot(context.config_file, "$.quantization_config", message)
    elif context.in_file is None and context.in_config is not None:
        message = "missing, only config.json says how the model is quantized"
        yield Spot(str(context.path / HF_QUANT_CONFIG), "", message)


@rule(
    "config-malformed",
    severity="error",
    summary="a quantization config is not what ModelOpt writes and engines read",
    text="""hf_quant_config.json and config.json's quantization_config are checked against
    strict models: unknown keys, wrong types, unknown names. An engine ignores a key that it
    does not know, and goes on with a default. `qschema check` says the same for the files
    alone.""",
    effects={"vllm": "unknown"},
    evidence=("ModelOpt 0.47.0 export/quant_utils.py:683-795, export/convert_hf_config.py:24-282",),
)
def config_malformed(context: Context) -> Iterator[Spot]:
    documents: list[tuple[type[Strict], Mapping[str, Json], str]] = [
        (ModelConfig, context.checkpoint.config, context.config_file)
    ]
    if context.in_file is not None:
        documents.append((HfQuantConfig, context.in_file.raw, context.in_file.file))
    for model, raw, file in documents:
        try:
            model.parse(dict(raw), file=file)
        except DocumentError as error:
            for finding in error.findings:
                # has a rule of its own here
                if finding.rule != "quant-method-missing":
                    yield Spot(file, finding.where, f"{finding.message} ({finding.rule})")
