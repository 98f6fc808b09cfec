"""SGLang, 0.5.17 and 0.5.23, on a GPU; on a CPU only if the installation can do without one.

Both versions were run on a CPU with a bf16 model, and gave all log-probabilities of the prompts.
SGLang works in processes of its own: what the scheduler's process raises is brought back by the
runner. Attention is Triton's, which is in every installation. On sm_90 the kernels for NVFP4 are
most likely compiled at first use: 0.5.17 gave no answer in 240 s there.
"""

import re

from qvalidate.engines.adapter import RunnerEngine

ENGINE = RunnerEngine(
    name="sglang",
    module="sglang",
    install="pip install sglang",
    runner="runner_sglang.py",
    defaults={
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHDYNAMO_DISABLE": "1",
    },
    no_kernel=re.compile(
        r"is not supported for the current GPU"
        r"|require SM\d+|requires SM\d+|Blackwell and above"
        r"|no kernel image is available"
        r"|No module named '(?:sgl_kernel|flashinfer|deep_gemm)"
        r"|'_OpNamespace' '\w+' object has no attribute"
        r"|NameError: name '\w+' is not defined"
        r"|not implemented for 'Float8_"
        r"|Could not run '\S+' with arguments from the"
        r"|Torch not compiled with CUDA enabled"
    ),
)
