"""Where TensorRT-LLM reads how a checkpoint is quantized, and which names it takes there.

hf_quant_config.json goes before config.json. 1.2 reads its nested form only, and takes no other
ModelOpt config; 1.3 reads the flat form too, in either file.
"""

from collections.abc import Iterator

from qvalidate.assignment import declared_as
from qvalidate.context import Context
from qvalidate.documents import HF_QUANT_CONFIG, MIXED, QuantConfig
from qvalidate.rules.registry import Spot, rule, some
from qvalidate.rules.trtllm_matching import layers
from qvalidate.rules.trtllm_support import (
    BOTH,
    ENGINE,
    KV_ALGOS,
    MEMBERS_12,
    MEMBERS_13,
    OTHER_METHODS,
    REWRITTEN,
    UNPROVEN_12,
    V12,
    V13,
    WITH_LINEAR,
    is_packed,
)

_READER = "documented: _torch/model_config.py:ModelConfig.from_pretrained"
_NEW_READER = "documented: quantization/modelopt_config.py:read_modelopt_quant_config (1.3)"
_ENUM = "documented: quantization/mode.py:QuantAlgo"
_ASSERT = "documented: quantization/mode.py:QuantMode.from_quant_algo"
_LAYER_FILE = "quant_cfg.json"
_AWQ = frozenset({"W4A16_AWQ", "W4A8_AWQ"})


def obeyed_config(context: Context) -> QuantConfig | None:
    """Return the config that TensorRT-LLM follows: hf_quant_config.json goes first."""
    return context.in_file or context.in_config


@rule(
    "trtllm-no-file",
    severity="error",
    summary="without hf_quant_config.json, TensorRT-LLM 1.2 builds the model unquantized",
    text="""1.2 looks for hf_quant_config.json. Of config.json's quantization_config it knows
    quant_method "fp8" and "mxfp4" only, and takes a ModelOpt checkpoint for a plain one, without a
    message. Codes of one byte for each element are then cast to numbers, without a scale. Write
    both files, as ModelOpt does.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "wrong"},
    evidence=(f"{_READER}, load_hf_quant_config (1.2)",),
)
def trtllm_no_file(context: Context) -> Iterator[Spot]:
    if not _is_packed(context):
        yield from _without_file(context)


@rule(
    "trtllm-no-file-packed",
    severity="error",
    summary="without hf_quant_config.json, 1.2 builds plain layers, which packed codes do not fit",
    text="""The same as trtllm-no-file, where two codes share a byte: a plain layer has twice the
    columns (AWQ: rows), and copying the codes into it stops with an error about their sizes.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "refuses"},
    evidence=(
        f"{_READER}, load_hf_quant_config (1.2)",
        "documented: _torch/modules/linear.py:copy_weight",
    ),
)
def trtllm_no_file_packed(context: Context) -> Iterator[Spot]:
    if _is_packed(context):
        yield from _without_file(context)


def _without_file(context: Context) -> Iterator[Spot]:
    if context.in_file is not None or not context.quantized:
        return
    if context.in_config is None or context.in_config.method not in ("fp8", "mxfp4"):
        message = f"missing; 1.2 builds {len(context.quantized)} quantized modules as plain ones"
        yield Spot(str(context.path / HF_QUANT_CONFIG), "", message)


def _is_packed(context: Context) -> bool:
    return any(map(is_packed, context.quantized.values()))


