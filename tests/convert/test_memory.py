"""Memory is bounded by the budget, whatever the size of the model, the shard or the tensor."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from qschema.safetensors import Entry, layout

BUDGET = 256 << 20
# Python and imports, as the promise has it
BESIDE = 700 << 20
ROWS, COLUMNS = 65536, 65536


def sparse_checkpoint(path: Path) -> Path:
    """Return a checkpoint of one 8 GiB tensor of zeros that takes no space."""
    path.mkdir()
    name = "model.layers.0.mlp.down_proj.weight"
    opening, _ = layout([Entry(name, "BF16", (ROWS, COLUMNS))], metadata={"format": "pt"})
    with open(path / "model.safetensors", "wb") as file:
        file.write(opening)
        file.truncate(len(opening) + 2 * ROWS * COLUMNS)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def test_an_8_gib_tensor_within_256_mib(tmp_path: Path) -> None:
    """In two passes: the format has a scale of the whole weight."""
    source, output = sparse_checkpoint(tmp_path / "in"), tmp_path / "out"
    arguments = [str(source), str(output), "--algo", "W4A16_NVFP4", "--memory-budget", "256MiB"]
    try:
        subprocess.run(
            [sys.executable, "-m", "qconvert", *arguments, "--timings", str(tmp_path / "t.json")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
            capture_output=True,
        )
        written = sum(path.stat().st_size for path in output.iterdir())
    finally:
        shutil.rmtree(output, ignore_errors=True)

    timings = json.loads((tmp_path / "t.json").read_text())
    assert timings["peak_rss_nbytes"] <= BUDGET + BESIDE
    # the report says of the process what it is
    assert timings["peak_rss_nbytes"] > 16 << 20
    assert written > ROWS * COLUMNS // 2
