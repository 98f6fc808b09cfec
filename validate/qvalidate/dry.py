"""The dry level: the installed engine's own model classes and loader, fed from headers alone.

`dry_run` starts vLLM's interpreter, which builds the model on the `meta` device and notes every
copy that its loader makes (`engines/dry_vllm.py`); here its notes become findings. No weight is
read and no GPU is used, so a checkpoint of any size is looked at, at any `tp`, on every rank. It
sees names, dtypes and shapes; a wrong value it can't see.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from pydantic import Field

from qschema.strict import Finding, Json, Strict
from qvalidate.engines.diagnosis import Diagnosis, diagnose
from qvalidate.engines.interpreter import NoInterpreterError, environment, find_interpreter
from qvalidate.engines.process import Run, run, sigterm_as_exit
from qvalidate.engines.vllm import ENGINE
from qvalidate.targets import MOST_GPUS

__all__ = ["DRY", "DryOutcome", "DryRequest", "dry_run", "findings_of", "judge_cast"]

Verdict: TypeAlias = Literal["passed", "failed", "no-engine", "unsupported"]
Severity: TypeAlias = Literal["error", "warning", "note"]

_ENGINES = Path(__file__).parent / "engines"
_RUNNER = _ENGINES / "dry_vllm.py"
_HELPERS = (_ENGINES / "dry_record.py", _ENGINES / "runner_base.py")
# what chooses kernels in vLLM 0.32 and 0.33
_SELECTORS = frozenset(
    f"{verb}_{kind}"
    for verb, kinds in {
        "choose": "mp_linear_kernel scaled_mm_linear_kernel",
        "init": "fp8_linear_kernel int8_linear_kernel mxfp4_linear_kernel mxfp6_linear_kernel "
        "mxfp8_linear_kernel nvfp4_linear_kernel wfp8_a16_linear_kernel",
        "select": "deepseek_v4_mxfp4_moe_backend fp8_moe_backend int8_moe_backend linear_kernel "
        "mxfp4_moe_backend mxfp8_moe_backend nvfp4_moe_backend unquantized_moe_backend "
        "w4a8_int8_moe_backend w4a8_moe_backend wna16_moe_backend",
    }.items()
    for kind in kinds.split()
)
_DEFAULTS = {
    **ENGINE.defaults,
    # also a build for GPUs is to look for none
    "VLLM_TARGET_DEVICE": "cpu",
}
# the engine needs values, or a machine, that are not here: nothing is said about the checkpoint
_NOT_ON_META = re.compile(
    r"[Mm]eta tensor|'Meta' backend|on meta\b|not supported on CPU|by the CPU|on CPU\b"
    r"|is not supported by MLA attention on CPU|data-dependent" + f"|{ENGINE.no_kernel.pattern}"
)
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")
_SHOWN = 5
_T = TypeVar("_T")
# plain float -> those that hold every number of it
_WIDER = {
    "float16": {"float32", "float64"},
    "bfloat16": {"float32", "float64"},
    "float32": {"float64"},
    "float64": set[str](),
}
_PLAIN = frozenset(_WIDER)
# dtype -> bits; uint8 is missing: in a checkpoint it holds codes and exponents
_INTEGERS = {"bool": 1, "int8": 8, "int16": 16, "int32": 32, "int64": 64}
# rule of an engine's failure -> rule here, verdict
_FAILURES: Mapping[str, tuple[str, Verdict]] = {
    "engine-refused": ("dry-refused", "failed"),
    "engine-crashed": ("dry-crashed", "unsupported"),
    "engine-timeout": ("dry-timeout", "unsupported"),
    "engine-no-kernel": ("dry-unsupported", "unsupported"),
    "engine-missing": ("dry-no-engine", "no-engine"),
}

# id -> what it says
DRY: Mapping[str, str] = {
    "dry-refused": "the engine's loader raises on the checkpoint's names, dtypes or shapes; the "
    "message is the engine's, the tensor the one that was in hand",
    "dry-missing": "nothing of the checkpoint is written into a parameter of the engine, or into a "
    "part of one: a projection of a fused layer, an expert's slot, rows past the end of a tensor "
    "that is too small; the engine computes with whatever the memory holds, without a message",
    "dry-unexpected": "the engine reads nothing of a tensor; a note where it does without for a "
    "known reason: a tied output head, layers for speculative decoding, rotary tables, scales of "
    "a KV cache that is not quantized",
    "dry-truncated": "a part of a tensor is read by no rank: it is larger than the engine expects",
    "dry-cast": "the engine converts numbers where bits are meant: 16-bit weights become 8-bit "
    "codes without a scale, codes or exponents become numbers; a note where floats are rounded to "
    "the model's dtype; widening a float or a scale is no finding",
    "dry-crashed": "the engine's process died during the dry load; nothing was shown",
    "dry-timeout": "the dry load took longer than it may; nothing was shown",
    "dry-unsupported": "the engine can't load this model without values or a GPU, or its loader "
    "does something that the dry level does not know (note); what it says is no pass",
    "dry-no-engine": "that interpreter brought up no such engine; nothing was tested",
}


class DryRequest(Strict):
    """One checkpoint for one engine's loader."""

    checkpoint: Path
    # the engine's interpreter; None is the one that runs this
    python: str | None = None
    # ranks of tensor parallelism; all of them are built
    tp: int = Field(default=1, ge=1, le=MOST_GPUS)
    timeout_s: float = Field(default=600.0, gt=0, allow_inf_nan=False)


