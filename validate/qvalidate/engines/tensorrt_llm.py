"""TensorRT-LLM on its PyTorch backend. Written from its source and never run with it.

In one process (TLLM_WORKER_USE_SINGLE_PROCESS) an error keeps its traceback, and MPI starts
nothing.
"""

import re

from qvalidate.engines.adapter import RunnerEngine

ENGINE = RunnerEngine(
    name="tensorrt-llm",
    module="tensorrt_llm",
    install="pip install tensorrt-llm (needs an NVIDIA GPU)",
    runner="runner_tensorrt_llm.py",
    defaults={
        "TLLM_WORKER_USE_SINGLE_PROCESS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRTLLM_NO_USAGE_STATS": "1",
    },
    no_kernel=re.compile(
        r"(?:requires?|supports?|supported on) SM ?\d+"
        r"|not supported (?:on|for|with) (?:SM|sm_?|GPU|this (?:GPU|hardware|architecture))"
        r"|[Uu]nsupported (?:SM|GPU|CUDA architecture)"
        r"|no kernel image is available"
        r"|Torch not compiled with CUDA enabled"
        r"|No CUDA GPUs are available|No GPU devices found"
    ),
)
