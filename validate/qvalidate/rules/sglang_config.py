"""What SGLang refuses, or misses, by the config alone: names, forms, keys, dtype and GPU."""

from collections.abc import Iterator

from qschema.architectures import text_config
from qvalidate.context import LM_HEAD, Context
from qvalidate.rules import sglang_support as support
from qvalidate.rules.registry import Spot, rule, some
from qvalidate.rules.sglang_reading import Reading, read
from qvalidate.rules.sglang_support import BOTH, NEW, OLD, ONLY_NEW, ONLY_OLD


@rule(
    "sglang-config-unsupported",
    severity="error",
    summary="SGLang refuses the quant_algo, or the form of the config",
    text="""SGLang compares quant_algo exactly, capital letters included. It takes FP8, NVFP4,
    NVFP4_AWQ and MIXED_PRECISION (W4A16_NVFP4 and MXFP8 too, since 0.5.23), and stops at other
    names in config.json: "ModelOptFp8Config only supports ..." or "ModelOpt currently only supports
    ...". ModelOpt writes fp8_pb_wo in small letters, which no version takes. NVFP4 needs its
    group_size, 16, and in the nested form it must be there. A mixed checkpoint needs a kv_cache key
    beside quantized_layers, or hf_quant_config.json.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=(
        "SGLang 0.5.23 modelopt_quant.py:466-522, :1595-1702; configs/model_config.py:1838-1897",
        "run on an H200 with SGLang 0.5.17: fp8_pb_wo, INT4, INT8, W4A8",
    ),
)
def sglang_config_unsupported(context: Context) -> Iterator[Spot]:
    yield from _refusal(context, read(context, NEW))


@rule(
    "sglang-config-unsupported-0517",
    severity="error",
    summary="SGLang 0.5.17 refuses what 0.5.23 takes for something else",
    text="""0.5.17 has no method for W4A16_NVFP4 and MXFP8. It takes every name with "FP8" in it for
    static FP8, and stops with an AssertionError without a name at the first scale that is more than
    one number. It does not look into the nested form inside config.json.""",
    engine="sglang",
    versions=ONLY_OLD,
    effects={"sglang": "refuses"},
    evidence=(
        "SGLang 0.5.17 configs/model_config.py:1256-1279, modelopt_quant.py:469-474, :1349-1354",
        "run on an H200: FP8_PB_WO, FP8_PER_CHANNEL_PER_TOKEN, MXFP8, W4A16_NVFP4",
    ),
)
def sglang_config_unsupported_0517(context: Context) -> Iterator[Spot]:
    if not read(context, NEW).refusal:
        yield from _refusal(context, read(context, OLD))


def _refusal(context: Context, reading: Reading) -> Iterator[Spot]:
    if context.obeyed is not None and reading.refusal:
        yield Spot(context.obeyed.file, context.obeyed.where(reading.where), reading.refusal)


@rule(
    "sglang-quant-method",
    severity="error",
    summary='quant_method is neither missing nor "modelopt"',
    text="""SGLang reads quant_algo where quant_method is "modelopt" or missing. Any other value,
    "MODELOPT" included, names another of its methods or none, and what comes of it depends on that
    method.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "unknown"},
    evidence=("SGLang 0.5.23 configs/model_config.py:1727-1741",),
)
def sglang_quant_method(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is not None and not read(context, NEW).is_known:
        message = f'{obeyed.raw["quant_method"]!r}; SGLang reads quant_algo under "modelopt" only'
        yield Spot(obeyed.file, obeyed.where("quant_method"), message)


@rule(
    "sglang-nested-exclusions",
    severity="error",
    summary="SGLang loses the exclusions of the nested form inside config.json",
    text="""SGLang 0.5.23 unwraps the nested form to find quant_algo, and writes that above it. Its
    FP8 method then takes the object for the flat form and finds no `ignore` there: nothing is
    excluded, and what is unquantized is cast to E4M3 by value, without a message. Write the flat
    form.""",
    engine="sglang",
    versions=ONLY_NEW,
    effects={"sglang": "wrong"},
    evidence=(
        "SGLang 0.5.23 configs/model_config.py:116-121, :1732-1741; modelopt_quant.py:478-493",
        "SGLang 0.5.23, run with its own loader: lm_head cast to E4M3, its scales never loaded",
    ),
)
def sglang_nested_exclusions(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is None or obeyed is not context.in_config or not obeyed.is_nested:
        return
    lost = [
        name
        for name in context.unquantized
        if context.excluded_by(name) and not (name == LM_HEAD and context.is_tied)
    ]
    if read(context, NEW).method == support.FP8 and lost:
        message = f"is not read inside config.json's nested form: {some(lost)}"
        yield Spot(obeyed.file, obeyed.where(obeyed.exclude_key), message)


@rule(
    "sglang-ignore-key",
    severity="error",
    summary="the flat form lists its exclusions under a key that SGLang's method does not read",
    text="""In the flat form the key is `ignore`. The FP8 method reads no other. A list under
    `exclude_modules` excludes nothing: the unquantized weights are cast to E4M3 by value and
    multiplied with scales that were never loaded.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "wrong"},
    evidence=(
        "SGLang 0.5.23 modelopt_quant.py:478-493",
        "SGLang 0.5.23, run with its own loader: lm_head cast to E4M3, its scales never loaded",
    ),
)
def sglang_ignore_key(context: Context) -> Iterator[Spot]:
    if read(context, NEW).method == support.FP8:
        yield from _other_key(context)


@rule(
    "sglang-ignore-key-0517",
    severity="error",
    summary="the flat form lists its exclusions under a key that SGLang 0.5.17 does not read",
    text="""In the flat form the key is `ignore`. For NVFP4, SGLang 0.5.23 also looks for
    `exclude_modules`, 0.5.17 does not: it builds quantized layers for all, and stops at the shape
    of the first weight that is not packed.""",
    engine="sglang",
    versions=ONLY_OLD,
    effects={"sglang": "refuses"},
    evidence=("SGLang 0.5.17 modelopt_quant.py:1331; SGLang 0.5.23 modelopt_quant.py:1653-1656",),
)
def sglang_ignore_key_0517(context: Context) -> Iterator[Spot]:
    if read(context, OLD).method == support.FP4:
        yield from _other_key(context)


def _other_key(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    if obeyed is None or obeyed.is_nested or "ignore" in obeyed.raw:
        return
    if obeyed.exclude and any(context.excluded_by(name) for name in context.unquantized):
        yield Spot(obeyed.file, obeyed.where(obeyed.exclude_key), "SGLang reads `ignore` here")


@rule(
    "sglang-capability",
    severity="error",
    summary="the GPU is older than SGLang's method needs",
    text="""Each method has a least compute capability: FP8 sm_89, the NVFP4 family and mixed
    checkpoints sm_80, MXFP8 sm_100. Below it SGLang stops: "The quantization method ... is not
    supported for the current GPU. Minimum capability: ...". NVFP4 runs on sm_80 to sm_90 through
    Marlin, whose kernels are compiled at first use, which takes minutes.""",
    engine="sglang",
    versions=BOTH,
    effects={"sglang": "refuses"},
    evidence=(
        "SGLang 0.5.23 model_loader/loader.py:255-265; modelopt_quant.py:462, :846, :1549; "
        "fp8.py:329-339",
    ),
)
def sglang_capability(context: Context) -> Iterator[Spot]:
    method, gpu = read(context, NEW).method, context.deployment.gpu
    if method is None or gpu is None or context.obeyed is None:
        return
    least = support.MIN_CAPABILITY[method]
    if gpu < least:
        message = f"SGLang's {method} needs sm_{least}, the GPU is sm_{gpu}"
        yield Spot(context.obeyed.file, context.obeyed.where("quant_algo"), message)


@rule(
    "sglang-model-dtype",
    severity="note",
    summary="the model's dtype is one that SGLang's quantized layers do not run in",
    text="""With dtype "auto" SGLang turns float32 into float16 (bfloat16 for Gemma); with --dtype
    float32 it refuses: "torch.float32 is not supported for quantization method ...". Say bfloat16
    in config.json if that is what the model is: float16 overflows where bfloat16 does not.""",
    engine="sglang",
    versions=BOTH,
    evidence=(
        "SGLang 0.5.23 model_loader/loader.py:267-273, configs/model_config.py:2299-2320",
        "SGLang 0.5.17 configs/model_config.py:1664-1690",
    ),
)
def sglang_model_dtype(context: Context) -> Iterator[Spot]:
    if read(context, NEW).method is None:
        return
    whole = context.checkpoint.config
    for config in (whole, text_config(whole)):
        for key in ("dtype", "torch_dtype"):
            if config.get(key) == "float32":
                message = "float32 runs as float16 (Gemma: bfloat16); --dtype float32 is refused"
                yield Spot(context.config_file, f"$.{key}", message)
                return