@rule(
    "trtllm-flat-file",
    severity="error",
    summary="hf_quant_config.json has the flat form, which TensorRT-LLM 1.2 can't read",
    text="""1.2 takes the object `quantization` out of the file, and stops with KeyError where the
    keys stand at the top. The flat form belongs into config.json.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "refuses"},
    evidence=(f"{_READER} (1.2)",),
)
def trtllm_flat_file(context: Context) -> Iterator[Spot]:
    file = context.in_file
    if file is not None and not file.is_nested:
        yield Spot(file.file, "$.quantization", "missing; 1.2 stops with KeyError: 'quantization'")


@rule(
    "trtllm-unrecognised",
    severity="error",
    summary="TensorRT-LLM 1.3 does not recognise the quantization config as ModelOpt's",
    text="""1.3 takes a config for ModelOpt's if its quant_method begins with "modelopt", in any
    case, or its producer's name is "modelopt", and the nested form in any case. It stops at every
    other one, but for the methods fp8, mxfp4, mxfp8, nvfp4 and compressed-tensors in
    config.json.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "refuses"},
    evidence=(_NEW_READER,),
)
def trtllm_unrecognised(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    if config is None or config.is_nested or _is_modelopts(config):
        return
    if config is context.in_file or config.method not in OTHER_METHODS:
        message = f"found {config.method!r}, and no producer called modelopt"
        yield Spot(config.file, config.where("quant_method"), message)


def _is_modelopts(config: QuantConfig) -> bool:
    producer = config.raw.get("producer")
    name = producer.get("name") if isinstance(producer, dict) else None
    return name == "modelopt" or (config.method or "").lower().startswith("modelopt")


@rule(
    "trtllm-algo-unsupported",
    severity="error",
    summary="TensorRT-LLM has no algorithm of that name, in that case",
    text="""quant_algo is the name of a member of an enum, in upper case. One text in lower case is
    rewritten before: "fp8_pb_wo", which ModelOpt writes, and that spelling only; "FP8_PB_WO" is
    no member. 1.3 stops with a ValueError, 1.2 later with an assertion.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(_ENUM, _ASSERT, f"{_READER}: fp8_pb_wo -> FP8_BLOCK_SCALES"),
)
def trtllm_algo_unsupported(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    if config is not None and config.algo not in (None, REWRITTEN, *MEMBERS_13):
        near = (config.algo or "").upper()
        hint = REWRITTEN if near == REWRITTEN.upper() else near if near in MEMBERS_13 else ""
        message = f"{config.algo!r} is no QuantAlgo" + (f"; it is spelt {hint!r}" if hint else "")
        yield Spot(config.file, config.where("quant_algo"), message)


@rule(
    "trtllm-algo-newer",
    severity="error",
    summary="TensorRT-LLM 1.2 does not have the algorithm yet",
    text="""W4A16_NVFP4, MXFP8 and NVFP4_ARC came with 1.3. In 1.2 the name is no member of the
    enum, and the assertion about it fails.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "refuses"},
    evidence=(f"{_ENUM} (1.2: 24 members, 1.3: 28)", _ASSERT),
)
def trtllm_algo_newer(context: Context) -> Iterator[Spot]:
    yield from _newer(context, MEMBERS_13 - MEMBERS_12 - UNPROVEN_12)