class DryOutcome(Strict):
    """What the engine's loader did with a checkpoint's headers.

    `passed` only if every rank was loaded and no finding is an error. `unsupported` says that this
    engine can't load this model without values or a GPU, `no-engine` that there is none: neither
    is about the checkpoint, and neither is a pass.
    """

    engine: Literal["vllm"] = "vllm"
    version: str | None = None
    verdict: Verdict
    # the engine's last words, short; empty if it had nothing to complain about
    message: str = ""
    tp: int
    ranks_checked: int = 0
    # tensors that the loader was fed with
    num_tensors: int = 0
    # the model's, on the first rank
    num_parameters: int = 0
    num_elements: int = 0
    wall_s: float = 0.0
    # of the engine's process
    peak_rss_nbytes: int = 0
    findings: list[Finding] = Field(default_factory=list)


class Missing(Strict):
    """A parameter, or a part of one, that nothing was written into, on those ranks."""

    parameter: str
    missing: int
    of: int
    # tensors of the checkpoint that belong there
    parts: list[str]
    ranks: list[int]


class Partly(Strict):
    """A tensor of the checkpoint that the ranks together did not read in full."""

    tensor: str
    unread: int
    of: int


class Notes(Strict):
    """What the runner reports of a load that went through."""

    ranks_checked: int
    # for each rank
    seconds: list[float]
    num_tensors: int
    num_parameters: int
    num_elements: int
    # copies and parameters whose place could not be told; they count as complete
    num_irregular: int
    missing: list[Missing]
    unread: list[str]
    partly: list[Partly]
    # (tensor, parameter, its dtype, the copy's)
    casts: list[tuple[str, str, str, str]]
    num_left_out: int
    # the functions that choose kernels, all of which were replaced
    selectors: list[str]
    peak_rss_nbytes: int
    cache_dtype: str
    is_tied: bool
    num_layers: int | None
    # the config says that there are layers for speculative decoding
    is_speculative: bool
    quantization: str | None


def dry_run(request: DryRequest) -> DryOutcome:
    """Return what the engine's loader made of the checkpoint; trouble is never an exception."""
    with (
        sigterm_as_exit(),
        tempfile.TemporaryDirectory(prefix="qvalidate-dry-") as folder,
    ):
        return _outcome(request, Path(folder))


