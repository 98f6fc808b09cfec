"""Convert the fixtures and run them in a real engine; keep what qvalidate said as evidence.

    python validate/evidence/collect.py OUT_DIR --python ENGINES_PYTHON [--device cpu] [-j 2]

For llama, qwen3 and mixtral in every format that vLLM is said to read, and mixed (FP8 attention,
NVFP4 elsewhere): convert, `qvalidate --engine vllm --reference`, keep the JSON as
OUT_DIR/<model>-<format>.json. Then llama with a scale of one projection times 8. OUT_DIR/run.json
keeps date, commit ($COMMIT, else git's) and command. Prints a table; exits 1 if prediction and
engine disagree anywhere, or if the run confirmed nothing at all.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from qschema.formats import formats
from qschema.safetensors import read_header
from qvalidate.result import Result

CHECKPOINTS = Path(__file__).parents[2] / "fixtures" / "checkpoints"
MODELS = ("llama", "qwen3", "mixtral")
DAMAGED = "model.layers.0.self_attn.q_proj"
MIXED = "mixed"
MIXED_RULES = [{"match": "*.self_attn.*", "algo": "FP8"}, {"match": "*", "algo": "NVFP4"}]


def cases() -> list[str]:
    """Return the formats that vLLM is said to read, and the mixed recipe."""
    read = [
        name
        for name, declared in formats().items()
        if any(reader.startswith("vLLM") for reader in declared.readers)
    ]
    return [*read, MIXED]


def convert(model: str, algo: str, out_dir: Path, device: str) -> None:
    """Make `out_dir` from the fixture `model`."""
    code = "from qconvert.cli import main; main()"
    argv = [str(CHECKPOINTS / model), str(out_dir), "--device", device, "-q"]
    argv += ["--amax", str(CHECKPOINTS.parent / "amax" / f"{model}.json")]
    if algo == MIXED:
        recipe = out_dir.with_suffix(".json")
        recipe.write_text(json.dumps({"rules": MIXED_RULES}))
        argv += ["--recipe", str(recipe)]
    else:
        argv += ["--algo", algo]
    subprocess.run([sys.executable, "-c", code, *argv], check=True)


def scale_by_eight(checkpoint: Path) -> None:
    """Multiply the scales of one projection by 8, in place: F32 ones, or E8M0 exponents."""
    import numpy as np

    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors = read_header(file).tensors
        for suffix in ("weight_scale", "weight_scale_2"):
            stored = tensors.get(f"{DAMAGED}.{suffix}")
            if stored is not None and stored.dtype in ("F32", "U8"):
                dtype = "<f4" if stored.dtype == "F32" else "u1"
                count = stored.nbytes // np.dtype(dtype).itemsize
                view = np.memmap(file, dtype, "r+", stored.offset, (count,))
                view[:] = view * 8 if stored.dtype == "F32" else view + 3
                view.flush()


def validate(case: str, model: str, *, work: Path, python: str, out_dir: Path) -> Result:
    """Run qvalidate on `work`/`case` and keep its JSON; paths in it are relative to `work`."""
    code = "from qvalidate.cli import main; main()"
    argv = [case, "--engine", "vllm", "--reference", f"source/{model}", "--format", "json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv, "--python", python],
        cwd=work,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{case}: qvalidate ended with {done.returncode}")
    (out_dir / f"{case}.json").write_text(done.stdout)
    return Result.parse(json.loads(done.stdout), file=case)


def row(case: str, result: Result) -> str:
    """Return one line of the table."""
    (engine,) = result.engines
    assert engine.observed is not None
    found = engine.observed.comparison
    numbers = (
        f"KL {found.kl_mean:.4f}  top-1 {found.top1_agreement:.2f}  rel {found.relative_error:.3f}"
        if found
        else engine.observed.message.splitlines()[-1][:90]
        if engine.observed.message
        else ""
    )
    rules = ", ".join(sorted({f.rule for f in result.findings if f.severity == "error"}))
    return (
        f"{case:<38} predicted {engine.predicted:<16} observed {engine.observed.verdict:<10} "
        f"{engine.agreement:<13} {numbers}  {rules}"
    )


def provenance(options: Sequence[str]) -> dict[str, str | None]:
    """Return when, from which commit and with which `options` this was run; no commit is None."""
    commit = os.environ.get("COMMIT")
    if not commit:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        try:
            done = subprocess.run([*git, "--abbrev=40"], capture_output=True, text=True, check=True)
            commit = done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            commit = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        # the paths of the machine say nothing
        "command": shlex.join(
            ["validate/evidence/collect.py", "OUT_DIR", "--python", "ENGINES_PYTHON", *options]
        ),
    }


def status(results: Sequence[Result]) -> int:
    """Return 1 if any run contradicts its prediction, or none confirms one."""
    agreements = [engine.agreement for result in results for engine in result.engines]
    return int("contradicted" in agreements or "confirmed" not in agreements)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--python", required=True, help="the engine's interpreter")
    parser.add_argument("--device", default="auto", help="for the conversion")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    options = ["--device", args.device, "--jobs", str(args.jobs)]
    (args.out_dir / "run.json").write_text(json.dumps(provenance(options), indent=2) + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        shutil.copytree(CHECKPOINTS, work / "source")
        todo = [(f"{model}-{algo.lower()}", model, algo) for model in MODELS for algo in cases()]
        for case, model, algo in todo:
            convert(model, algo, work / case, args.device)
        for algo in cases():
            case = f"llama-{algo.lower()}-scales_x8"
            shutil.copytree(work / f"llama-{algo.lower()}", work / case)
            scale_by_eight(work / case)
            todo.append((case, "llama", algo))

        def run(case: tuple[str, str, str]) -> Result:
            return validate(case[0], case[1], work=work, python=args.python, out_dir=args.out_dir)

        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(run, todo))
    for (case, _, _), result in zip(todo, results, strict=True):
        print(row(case, result))
    if status(results):
        print("not as predicted, or nothing confirmed: see the table", file=sys.stderr)
    return status(results)


if __name__ == "__main__":
    sys.exit(main())