@rule(
    "trtllm-algo-unproven",
    severity="error",
    summary="whether TensorRT-LLM 1.2 has the algorithm is not known",
    text="""ModelOpt's guide to deployment lists NVFP4_AWQ for 1.2, and the kernels of that time
    know it, but the enum that was read has the name in 1.3 only.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "unknown"},
    evidence=(_ENUM, "documented: Model-Optimizer docs/source/deployment/3_unified_hf.rst"),
)
def trtllm_algo_unproven(context: Context) -> Iterator[Spot]:
    yield from _newer(context, UNPROVEN_12)


def _newer(context: Context, names: frozenset[str]) -> Iterator[Spot]:
    config = obeyed_config(context)
    if config is not None and config.algo in names:
        message = f"{config.algo} is read by 1.3; in 1.2's QuantAlgo it was not found"
        yield Spot(config.file, config.where("quant_algo"), message)


@rule(
    "trtllm-algo-missing",
    severity="error",
    summary="TensorRT-LLM 1.3 wants a quant_algo",
    text="""With quant_algo null and no quantized_layers 1.3 stops: "Pre-quantized checkpoint must
    have quant_algo". So it takes no checkpoint of which only the KV cache is quantized.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "refuses"},
    evidence=("documented: llmapi/llm_utils.py:ModelLoader._update_from_hf_quant_config (1.3)",),
)
def trtllm_algo_missing(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    if config is not None and config.algo is None and not config.layers:
        yield Spot(config.file, config.where("quant_algo"), "null; 1.3 wants one")


@rule(
    "trtllm-no-method",
    severity="error",
    summary="TensorRT-LLM knows the algorithm, but has no Linear for it in the PyTorch backend",
    text="""The enum also has what only the former TensorRT backend could run: SmoothQuant, GPTQ,
    QServe. The PyTorch backend stops at the first Linear: "unsupported quant mode".""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=("documented: _torch/modules/linear.py:get_quant_method",),
)
def trtllm_no_method(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    found = layers(context.quantized).values()
    if config is None or all(layer.kind == "experts" for layer in found):
        return
    without = MEMBERS_13 - WITH_LINEAR - {MIXED, "NO_QUANT"}
    for where, algo, _ in config.entries:
        if algo in without:
            yield Spot(config.file, f"{where}.quant_algo", f"no Linear for {algo}")


@rule(
    "trtllm-kv-algo",
    severity="error",
    summary="TensorRT-LLM has no KV cache of that kind",
    text="""kv_cache_quant_algo is null, FP8, INT8 or NVFP4, in upper case. An assertion fails at
    every other name, NVFP4_AFFINE among them. The flat form's kv_cache_scheme is not checked: what
    1.3 can't map is left out with a warning, and the cache is not quantized.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(f"{_ASSERT}: KV_CACHE_QUANT_ALGO_LIST",),
)
def trtllm_kv_algo(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    found = config.body.get("kv_cache_quant_algo") if config else None
    if config is not None and found is not None and found not in KV_ALGOS:
        message = f"found {found!r}, expected null, FP8, INT8 or NVFP4"
        yield Spot(config.file, config.where("kv_cache_quant_algo"), message)


@rule(
    "trtllm-group-size",
    severity="error",
    summary="AWQ without its group_size, or with another one, for TensorRT-LLM",
    text="""Of a config without group_size TensorRT-LLM makes None, not a default, and divides the
    columns by it. The scales of another number of columns than the config's do not fit the
    parameters that are made for them. Of other formats the group is part of the method.""",
    engine=ENGINE,
    versions=BOTH,
    effects={ENGINE: "refuses"},
    evidence=(_READER, "documented: _torch/modules/linear.py:W4A16_AWQ_LinearMethod"),
)
def trtllm_group_size(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    for where, algo, entry in config.entries if config else ():
        declared = declared_as(algo)
        if declared is None or declared.name not in _AWQ or config is None:
            continue
        wanted, found = declared.hf_quant_fields["group_size"], entry.get("group_size")
        if found != wanted:
            message = f"found {found!r}, the scales are of {wanted} columns"
            yield Spot(config.file, f"{where}.group_size", message)


@rule(
    "trtllm-mixed-file",
    severity="error",
    summary="TensorRT-LLM 1.2 can't read a mixed checkpoint as ModelOpt writes it",
    text="""1.2 takes the formats of the layers out of a second file, quant_cfg.json, which it
    opens without asking whether it is there, and its model of hf_quant_config.json has no
    quantized_layers. ModelOpt writes that file for the former TensorRT backend only.""",
    engine=ENGINE,
    versions=V12,
    effects={ENGINE: "refuses"},
    evidence=(f"{_READER} (1.2): quant_cfg.json", "documented: Model-Optimizer issue 1079"),
)
def trtllm_mixed_file(context: Context) -> Iterator[Spot]:
    config = context.in_file
    if config is None or not config.is_mixed:
        return
    if "quantized_layers" in config.body:
        message = "1.2 knows no such key; it wants the list in quant_cfg.json"
        yield Spot(config.file, config.where("quantized_layers"), message)
    if _LAYER_FILE not in context.checkpoint.files:
        yield Spot(str(context.path / _LAYER_FILE), "", "missing; 1.2 opens it for a mixed model")


@rule(
    "trtllm-layer-algo",
    severity="error",
    summary="quantized_layers names an algorithm that TensorRT-LLM does not have, in that case",
    text="""In quantized_layers each quant_algo has to be a member of the enum as it stands. Also
    "fp8_pb_wo" is none: it is rewritten at the top level only, so that no mixed checkpoint can
    have a layer in that format.""",
    engine=ENGINE,
    versions=V13,
    effects={ENGINE: "refuses"},
    evidence=(f"{_READER} (1.3): QuantAlgo(...) for each layer", _ENUM),
)
def trtllm_layer_algo(context: Context) -> Iterator[Spot]:
    config = obeyed_config(context)
    listed = config.layers if config else {}
    unknown = [name for name, algo in listed.items() if algo not in MEMBERS_13]
    if unknown and config is not None:
        algos = some(sorted({listed[name] for name in unknown}))
        where = f"{config.where('quantized_layers')}.{unknown[0]}"
        message = f"no QuantAlgo is called {algos}, in {len(unknown)} entries: {some(unknown)}"
        yield Spot(config.file, where, message)
