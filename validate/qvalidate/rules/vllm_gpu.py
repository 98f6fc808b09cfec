"""What vLLM does on the kind of GPU that `--gpu` names, and what hangs on it where none is."""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.vllm_support import SUPPORT, VERSIONS, Support

# the GPUs from the first on, and before the second, on which FlashInfer is taken by itself
_HAS_NVFP4_CACHE, _CONSUMER = 100, 120


@rule(
    "vllm-gpu-too-old",
    severity="error",
    summary="vLLM needs a newer GPU for this format",
    text="""Each of vLLM's quantization methods names the oldest compute capability that it runs
    on, and vLLM refuses to start below it: "The quantization method modelopt is not supported for
    the current GPU. Minimum capability: 80".""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 layers/quantization/modelopt.py:449, :772, :1231, :1647 get_min_capability; "
        "config/vllm.py:926-936",
    ),
)
def vllm_gpu_too_old(context: Context) -> Iterator[Spot]:
    gpu, support = context.deployment.gpu, _support(context)
    if gpu is not None and support is not None and gpu < support.oldest_gpu:
        message = f"vLLM's {support.method} needs sm_{support.oldest_gpu}, --gpu is sm_{gpu}"
        yield Spot(context.config_file, "$.quantization_config.quant_algo", message)


@rule(
    "vllm-gpu-fallback",
    severity="note",
    summary="on this GPU vLLM multiplies in 16 bits what the format means to multiply in fewer",
    text="""Where a GPU has no instructions for the format, vLLM takes its Marlin kernels: the
    weights are expanded, the inputs are not quantized. That costs speed, not accuracy, and hides a
    wrong input_scale: it is not used there, and a newer GPU will use it.""",
    engine="vllm",
    versions=VERSIONS,
    evidence=(
        "vLLM 0.33.0 model_executor/kernels/linear/__init__.py: the order of _POSSIBLE_*_KERNELS",
        "run on an H200 with vLLM 0.33.0: NVFP4 and W4A16_NVFP4 of the same weights agree",
    ),
)
def vllm_gpu_fallback(context: Context) -> Iterator[Spot]:
    gpu = context.deployment.gpu
    for declared in context.assignment.formats:
        support = SUPPORT.get(declared.name)
        if gpu is None or support is None or not support.oldest_gpu <= gpu < support.native_gpu:
            continue
        message = (
            f"on sm_{gpu} vLLM runs {declared.name} by Marlin, weights only; its own kernels need "
            f"sm_{support.native_gpu}"
        )
        yield Spot(context.config_file, "$.quantization_config.quant_algo", message)


@rule(
    "vllm-kv-backend",
    severity="error",
    summary="an NVFP4 KV cache needs one of vLLM's attention backends, which may not be there",
    text="""vLLM reads kv_cache_quant_algo NVFP4 and caches so without being asked. Only FlashInfer
    can: another backend stops with "kv_cache_dtype not supported". On sm_100 and sm_103 it is the
    usual one, and nothing is said; on sm_80 to sm_90 and sm_120 it does so for heads other than 64
    wide, if it is installed and chosen. --kv-cache-dtype bfloat16 leaves the cache as it is.""",
    engine="vllm",
    versions=VERSIONS,
    effects={"vllm": "unknown"},
    evidence=(
        "vLLM 0.32.0 v1/attention/backends/flashinfer.py:528-562, utils/torch_utils.py:457-509",
        "run on an H200 with vLLM 0.33.0 and TRITON_ATTN: 'kv_cache_dtype not supported'",
    ),
)
def vllm_kv_backend(context: Context) -> Iterator[Spot]:
    obeyed, gpu = context.obeyed, context.deployment.gpu
    is_usual = gpu is not None and _HAS_NVFP4_CACHE <= gpu < _CONSUMER
    if obeyed is None or (obeyed.kv_algo or "").upper() != "NVFP4" or is_usual:
        return
    where = "kv_cache_quant_algo" if "kv_cache_quant_algo" in obeyed.body else "kv_cache_scheme"
    yield Spot(obeyed.file, obeyed.where(where), "NVFP4; in vLLM only FlashInfer has such a cache")


def _support(context: Context) -> Support | None:
    algo = context.obeyed.algo if context.obeyed else None
    return SUPPORT.get(algo.upper()) if algo else None
