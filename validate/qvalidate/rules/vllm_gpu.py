"""What vLLM does on the kind of GPU that `--gpu` names. Silent where none is named."""

from collections.abc import Iterator

from qvalidate.context import Context
from qvalidate.rules.registry import Spot, rule
from qvalidate.rules.vllm_support import SUPPORT, VERSIONS, Support


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


def _support(context: Context) -> Support | None:
    algo = context.obeyed.algo if context.obeyed else None
    return SUPPORT.get(algo.upper()) if algo else None
