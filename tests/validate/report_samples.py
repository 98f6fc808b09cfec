"""Results for the tests of the reports: one of everything that a report can show."""

import random
from pathlib import Path

from qschema.plan import Tool
from qschema.strict import Finding
from qvalidate.engines.outcome import Comparison, EngineOutcome, Level, Verdict
from qvalidate.measured import LayerError, Measured, ScaleHistogram
from qvalidate.reports.support import Row
from qvalidate.result import EngineReport, Prediction, Result, Subject
from qvalidate.rules import RULES
from qvalidate.validation import agreement

PATH = "/models/Mixtral 8x7B nvfp4"
COMPARISON = Comparison(
    num_positions=186,
    vocab=512,
    kl_mean=0.0921,
    kl_max=0.881,
    top1_agreement=0.812,
    relative_error=0.159,
    perplexity_reference=5.21,
    perplexity_candidate=5.44,
)


MATRIX = [
    Row("vllm", version, algo, architecture, "sm_90", state, source)
    for version in ("0.32.0", "0.33.0")
    for algo, state, source in (
        ("NVFP4", "verified", "run on an NVIDIA H200"),
        ("FP8_PB_WO", "verified", "run on an NVIDIA H200"),
        ("W8A16", "fails", "no quant_method of that name"),
        ("MXFP8", "loads-but-wrong", "run on an NVIDIA H200"),
        ("W4A8_AWQ", "documented", "the engine's own table of formats"),
        ("FP8", "unknown", ""),
    )
    for architecture in ("LlamaForCausalLM", "MixtralForCausalLM")
]


def finding(
    rule: str, where: str, message: str, *, severity: str = "error", file: str = ""
) -> Finding:
    path = f"{PATH}/{file or 'model.safetensors'}".removesuffix("/.")
    return Finding.parse(
        {"file": path, "where": where, "rule": rule, "message": message, "severity": severity},
        file="-",
    )


def outcome(
    verdict: Verdict,
    *findings: Finding,
    engine: str = "vllm",
    level: Level = "compare",
    reached: Level | None = "compare",
    comparison: Comparison | None = None,
    message: str = "",
) -> EngineOutcome:
    ran = verdict != "not-run"
    return EngineOutcome(
        engine=engine,
        version="0.33.0" if ran else None,
        torch="2.13.0" if ran else None,
        device="NVIDIA H200" if ran else None,
        level=level,
        verdict=verdict,
        reached=reached,
        message=message,
        prompts=[[1, 2, 3], [4, 5]] if reached else [],
        tokens=[[7, 8], [9, 10]] if reached in ("generate", "compare") else [],
        texts=[" the capital of France.\nIt lies", " <b>42</b> & more"]
        if reached in ("generate", "compare")
        else None,
        comparison=comparison,
        wall_s=21.5 if ran else 0.0,
        findings=list(findings),
    )


def engine(
    predicted: Prediction,
    observed: EngineOutcome | None = None,
    *,
    name: str = "vllm",
    by: tuple[str, ...] = (),
) -> EngineReport:
    made = EngineReport(
        engine=name,
        versions=["0.32.0", "0.33.0"] if name == "vllm" else ["0.5.17"],
        predicted=predicted,
        predicted_by=list(by),
        observed=observed,
    )
    return made.model_copy(update={"agreement": agreement(made)})


def result(
    *findings: Finding,
    engines: tuple[EngineReport, ...] = (),
    is_for_any_engine: bool = False,
    rules: tuple[str, ...] = tuple(RULES),
) -> Result:
    """Return a result with `findings`, and with those of the engines' runs."""
    runs = [report.observed for report in engines if report.observed is not None]
    return Result(
        tool=Tool(name="qvalidate", version="0.1.0"),
        checkpoint=Subject(
            path=PATH,
            digest="0123456789abcdef" * 4,
            model_type="mixtral",
            algo="NVFP4",
            num_tensors=291,
            num_quantized=64,
        ),
        level="compare" if runs else "rules",
        rules=list(rules),
        findings=[*findings, *(found for run in runs for found in run.findings)],
        engines=list(engines),
        is_for_any_engine=is_for_any_engine,
    )


def rich() -> Result:
    """Return a result with findings of every severity and engines of every kind."""
    wrong = finding("engine-refused", "model.layers.0.mlp", "KeyError: 'w13_scale'", file=".")
    refused = outcome("failed", wrong, engine="sglang", reached=None, message=wrong.message)
    scales = [
        finding(
            "missing-tensor",
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight_scale",
            "missing; NVFP4 needs F8_E4M3 [4096, 896] (scale of each 16 columns)",
        )
        for layer in range(3)
        for expert in range(8)
    ]
    return result(
        *scales,
        finding("weight-error", "model.layers.3.self_attn.q_proj.weight", "relative error 7.01"),
        finding(
            "vllm-experts-unsupported", "$.quantization_config", "is FP8_PB_WO", file="config.json"
        ),
        finding("missing-side-file", "", "no tokenizer.json", severity="warning", file="."),
        finding("weight-nonfinite", "lm_head.weight", "<script>alert(1)</script>", severity="note"),
        engines=(
            engine("loads", outcome("passed", comparison=COMPARISON)),
            engine("refuses", refused, name="sglang", by=("missing-tensor",)),
            engine("loads-but-wrong", name="tensorrt-llm", by=("weight-error",)),
        ),
    )


def measured() -> Measured:
    """Return the errors and scales of twelve layers with eight experts, two weights far off."""
    generator = random.Random(0)
    kinds = [f"self_attn.{leaf}_proj" for leaf in "qkvo"]
    kinds += [
        f"block_sparse_moe.experts.{expert}.{leaf}"
        for expert in range(8)
        for leaf in ("w1", "w2", "w3")
    ]
    errors = [
        LayerError(
            module=f"model.layers.{layer}.{kind}",
            relative_error=generator.gauss(0.093, 0.008),
            expected=0.25,
        )
        for layer in range(12)
        for kind in kinds
    ]
    # in the first and in the last column
    bad = ("model.layers.3.self_attn.q_proj", "model.layers.7.block_sparse_moe.experts.5.w3")
    errors = [item for item in errors if item.module not in bad]
    errors += [LayerError(module=module, relative_error=7.01, expected=0.25) for module in bad]
    errors.append(LayerError(module="lm_head", relative_error=None, expected=0.25))
    histograms = [
        ScaleHistogram(
            kind=f"model.layers.*.{kind}.{suffix}",
            role=role,
            num_tensors=12 if "experts" not in kind else 96,
            num_scales=size,
            first_log2=first + index % 2,
            counts=[int(size * share) for share in (0.02, 0.1, 0.31, 0.4, 0.13, 0.04)],
            num_zero=4 if kind == kinds[1] else 0,
        )
        for index, kind in enumerate(
            dict.fromkeys(kind.replace("experts.0", "experts.*") for kind in kinds[:7])
        )
        for role, suffix, first, size in (
            ("scale", "weight_scale", -3, 12 << 20),
            ("global", "weight_scale_2", -14, 96),
        )
    ]
    return Measured(errors_from="reference", errors=errors, scales=histograms)


def write(directory: Path, name: str, text: str) -> Path:
    """Write a page and return where."""
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path
