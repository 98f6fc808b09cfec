"""The dry level without an engine: canned reports, a stand-in interpreter, meta tensors."""

import importlib
import json
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qvalidate.dry import (
    DRY,
    DryOutcome,
    DryRequest,
    Missing,
    Notes,
    Partly,
    dry_run,
    findings_of,
    judge_cast,
)
from qvalidate.engines import dry_record as record

Json = dict[str, Any]
ENGINES = Path(record.__file__).parent
CLEAN: Json = {
    "ranks_checked": 2,
    "seconds": [1.0, 1.0],
    "num_tensors": 3,
    "num_parameters": 2,
    "num_elements": 64,
    "num_irregular": 0,
    "missing": [],
    "unread": [],
    "partly": [],
    "casts": [],
    "num_left_out": 0,
    "selectors": ["select_linear_kernel"],
    "peak_rss_nbytes": 1 << 20,
    "cache_dtype": "auto",
    "is_tied": False,
    "num_layers": 2,
    "is_speculative": False,
    "quantization": "modelopt",
}
STAND_IN = """#!{python}
import json, sys, time
job = json.loads(sys.stdin.readline())
canned = json.loads({canned!r})
time.sleep(canned["sleep"])
if canned["report"] is not None:
    open(job["report"], "w").write(json.dumps(canned["report"]))
if canned["state"] is not None:
    open(job["state"], "w").write(json.dumps(canned["state"]))
sys.exit(canned["status"])
"""


def interpreter(
    folder: Path,
    *,
    report: Json | None = None,
    state: Json | None = None,
    status: int = 0,
    sleep: float = 0,
) -> str:
    """Return a program that answers a job with what is given, whatever the runner."""
    canned = {"report": report, "state": state, "status": status, "sleep": sleep}
    file = folder / "python"
    file.write_text(STAND_IN.format(python=sys.executable, canned=json.dumps(canned)))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def dry(python: str | None, *, timeout_s: float = 60.0) -> DryOutcome:
    return dry_run(DryRequest(checkpoint=Path("ckpt"), python=python, tp=2, timeout_s=timeout_s))


def loaded(**changes: object) -> Json:
    return {"reached": "load", "version": "0.0-fake", **changes}


def refused(**error: object) -> Json:
    words = {"type": "ValueError", "text": "", "place": "loader.py:1", **error}
    return {"reached": "import", "version": "0.0-fake", "error": words}


def notes(**changes: object) -> Notes:
    return Notes.model_validate({**CLEAN, **changes}, strict=False)


def found(**changes: object) -> list[tuple[str, str, str]]:
    findings = list(findings_of(notes(**changes), checkpoint=Path("ckpt")))
    assert all(finding.rule in DRY and finding.file == "ckpt" for finding in findings)
    return [(finding.severity, finding.rule, finding.where) for finding in findings]


def test_clean_report_passes(tmp_path: Path) -> None:
    outcome = dry(interpreter(tmp_path, report=CLEAN, state=loaded()))

    assert (outcome.verdict, outcome.findings, outcome.message) == ("passed", [], "")
    assert (outcome.version, outcome.ranks_checked, outcome.num_tensors) == ("0.0-fake", 2, 3)
    assert (outcome.num_parameters, outcome.peak_rss_nbytes) == (2, 1 << 20)
    assert DryOutcome.model_validate_json(outcome.model_dump_json()) == outcome


def test_a_tensor_that_nothing_reads_fails(tmp_path: Path) -> None:
    report = {**CLEAN, "unread": ["model.layers.0.mlp.up_proj.bias"]}

    outcome = dry(interpreter(tmp_path, report=report, state=loaded()))

    assert outcome.verdict == "failed"
    assert [finding.rule for finding in outcome.findings] == ["dry-unexpected"]


@pytest.mark.parametrize(
    ("state", "verdict", "rule", "where"),
    [
        (refused(text="shape", tensor="a.weight", shapes="[2] into [3]"),
         "failed", "dry-refused", "a.weight"),
        (refused(text="torch.float32 is not supported for quantization method modelopt"),
         "failed", "dry-refused", ""),
        (refused(type="NotImplementedError", text="Cannot copy out of meta tensor; no data!"),
         "unsupported", "dry-unsupported", ""),
        (refused(text="Sparse Attention is not supported on CPU."),
         "unsupported", "dry-unsupported", ""),
        (refused(text="CUDA out of memory"), "unsupported", "dry-crashed", ""),
        ({"reached": "start", "error": {"type": "ModuleNotFoundError", "text": "no vllm",
                                        "place": "x"}}, "no-engine", "dry-no-engine", ""),
        ({"reached": "import"}, "unsupported", "dry-crashed", ""),
    ],
)  # fmt: skip
def test_failures_are_told_apart(
    tmp_path: Path, state: Json, verdict: str, rule: str, where: str
) -> None:
    outcome = dry(interpreter(tmp_path, state=state, status=1))

    assert outcome.verdict == verdict
    assert [(finding.rule, finding.where) for finding in outcome.findings] == [(rule, where)]
    assert outcome.findings[0].message == outcome.message
    assert rule in DRY


