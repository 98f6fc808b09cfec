"""A real vLLM judges the fixtures. On a GPU both formats pass; its CPU build has kernels for one.

    QVALIDATE_VLLM_PYTHON=vllm-env/bin/python pytest -m engine_vllm

Two starts of the engine per comparison, 10 s each on two cores.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvalidate.engines import EngineOutcome, EngineRequest, get
from qvalidate.engines.serve import ServeRequest, serve_check

PYTHON = os.environ.get("QVALIDATE_VLLM_PYTHON")
FIXTURES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
Tensors = dict[str, torch.Tensor]
Quantize = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

pytestmark = [
    pytest.mark.engine_vllm,
    pytest.mark.skipif(PYTHON is None, reason="needs $QVALIDATE_VLLM_PYTHON"),
]


def per_channel(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale_N = w_NK.abs().amax(1) / 448
    scale_N[scale_N == 0] = 1
    return (w_NK / scale_N[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale_N


def per_block(w_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both dimensions are multiples of 128."""
    num_n, num_k = w_NK.shape
    blocks = w_NK.view(num_n // 128, 128, num_k // 128, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    scale[scale == 0] = 1
    codes = (blocks / scale).clamp(-448, 448).view(num_n, num_k)
    return codes.to(torch.float8_e4m3fn), scale


FORMATS: dict[str, Quantize] = {
    "FP8_PER_CHANNEL_PER_TOKEN": per_channel,
    "FP8_PB_WO": per_block,
}


def quantized(source: Path, target: Path, algo: str) -> Path:
    """Writes `source` with every Linear but lm_head and routers in the format; returns `target`."""
    target.mkdir()
    tensors: Tensors = {}
    ignore = ["lm_head", "model.embed_tokens"]
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            is_linear = tensor.ndim == 2 and name.startswith("model.layers.")
            if name.endswith(".gate.weight"):
                ignore.append(name.removesuffix(".weight"))
            elif is_linear:
                tensors[name], tensors[f"{name}_scale"] = FORMATS[algo](tensor.float())
                continue
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "ignore": ignore,
        "quant_algo": algo,
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }
    (target / "config.json").write_text(json.dumps(config))
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    return target


def changed(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(candidate: Path, reference: Path) -> EngineOutcome:
    request = EngineRequest(
        checkpoint=candidate, reference=reference, python=PYTHON, level="compare"
    )
    outcome = get("vllm").run(request)
    print(outcome.model_dump_json(exclude={"prompts", "tokens", "texts"}))
    return outcome


@pytest.mark.parametrize("model", ["llama", "qwen3", "llama_odd"])
def test_per_channel_passes(tmp_path: Path, model: str) -> None:
    source = FIXTURES / model

    outcome = run(quantized(source, tmp_path / "out", "FP8_PER_CHANNEL_PER_TOKEN"), source)

    assert (outcome.verdict, outcome.findings) == ("passed", [])
    assert outcome.comparison is not None
    # well inside the limits, so that a slow drift shows
    assert outcome.comparison.relative_error < 0.2
    assert outcome.comparison.top1_agreement > 0.75
    assert outcome.comparison.kl_mean < 0.15
    assert [len(ids) for ids in outcome.tokens] == [8] * len(outcome.prompts)
    assert outcome.texts is not None


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_blocks_pass_or_have_no_kernel_here(tmp_path: Path, model: str) -> None:
    source = FIXTURES / model

    outcome = run(quantized(source, tmp_path / "out", "FP8_PB_WO"), source)

    rules = [finding.rule for finding in outcome.findings]
    if (outcome.device or "").startswith("CPU"):
        assert (outcome.verdict, rules) == ("no-kernel", ["engine-no-kernel"])
        assert "Failed to find a kernel that can implement" in outcome.message
    else:
        assert (outcome.verdict, rules) == ("passed", [])


def test_mixtral_experts_are_refused_with_the_reason(tmp_path: Path) -> None:
    source = FIXTURES / "mixtral"

    outcome = run(quantized(source, tmp_path / "out", "FP8_PER_CHANNEL_PER_TOKEN"), source)

    assert (outcome.verdict, outcome.reached) == ("failed", None)
    assert [finding.rule for finding in outcome.findings] == ["engine-refused"]
    assert "shape '[]' is invalid for input of size 128" in outcome.message
    assert ".experts.0.w1.weight_scale" in outcome.findings[0].where


def test_scales_of_one_projection_times_8_fail_the_comparison(tmp_path: Path) -> None:
    source = FIXTURES / "llama"
    faulty = quantized(source, tmp_path / "out", "FP8_PER_CHANNEL_PER_TOKEN")
    changed(faulty, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight_scale"].mul_(8))

    outcome = run(faulty, source)

    rules = [finding.rule for finding in outcome.findings]
    assert (outcome.verdict, outcome.reached) == ("failed", "compare")
    assert rules == ["compare-kl", "compare-top1", "compare-relative-error"]


def test_scale_of_the_wrong_rank_is_refused_by_name(tmp_path: Path) -> None:
    source = FIXTURES / "llama"
    name = "model.layers.0.self_attn.o_proj.weight_scale"
    faulty = quantized(source, tmp_path / "out", "FP8_PER_CHANNEL_PER_TOKEN")
    changed(faulty, lambda tensors: tensors.update({name: tensors[name][:, None].contiguous()}))

    outcome = run(faulty, source)

    assert outcome.verdict == "failed"
    assert [(f.rule, f.where) for f in outcome.findings] == [("engine-refused", name)]
    assert "[256, 1] into [256]" in outcome.message


def test_served_checkpoint_completes_and_chats(tmp_path: Path) -> None:
    source = FIXTURES / "llama"
    served = quantized(source, tmp_path / "out", "FP8_PER_CHANNEL_PER_TOKEN")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, served / name)

    outcome = serve_check(ServeRequest(engine="vllm", checkpoint=served, python=PYTHON))

    print(outcome.model_dump_json())
    assert (outcome.verdict, outcome.findings, outcome.chat_skipped) == ("passed", [], "")
    assert outcome.completion
    assert outcome.chat