def _outcome(request: DryRequest, folder: Path) -> DryOutcome:
    report = folder / "report.json"
    job: dict[str, Json] = {
        "checkpoint": os.path.abspath(request.checkpoint),
        "tp": request.tp,
        "report": str(report),
    }
    try:
        python = find_interpreter(request.python, module=ENGINE.module, install=ENGINE.install)
        done = run(
            python,
            _RUNNER,
            job,
            folder=folder / "run",
            environment=environment(_DEFAULTS, python=python),
            timeout_s=request.timeout_s,
            helpers=_HELPERS,
        )
    except (NoInterpreterError, OSError) as error:
        return _not_loaded(request, None, Diagnosis("engine-missing", str(error)))
    diagnosis = diagnose(done, level="load", no_kernel=_NOT_ON_META, timeout_s=request.timeout_s)
    if diagnosis is not None:
        return _not_loaded(request, done, diagnosis)
    try:
        notes = Notes.model_validate_json(report.read_bytes(), strict=False)
    except (OSError, ValueError) as error:
        return _not_loaded(request, done, Diagnosis("engine-crashed", f"no report: {error}"))
    findings = list(findings_of(notes, checkpoint=request.checkpoint))
    is_clean = all(finding.severity != "error" for finding in findings)
    return DryOutcome(
        version=done.state.version,
        verdict="passed" if is_clean else "failed",
        tp=request.tp,
        ranks_checked=notes.ranks_checked,
        num_tensors=notes.num_tensors,
        num_parameters=notes.num_parameters,
        num_elements=notes.num_elements,
        wall_s=round(done.wall_s, 2),
        peak_rss_nbytes=notes.peak_rss_nbytes,
        findings=findings,
    )


def findings_of(notes: Notes, *, checkpoint: Path) -> Iterator[Finding]:
    """Yield one finding for each kind of thing that is wrong; layers and experts are one kind."""
    for group in _alike(notes.missing, lambda entry: _pattern(entry.parameter)):
        yield _missing(group, notes, str(checkpoint))
    for names in _alike(notes.unread, lambda name: (spared(name, notes), _pattern(name))):
        reason = spared(names[0], notes)
        text = f"the engine reads nothing of it{_others(names)}"
        yield _finding(
            checkpoint, "dry-unexpected", names[0], text + (f": {reason}" if reason else ""),
            severity="note" if reason else "error",
        )  # fmt: skip
    for parts in _alike(notes.partly, lambda entry: _pattern(entry.tensor)):
        first = parts[0]
        text = f"{first.unread:,} of its {first.of:,} elements are read by no rank"
        names = [entry.tensor for entry in parts]
        yield _finding(checkpoint, "dry-truncated", first.tensor, text + _others(names))
    yield from _casts(notes, checkpoint)
    for name in sorted(set(notes.selectors) - _SELECTORS):
        text = f"{name} of this version is not known here; it was replaced as the others are"
        yield _finding(checkpoint, "dry-unsupported", "", text, severity="note")
    if notes.num_irregular:
        text = f"{notes.num_irregular:,} copies can't be placed and count as complete"
        yield _finding(checkpoint, "dry-unsupported", "", text, severity="note")
    if notes.num_left_out:
        text = f"{notes.num_left_out:,} more are not listed"
        yield _finding(checkpoint, "dry-missing", "", text)


def spared(name: str, notes: Notes) -> str:
    """Return why the engine may leave the tensor `name` unread, empty if that is an error."""
    if re.search(r"rotary\w*\.(inv_freq|cos_cached|sin_cached)$", name):
        return "it computes them itself"
    if notes.is_tied and re.search(r"(^|\.)lm_head\.weight$", name):
        return "the output head is tied to the embeddings"
    if re.search(r"\.(k_proj|v_proj|qkv_proj|attn|self_attn)\.[qkv]v?_(scale|bias)$", name) and (
        not notes.cache_dtype.startswith(("fp8", "nvfp4"))
    ):
        return f"the KV cache is not quantized ({notes.cache_dtype})"
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    last = notes.num_layers if notes.is_speculative else None
    if layer and last is not None and int(layer[1]) >= last:
        return "a layer past num_hidden_layers is one for speculative decoding"
    if re.search(r"(^|\.)mtp\.", name):
        return "the main model has no layer for speculative decoding"
    return ""