def test_only_a_refusal_is_an_error_about_the_checkpoint(tmp_path: Path) -> None:
    state = refused(text="Tensor.item() cannot be called on meta tensors")

    outcome = dry(interpreter(tmp_path, state=state, status=1))

    assert [finding.severity for finding in outcome.findings] == ["warning"]


@pytest.mark.parametrize("program", ["/bin/true", "/nowhere/python"])
def test_a_program_that_is_no_engine_is_no_pass(program: str) -> None:
    outcome = dry(program)

    assert (outcome.verdict, outcome.ranks_checked) == ("no-engine", 0)
    assert [finding.rule for finding in outcome.findings] == ["dry-no-engine"]


def test_a_report_that_is_not_there_is_no_pass(tmp_path: Path) -> None:
    outcome = dry(interpreter(tmp_path, state=loaded()))

    assert outcome.verdict == "unsupported"
    assert outcome.message.startswith("no report")


def test_no_answer_in_time_is_no_pass(tmp_path: Path) -> None:
    outcome = dry(interpreter(tmp_path, sleep=60), timeout_s=0.3)

    assert outcome.verdict == "unsupported"
    assert [finding.rule for finding in outcome.findings] == ["dry-timeout"]


def test_layers_and_experts_are_one_finding() -> None:
    missing = [
        Missing(
            parameter=f"model.layers.{layer}.mlp.experts.w2_weight",
            missing=8,
            of=64,
            parts=[f"layers.{layer}.experts.{expert}.down_proj.weight" for expert in range(7)],
            ranks=[1],
        ).model_dump()
        for layer in range(3)
    ]

    (finding,) = findings_of(notes(missing=missing), checkpoint=Path("ckpt"))

    assert finding.where == "layers.0.experts.0.down_proj.weight"
    assert "8 of 64 elements" in finding.message
    assert "on ranks [1]" in finding.message
    assert "and 2 more belong there" in finding.message
    assert "so are 2 more of model.layers.*.mlp.experts.w2_weight" in finding.message


def test_truncated_names_the_rest() -> None:
    partly = [Partly(tensor="a.weight", unread=1024, of=4096).model_dump()]

    (finding,) = findings_of(notes(partly=partly), checkpoint=Path("ckpt"))

    assert (finding.rule, finding.where) == ("dry-truncated", "a.weight")
    assert "1,024 of its 4,096 elements" in finding.message


@pytest.mark.parametrize(
    ("name", "changes", "severity"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", {}, "note"),
        ("lm_head.weight", {"is_tied": True}, "note"),
        ("lm_head.weight", {}, "error"),
        ("lm_head.weight_scale", {"is_tied": True}, "error"),
        ("model.layers.0.self_attn.k_proj.k_scale", {}, "note"),
        ("model.layers.0.self_attn.k_proj.k_scale", {"cache_dtype": "fp8_e4m3"}, "error"),
        ("model.layers.2.mlp.up_proj.weight", {"is_speculative": True}, "note"),
        ("model.layers.2.mlp.up_proj.weight", {}, "error"),
        ("model.layers.1.mlp.up_proj.weight", {"is_speculative": True}, "error"),
        ("model.layers.1.mlp.up_proj.bias", {}, "error"),
    ],
)
def test_what_an_engine_may_leave_unread(name: str, changes: Json, severity: str) -> None:
    assert found(unread=[name], **changes) == [(severity, "dry-unexpected", name)]


@pytest.mark.parametrize(
    ("source", "target", "is_scale", "severity"),
    [
        ("bfloat16", "float8_e4m3fn", False, "error"),
        ("float32", "float8_e4m3fn", True, "error"),
        ("float8_e4m3fn", "bfloat16", False, "error"),
        ("float8_e4m3fn", "float32", True, None),
        ("float8_e8m0fnu", "uint8", True, "error"),
        ("uint8", "float8_e4m3fn", False, "error"),
        ("float8_e8m0fnu", "float32", True, None),
        ("float8_e8m0fnu", "float16", True, "note"),
        ("bfloat16", "uint8", False, "error"),
        ("int8", "bfloat16", False, "error"),
        ("int32", "int64", False, None),
        ("int64", "int32", False, "error"),
        ("bfloat16", "float32", True, None),
        ("float32", "bfloat16", True, "note"),
        ("bfloat16", "float16", False, "note"),
        ("float16", "bfloat16", False, "note"),
        ("float64", "float32", False, "note"),
    ],
)
def test_casts_that_lose_the_meaning_are_errors(
    source: str, target: str, is_scale: bool, severity: str | None
) -> None:
    assert judge_cast(source, target, is_scale=is_scale) == severity
    assert judge_cast(source, source, is_scale=is_scale) is None


