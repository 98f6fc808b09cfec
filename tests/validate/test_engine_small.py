"""From a source to a verdict with a real vLLM on a CPU, as CI does it: the commands themselves.

    QVALIDATE_VLLM_PYTHON=vllm-env/bin/python pytest tests/validate/test_engine_small.py

Three or four starts of the engine for each checkpoint, about 10 s each on two cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qvalidate.result import EngineReport, Result

PYTHON = os.environ.get("QVALIDATE_VLLM_PYTHON")
FIXTURES = Path(__file__).parents[2] / "fixtures"
Q_PROJ = "model.layers.0.self_attn.q_proj"

pytestmark = [
    pytest.mark.engine_vllm,
    pytest.mark.skipif(PYTHON is None, reason="needs $QVALIDATE_VLLM_PYTHON"),
]


def convert(model: str, algo: str, out_dir: Path) -> Path:
    code = "from qconvert.cli import main; main()"
    argv = [str(FIXTURES / "checkpoints" / model), str(out_dir), "--algo", algo, "-q"]
    argv += ["--amax", str(FIXTURES / "amax" / f"{model}.json")]
    subprocess.run([sys.executable, "-c", code, *argv], check=True)
    return out_dir


def validate(path: Path, model: str) -> tuple[int, EngineReport]:
    code = "from qvalidate.cli import main; main()"
    argv = [str(path), "--engine", "vllm", "--python", str(PYTHON), "--format", "json"]
    argv += ["--reference", str(FIXTURES / "checkpoints" / model)]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    result = Result.parse(json.loads(done.stdout), file="-")
    (report,) = result.engines
    print(done.stderr, report.model_dump_json(exclude={"observed": {"prompts", "tokens"}}))
    return done.returncode, report


@pytest.mark.parametrize(
    ("model", "algo", "kernels"),
    [
        ("llama", "FP8_PER_CHANNEL_PER_TOKEN", []),
        ("llama", "FP8_PB_WO", ["fp8-block-linear"]),
        ("qwen3", "NVFP4", ["nvfp4-linear"]),
        ("mixtral", "MXFP8", ["mxfp8-experts", "mxfp8-linear"]),
    ],
)
def test_a_conversion_passes_every_level(
    tmp_path: Path, model: str, algo: str, kernels: list[str]
) -> None:
    status, report = validate(convert(model, algo, tmp_path / "out"), model)

    assert status == 0
    assert report.dry is not None
    assert report.dry.verdict == "passed"
    assert report.observed is not None
    assert (report.observed.reached, sorted(report.observed.kernels)) == ("compare", kernels)
    assert report.agreement == "confirmed"


def test_a_refusal_is_predicted(tmp_path: Path) -> None:
    status, report = validate(convert("mixtral", "FP8_PB_WO", tmp_path / "out"), "mixtral")

    assert (status, report.predicted, report.verdict) == (1, "refuses", "refuses")
    assert report.agreement == "confirmed"


def test_scales_times_eight_do_not_pass(tmp_path: Path) -> None:
    """Headers and scales look right: the weights against the source's say it, and the engine."""
    import numpy as np

    from qschema.checkpoint import open_checkpoint

    path = convert("llama", "FP8_PB_WO", tmp_path / "out")
    stored = open_checkpoint(path).tensors[f"{Q_PROJ}.weight_scale"]
    view = np.memmap(stored.file, "<f4", "r+", stored.offset, (stored.nbytes // 4,))
    view *= 8
    view.flush()
    status, report = validate(path, "llama")

    assert (status, report.predicted, report.verdict) == (1, "loads-but-wrong", "loads-but-wrong")
    assert report.agreement == "confirmed"
