"""What others' documents say of support, as cells.

`python -m qvalidate.matrix.documented` puts them into the matrix, where they stand for no run of
ours.
"""

from collections.abc import Iterator

from qvalidate.matrix import ANY, Cell, read, write

_MODELOPT = "Model-Optimizer docs/source/deployment/3_unified_hf.rst @106686d7"
_TRTLLM = "TensorRT-LLM docs/source/features/quantization.md @09d4c79b"
# the oldest versions that ModelOpt's document states, in the order of its columns
_OLDEST = (("tensorrt-llm", ">=1.2.0"), ("vllm", ">=0.10.1"), ("sglang", ">=0.4.10"))
_ALL, _TRT, _TRT_VLLM, _VLLM, _VLLM_SGLANG = "tvs", "t", "tv", "v", "vs"
_WORDS = {
    "case": "a load-and-generate case of its release suite",
    "expected": "expected to work, no case of its suite",
}

# architecture, formats, engines by first letter, how the document knows
_MODELS: tuple[tuple[str, str, str, str], ...] = (
    ("llama (Llama 3.1, 3.3)", "FP8 NVFP4", _ALL, "case"),
    ("llama4 (Scout, Maverick)", "FP8", _ALL, "case"),
    ("llama4 (Scout)", "NVFP4", _ALL, "case"),
    ("llama4 (Maverick)", "NVFP4", _TRT, "expected"),
    ("nemotron-nas (Super 49B, Ultra 253B)", "FP8", _ALL, "case"),
    ("nemotron_h (Nemotron 3 Nano, Super)", "FP8 NVFP4", _ALL, "case"),
    ("nemotron_h (Nemotron 3 Ultra)", "NVFP4", _ALL, "case"),
    ("deepseek_v3 (R1, V3, V3.1)", "NVFP4", _ALL, "case"),
    ("deepseek_v3 (R1, V3)", "FP8", _ALL, "expected"),
    ("deepseek_v32", "NVFP4", _ALL, "case"),
    ("deepseek_v4 (Flash)", "NVFP4", _ALL, "case"),
    ("deepseek_v4 (Pro)", "NVFP4", _VLLM_SGLANG, "case"),
    ("qwen3 (8B, 14B)", "FP8 NVFP4", _ALL, "case"),
    ("qwen3 (32B)", "NVFP4", _ALL, "case"),
    ("qwen3_moe (235B-A22B)", "FP8 NVFP4", _ALL, "case"),
    ("qwen3_moe (30B-A3B, Coder 480B-A35B)", "NVFP4", _ALL, "case"),
    ("qwen3_next (80B-A3B)", "NVFP4", _ALL, "case"),
    ("qwen3_5_moe (397B-A17B)", "NVFP4", _ALL, "case"),
    ("qwen3_5_moe (122B-A10B, 3.6 35B-A3B)", "NVFP4", _VLLM, "case"),
    ("qwen2 (Qwen 2.5, QwQ-32B)", "FP8", _ALL, "expected"),
    ("qwen2 (Qwen 2.5, QwQ-32B)", "NVFP4", _TRT_VLLM, "expected"),
    ("gemma4 (31B)", "NVFP4", _ALL, "case"),
    ("gemma4 (26B-A4B)", "NVFP4", _VLLM, "case"),
    ("glm4_moe (4.7, 5, 5.2)", "NVFP4", _ALL, "case"),
    ("glm4_moe (5.1)", "NVFP4", _VLLM_SGLANG, "case"),
    ("kimi_k2 (K2-Thinking, K2.5)", "NVFP4", _ALL, "case"),
    ("kimi_k2 (K2.6)", "NVFP4", _VLLM, "case"),
    ("minimax (M2.5, M3)", "NVFP4", _ALL, "case"),
    ("mixtral (8x7B)", "FP8", _ALL, "expected"),
    ("mixtral (8x7B)", "NVFP4", _TRT, "expected"),
    ("qwen2_5_vl (7B)", "FP8 NVFP4", _ALL, "case"),
    ("qwen3_vl_moe (235B-A22B)", "NVFP4", _ALL, "case"),
)

# its tables: model x format, and GPU x format
_TRTLLM_MODELS: tuple[tuple[str, str], ...] = (
    ("deepseek_v3 (R1)", "NVFP4 FP8_PB_WO"),
    ("exaone", "FP8 W4A8_AWQ W4A16_AWQ"),
    ("gemma3", "FP8 W4A8_AWQ W4A16_AWQ"),
    ("llama (LLaMA)", "NVFP4 FP8 W4A16_AWQ"),
    ("llama (LLaMA-v2)", "NVFP4 FP8 W4A8_AWQ W4A16_AWQ"),
    ("llama (LLaMA 3)", "FP8_PER_CHANNEL_PER_TOKEN W4A8_AWQ"),
    ("llama4", "NVFP4 FP8"),
    ("mixtral", "NVFP4 FP8"),
    ("mistral", "FP8 W4A16_AWQ"),
    ("phi", "W4A8_AWQ"),
    ("qwen", "W4A8_AWQ W4A16_AWQ"),
    ("qwen2 (2, 2.5)", "NVFP4 FP8 W4A8_AWQ W4A16_AWQ"),
    ("qwen3", "NVFP4 FP8 W4A16_AWQ"),
    ("llava (LLaVA, VILA)", "FP8 W4A16_AWQ"),
)
_TRTLLM_GPUS: tuple[tuple[str, str], ...] = (
    ("sm_120", "NVFP4 FP8"),
    ("sm_100", "NVFP4 FP8 FP8_PB_WO"),
    ("sm_103", "NVFP4 FP8 FP8_PB_WO"),
    ("sm_90", "FP8 FP8_PB_WO FP8_PER_CHANNEL_PER_TOKEN W4A8_AWQ W4A16_AWQ"),
    ("sm_89", "FP8 W4A8_AWQ W4A16_AWQ"),
    ("sm_80", "W4A16_AWQ"),
)


def cells() -> Iterator[Cell]:
    """Yield a cell for every entry of the tables."""
    for architecture, formats, letters, how in _MODELS:
        for engine, version in _OLDEST:
            for name in formats.split() if engine[0] in letters else ():
                yield _cell(engine, version, name, architecture, ANY, f"{_MODELOPT}: {_WORDS[how]}")
    for architecture, formats in _TRTLLM_MODELS:
        for name in formats.split():
            yield _cell("tensorrt-llm", "1.2", name, architecture, ANY, _TRTLLM)
    for gpu, formats in _TRTLLM_GPUS:
        for name in formats.split():
            yield _cell("tensorrt-llm", "1.2", name, ANY, gpu, _TRTLLM)


def _cell(engine: str, version: str, name: str, architecture: str, gpu: str, source: str) -> Cell:
    return Cell(
        engine=engine,
        version=version,
        format=name,
        architecture=architecture,
        gpu=gpu,
        state="documented",
        source=source,
    )


if __name__ == "__main__":
    write(read().with_cells(cells()))
