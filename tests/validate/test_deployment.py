"""What the rules say of --tp, --ep, --pp and --gpu; without them they say nothing."""

from pathlib import Path

import pytest
from checkpoints import MIXED, draft, f32

from qvalidate.loader import load
from qvalidate.rules import run
from qvalidate.targets import Deployment, parse_targets

ALGO = "$.quantization_config.quant_algo"


def found(
    tmp_path: Path, model: str, algo: str, deployment: Deployment
) -> set[tuple[str, str, str]]:
    path = draft(model, algo).write(tmp_path / f"tp{deployment.tp}")
    findings = run(load(path, deployment), parse_targets("vllm"))
    return {(finding.rule, finding.where, finding.severity) for finding in findings}


def test_blocks_are_those_of_each_gpus_part(tmp_path: Path) -> None:
    """On two GPUs 384 columns are 192 on each, and 128 key rows are 64: no blocks of 128."""
    one = found(tmp_path, "llama", "FP8_PB_WO", Deployment())
    two = found(tmp_path, "llama", "FP8_PB_WO", Deployment(tp=2))
    layer = "model.layers.0"

    assert one == set()
    assert {where for rule, where, _ in two if rule == "vllm-columns" and layer in where} == {
        f"{layer}.mlp.down_proj.weight"
    }
    assert {where for rule, where, _ in two if rule == "vllm-fused-rows" and layer in where} == {
        f"{layer}.mlp.gate_proj.weight",
        f"{layer}.self_attn.k_proj.weight",
    }


def test_a_scale_that_marlin_cannot_hold_is_none_on_a_cpu_or_a_newer_gpu(tmp_path: Path) -> None:
    made = draft("llama", "NVFP4")
    for part in ("gate_proj", "up_proj"):
        name = f"model.layers.0.mlp.{part}.weight_scale_2"
        made.put(name, ("F32", (), f32(512.0)))
    path = made.write(tmp_path / "made")

    def rules(device: str | None) -> set[str]:
        context = load(path, Deployment.on(device))
        return {finding.rule for finding in run(context, parse_targets("vllm"))}

    assert "vllm-scale-overflow" in rules(None)
    assert "vllm-scale-overflow" in rules("sm_90")
    assert rules("cpu") == rules("sm_100") == set()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("algo", ["FP8", "MXFP8", "NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_no_alarm_where_it_can_be_divided(tmp_path: Path, algo: str, tp: int) -> None:
    assert found(tmp_path, "llama", algo, Deployment(tp=tp)) == set()


@pytest.mark.parametrize(
    ("algo", "gpu", "rule"),
    [
        ("FP8", 75, "vllm-gpu-too-old"),
        ("NVFP4", 70, "vllm-gpu-too-old"),
        ("FP8", 80, "vllm-gpu-fallback"),
        ("FP8", 90, None),
        ("NVFP4", 90, "vllm-gpu-fallback"),
        ("NVFP4", 100, None),
        ("W4A16_NVFP4", 90, None),
        ("MXFP8", 90, "vllm-gpu-fallback"),
        (MIXED, 90, "vllm-gpu-fallback"),
        ("FP8_PB_WO", None, None),
    ],
)
def test_gpus(tmp_path: Path, algo: str, gpu: int | None, rule: str | None) -> None:
    severity = "error" if rule == "vllm-gpu-too-old" else "note"
    expected = {(rule, ALGO, severity)} if rule else set()

    assert found(tmp_path, "llama", algo, Deployment(gpu=gpu)) == expected