def test_casts_of_one_kind_are_one_finding() -> None:
    casts = [
        (f"model.layers.{layer}.o_proj.weight", f"model.layers.{layer}.o_proj.weight", *pair)
        for layer in range(2)
        for pair in (("bfloat16", "float8_e4m3fn"), ("bfloat16", "float32"))
    ]

    assert found(casts=casts) == [("error", "dry-cast", "model.layers.0.o_proj.weight")]


def test_a_selector_that_is_not_known_is_reported() -> None:
    assert found(selectors=["select_linear_kernel", "select_new_moe_backend"]) == [
        ("note", "dry-unsupported", "")
    ]


def test_entries_that_were_left_out_are_an_error() -> None:
    assert found(num_left_out=3) == [("error", "dry-missing", "")]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner as a module, its helpers beside it as in an engine's process."""
    monkeypatch.syspath_prepend(str(ENGINES))
    for name in ("dry_vllm", "dry_record", "runner_base"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("dry_vllm")


def test_selectors_are_replaced_wherever_they_were_imported(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def select_fp8_moe_backend() -> None: ...
    def select_backend_of_ours() -> None: ...

    select_fp8_moe_backend.__module__ = "vllm.model_executor.layers.fused_moe.oracle.fp8"
    user = SimpleNamespace(
        __name__="vllm.user", chosen=1, select_fp8_moe_backend=select_fp8_moe_backend,
        select_backend_of_ours=select_backend_of_ours,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm.user", user)

    assert runner.replace_selectors() == {"select_fp8_moe_backend"}
    backend, experts = user.select_fp8_moe_backend("x")
    assert not backend
    assert experts.anything() is None
    assert user.select_backend_of_ours is select_backend_of_ours


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("parameter", "sizes", "box", "parts"),
    [
        ("l.qkv_proj.weight", (512, 256), ((256, 384), (0, 256)), ["l.k_proj.weight"]),
        ("l.qkv_proj.weight", (512, 256), ((256, 512), (0, 256)),
         ["l.k_proj.weight", "l.v_proj.weight"]),
        ("l.qkv_proj.weight_scale", (3,), ((2, 3),), ["l.v_proj.weight_scale"]),
        ("l.qkv_proj.weight_scale", (4, 2), ((0, 2), (0, 2)), ["l.q_proj.weight_scale"]),
        ("l.o_proj.weight", (8, 8), ((0, 8), (0, 8)), ["l.o_proj.weight"]),
        ("l.experts.routed_experts.w13_weight", (4, 8, 6), ((1, 2), (4, 8), (0, 6)),
         ["l.experts.1.w3.weight"]),
        ("l.experts.routed_experts.w13_weight_scale", (4, 2), ((2, 4), (0, 1)),
         ["l.experts.2.w1.weight_scale", "l.experts.3.w1.weight_scale"]),
        ("l.experts.routed_experts.w13_input_scale", (4,), ((3, 4),),
         ["l.experts.3.w1.input_scale", "l.experts.3.w3.input_scale"]),
        ("l.experts.routed_experts.w2_weight", (4, 8, 6), ((0, 1), (0, 8), (0, 6)),
         ["l.experts.0.w2.weight"]),
    ],
)  # fmt: skip
def test_gaps_are_named_as_the_checkpoint_would(
    runner: ModuleType, parameter: str, sizes: tuple[int, ...], box: record.Box, parts: list[str]
) -> None:
    modules: Mapping[str, object] = {
        "l.qkv_proj": SimpleNamespace(output_partition_sizes=[256, 128, 128]),
        "l.o_proj": SimpleNamespace(),
        "l.experts.routed_experts": SimpleNamespace(
            local_num_experts=4,
            ckpt_gate_proj_name="w1", ckpt_up_proj_name="w3", ckpt_down_proj_name="w2",
        ),
    }  # fmt: skip
    target = record.Target(parameter, torch.empty(sizes, device="meta"))

    assert runner.belonging(box, target, modules, PACKED) == parts


@pytest.mark.parametrize(
    ("method", "leaf", "expected"),
    [
        (SimpleNamespace(), "k_scale", True),
        (SimpleNamespace(), "weight_scale", False),
        (SimpleNamespace(), "input_scale", False),
        (SimpleNamespace(spec=SimpleNamespace(activation=None)), "input_scale", True),
        (SimpleNamespace(spec=SimpleNamespace(activation=None)), "weight_scale", False),
        (SimpleNamespace(spec=SimpleNamespace(activation="fp8")), "input_scale", False),
        (SimpleNamespace(use_a16=True), "w13_input_scale", True),
        (SimpleNamespace(use_a16=False), "w13_input_scale", False),
    ],
)
def test_parameters_that_an_engine_does_without(
    runner: ModuleType, method: object, leaf: str, expected: bool
) -> None:
    assert runner.is_optional(SimpleNamespace(quant_method=method), leaf) is expected
