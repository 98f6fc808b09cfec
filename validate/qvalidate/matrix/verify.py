"""Runs cells of the support matrix: convert a fixture, ask the real engine, compare.

The conversion is a process of its own: this package does not import the converter.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qschema.formats import formats
from qvalidate.asking import Ask
from qvalidate.engines import EngineRequest, get
from qvalidate.matrix import Cell, CellRun, State
from qvalidate.result import EngineReport, Result
from qvalidate.targets import KNOWN, Deployment, Target
from qvalidate.validation import validate

MIXED = "MIXED_PRECISION"
MIXED_RULES = [{"match": "*.self_attn.*", "algo": "FP8"}, {"match": "*", "algo": "NVFP4"}]
_VERSION = "import {module} as m; print(m.__version__)"


class VerifyError(Exception):
    """What keeps a cell from being run; the text is for the user."""


@dataclass(frozen=True)
class Case:
    """A fixture in a format."""

    model: str
    format: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.format.lower()}"


@dataclass(frozen=True)
class Bench:
    """Where and how cells are run.

    `fixtures` holds checkpoints/MODEL and amax/MODEL.json; `work` is a folder for conversions;
    `keep` receives the result of every case as JSON.
    """

    engine: str
    version: str
    python: str | None
    gpu: str
    fixtures: Path
    work: Path
    timeout_s: float
    commit: str | None = None
    keep: Path | None = None


def writable() -> list[str]:
    """Return the formats that are written, and the mixed one, by name."""
    return [*(name for name, declared in formats().items() if not declared.read_only), MIXED]


def cases(fixtures: Path, *, models: Sequence[str], wanted: Sequence[str]) -> list[Case]:
    """Return every case of `fixtures`, of all models and formats if those are empty.

    Raises VerifyError for a model that is not there or a format that is not written.
    """
    there = sorted(path.name for path in (fixtures / "checkpoints").iterdir() if path.is_dir())
    for name, known, kind in (
        *((model, there, "fixture") for model in models),
        *((name, writable(), "format") for name in wanted),
    ):
        if name not in known:
            raise VerifyError(f"no {kind} {name}; there is {', '.join(known)}")
    return [Case(model, name) for model in models or there for name in wanted or writable()]


def installed_version(engine: str, python: str | None) -> str:
    """Return the version of the engine that `python` imports. Raises VerifyError."""
    code = _VERSION.format(module=get(engine).module)
    try:
        done = subprocess.run(
            [python or sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise VerifyError(f"{engine} can't be imported: {words[-1] if words else ''}") from None
    return done.stdout.split()[-1]


def run(
    bench: Bench, wanted: Sequence[Case], *, jobs: int, watch: Callable[[Case, Cell | None], None]
) -> list[Cell]:
    """Return the cell of every case; `watch` sees them, None for what can't be converted."""

    def one(case: Case) -> Cell | None:
        result = _result(bench, case)
        cell = None if result is None else cell_of(bench, case, result)
        watch(case, cell)
        return cell

    with ThreadPoolExecutor(jobs) as pool:
        return [cell for cell in pool.map(one, wanted) if cell is not None]


def cell_of(bench: Bench, case: Case, result: Result) -> Cell:
    """Return what `result`, of one engine, says."""
    (report,) = result.engines
    observed = report.observed
    assert observed is not None
    numbers = observed.comparison
    return Cell(
        engine=bench.engine,
        version=observed.version or bench.version,
        format=case.format,
        architecture=_architecture(case.model, result),
        gpu=bench.gpu,
        state=state_of(report),
        run=CellRun(
            date=datetime.now(UTC).date().isoformat(),
            commit=bench.commit,
            device=observed.device,
            kernels=list(observed.kernels),
            predicted=report.predicted,
            predicted_by=report.predicted_by,
            agreement=report.agreement,
            kl_mean=round(numbers.kl_mean, 4) if numbers else None,
            top1_agreement=round(numbers.top1_agreement, 3) if numbers else None,
            relative_error=round(numbers.relative_error, 4) if numbers else None,
            message=observed.message,
        ),
    )


def state_of(report: EngineReport) -> State:
    """Return what a run shows: `verified` is what loads, generates and agrees with the source."""
    observed = report.observed
    if observed is None or report.shown is None:
        return "unknown"
    if report.shown == "refuses":
        return "fails"
    if report.shown == "loads-but-wrong":
        return "loads-but-wrong"
    return "verified" if observed.reached == "compare" else "unknown"


def _result(bench: Bench, case: Case) -> Result | None:
    out_dir = bench.work / case.name
    source = bench.fixtures / "checkpoints" / case.model
    if not _convert(bench, case, out_dir):
        return None
    known = bench.version if bench.version in KNOWN[bench.engine] else KNOWN[bench.engine][-1]
    # of a release that is not known yet the newest known one's rules are tried
    target = Target(bench.engine, (known,), bench.engine)
    request = EngineRequest(
        checkpoint=out_dir,
        reference=source,
        python=bench.python,
        level="compare",
        timeout_s=bench.timeout_s,
    )
    result = validate(
        out_dir,
        reference=source,
        targets=[target],
        deployment=Deployment.on(bench.gpu),
        asks=[Ask(get(bench.engine), request=request, stands_in=bench.engine == "vllm")],
    )
    if bench.keep is not None:
        text = result.model_dump_json(indent=2, exclude_defaults=True)
        # the folders of this machine say nothing
        text = text.replace(f"{bench.work}/", "").replace(f"{bench.fixtures}/", "fixtures/")
        (bench.keep / f"{case.name}.json").write_text(text + "\n")
    return result


def _convert(bench: Bench, case: Case, out_dir: Path) -> bool:
    """Return whether the fixture could be put into the format at all; some have no such width."""
    source = bench.fixtures / "checkpoints" / case.model
    argv = [str(source), str(out_dir), "--device", "cpu", "-q"]
    amax = bench.fixtures / "amax" / f"{case.model}.json"
    argv += ["--amax", str(amax)] if amax.is_file() else []
    if case.format == MIXED:
        recipe = bench.work / f"{case.name}.recipe.json"
        recipe.write_text(json.dumps({"rules": MIXED_RULES}))
        argv += ["--recipe", str(recipe)]
    else:
        argv += ["--algo", case.format]
    code = "from qconvert.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        print(f"{case.name}: {words[-1]}", file=sys.stderr)
    return done.returncode == 0


def _architecture(model: str, result: Result) -> str:
    model_type = result.checkpoint.model_type or model
    return model_type if model == model_type else f"{model_type} ({model})"


def contradictions(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield a line for every cell whose run is not what the rules predicted."""
    for cell in cells:
        if cell.run is not None and cell.run.agreement == "contradicted":
            by = f" ({', '.join(cell.run.predicted_by)})" if cell.run.predicted_by else ""
            yield (
                f"{cell.architecture} {cell.format}: predicted {cell.run.predicted}{by}, "
                f"observed {cell.state}: {cell.run.message}"
            )
