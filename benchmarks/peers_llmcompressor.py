"""Quantize a checkpoint with llm-compressor, without calibration and without a model definition.

    python benchmarks/peers_llmcompressor.py SOURCE OUT SCHEME [--workers N]

`model_free_ptq` is llm-compressor's own way for schemes that need no data: it reads the safetensors
files, not a model. peers.py runs this with the interpreter that has llm-compressor installed. The
last line printed is JSON: version, seconds of the call alone, and what was called.
"""

import argparse
import json
import time
from importlib.metadata import version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("scheme", help="a preset of compressed-tensors, such as FP8_BLOCK")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    from llmcompressor import model_free_ptq

    start = time.perf_counter()
    model_free_ptq(
        args.source,
        args.out,
        scheme=args.scheme,
        # what qconvert leaves as it is, too
        ignore=["re:.*embed_tokens$", "lm_head"],
        max_workers=args.workers,
        device="cpu",
    )
    print()
    print(
        json.dumps(
            {
                "version": version("llmcompressor"),
                "work_s": round(time.perf_counter() - start, 3),
                "call": f"model_free_ptq {args.scheme}, max_workers {args.workers}",
            }
        )
    )


if __name__ == "__main__":
    main()
