"""Quantize a checkpoint with NVIDIA ModelOpt, with as little calibration as its format allows.

    python benchmarks/peers_modelopt.py SOURCE OUT CONFIG

Loads the model with transformers on the CPU, calls `mtq.quantize` with the configuration of that
name (FP8_DEFAULT_CFG, W4A16_NVFP4_CFG, ...) and `export_hf_checkpoint`. Where ModelOpt says that a
configuration needs calibration, that is one batch of 8 tokens. peers.py runs this with the
interpreter that has ModelOpt installed. The last line printed is JSON: version, seconds without
imports, and what was called.
"""

import argparse
import json
import time
from importlib.metadata import version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("config", help="a name in modelopt.torch.quantization")
    args = parser.parse_args()
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.config import need_calibration
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    config = getattr(mtq, args.config)
    calibrate = need_calibration(config)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(args.source, dtype="auto").eval()
        loop = (lambda m: m(torch.arange(8)[None])) if calibrate else None
        model = mtq.quantize(model, config, forward_loop=loop)
        export_hf_checkpoint(model, export_dir=args.out)
    print()
    print(
        json.dumps(
            {
                "version": version("nvidia-modelopt"),
                "work_s": round(time.perf_counter() - start, 3),
                "call": f"mtq.quantize {args.config}, {8 if calibrate else 0} tokens",
            }
        )
    )


if __name__ == "__main__":
    main()