def judge_cast(source: str, target: str, *, is_scale: bool) -> Severity | None:
    """Return what a copy from dtype `source` into dtype `target` is, None if nothing is lost.

    Both are torch's names. A copy converts numbers; codes are not numbers without their scale, and
    bytes that stand for codes or exponents are not the numbers that they would be as integers. So
    an 8-bit float or an integer on either side is an error, unless a scale is only widened. Among
    plain floats a widening keeps every number and is nothing; a narrowing rounds to the dtype that
    the model was asked for in, which every engine does, and is a note.
    """
    if source == target:
        return None
    if source in _PLAIN and target in _PLAIN:
        return None if target in _WIDER[source] else "note"
    if is_scale and source in ("float8_e4m3fn", "float8_e8m0fnu") and target in _PLAIN:
        # each number of both is one of bfloat16 and float32; float16 has not the exponents of E8M0
        return "note" if target == "float16" and source == "float8_e8m0fnu" else None
    if source in _INTEGERS and target in _INTEGERS:
        return None if _INTEGERS[source] <= _INTEGERS[target] else "error"
    return "error"


def _casts(notes: Notes, checkpoint: Path) -> Iterator[Finding]:
    for casts in _alike(notes.casts, lambda cast: (_pattern(cast[0]), *cast[2:])):
        tensor, parameter, source, target = casts[0]
        severity = judge_cast(source, target, is_scale=_is_scale(tensor))
        if severity is None:
            continue
        text = f"{source} is converted to {target}"
        text += f" in the engine's {parameter}" if parameter else ""
        names = [cast[0] for cast in casts]
        yield _finding(checkpoint, "dry-cast", tensor, text + _others(names), severity=severity)


def _missing(group: list[Missing], notes: Notes, file: str) -> Finding:
    first = group[0]
    parts = ", ".join(first.parts[:_SHOWN])
    if len(first.parts) > _SHOWN:
        parts += f" and {len(first.parts) - _SHOWN} more"
    belong = "belongs" if len(first.parts) == 1 else "belong"
    where = "" if len(first.ranks) == notes.ranks_checked else f" on ranks {first.ranks}"
    text = (
        f"nothing is written into {first.missing:,} of {first.of:,} elements of the engine's "
        f"{first.parameter}{where}; {parts} {belong} there"
    )
    names = [entry.parameter for entry in group]
    return _finding(Path(file), "dry-missing", first.parts[0], text + _others(names))


def _not_loaded(request: DryRequest, done: Run | None, diagnosis: Diagnosis) -> DryOutcome:
    rule, verdict = _FAILURES[diagnosis.rule]
    message = diagnosis.message
    state = done.state if done else None
    tensor = state.error.tensor if state and state.error else diagnosis.tensor
    if rule == "dry-no-engine" and done is not None:
        message += f"; {ENGINE.install}, or name another interpreter with --python"
    severity: Severity = "warning" if verdict == "unsupported" else "error"
    return DryOutcome(
        version=state.version if state else None,
        verdict=verdict,
        message=message,
        tp=request.tp,
        wall_s=round(done.wall_s, 2) if done else 0.0,
        findings=[_finding(request.checkpoint, rule, tensor, message, severity=severity)],
    )


def _alike(items: Sequence[_T], kind: Callable[[_T], object]) -> Iterable[list[_T]]:
    """Return `items` in groups of the same kind, in the order of their first members."""
    groups: dict[object, list[_T]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return groups.values()


def _pattern(name: str) -> str:
    return _NUMBERS.sub("*", name)


def _others(names: list[str]) -> str:
    if len(names) == 1:
        return ""
    return f"; so are {len(names) - 1:,} more of {_pattern(names[0])}"


def _is_scale(name: str) -> bool:
    return "scale" in name.rpartition(".")[2]


def _finding(
    file: Path, rule: str, where: str, message: str, *, severity: Severity = "error"
) -> Finding:
    return Finding(file=str(file), where=where, rule=rule, message=message, severity=severity)
