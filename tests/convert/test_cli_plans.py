"""The options about formats, as a user meets them: their help, dry runs, refusals, results."""

import json
from pathlib import Path

import pytest
import torch

from qschema.plan import Plan
from qschema.report import Report

from .conversion import Make, amax_of, measured, randn
from .test_cli import qconvert
from .test_stacks import split_model, transposed_stacks

LAYER = "model.layers.0"


def llama_stats(folder: Path) -> Path:
    """Return a statistics file for the fixture llama."""
    modules = [
        f"model.layers.{layer}.{leaf}_proj"
        for layer in (0, 1)
        for leaf in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    ]
    cache = {f"model.layers.{layer}.self_attn": {"k": 448.0, "v": 224.0} for layer in (0, 1)}
    measured(folder, inputs={name: amax_of(name) for name in modules}, kv_cache=cache)
    return folder / "stats.json"


def test_help_explains_every_option() -> None:
    done = qconvert("--help")

    words = " ".join(done.stdout.split())
    assert done.returncode == 0
    for text in (
        "--amax PATH Calibration's statistics, JSON; for formats with a static scale of the input.",
        "--kv-cache [FP8|NVFP4|NVFP4_AFFINE|none] How engines keep keys and values;",
        "--on-indivisible [refuse|keep] A weight whose size its format can't have: an error "
        "(default), or kept as it is.",
        "--fail-if GATE Make no checkpoint if a tensor meets this: 'sqnr<20' (dB), "
        "'relative_error>0.1', 'saturated>0.01'.",
        "NVFP4_AWQ, W4A16_AWQ",
    ):
        assert text in words
    assert "FP8_PB_REAL" not in words


def test_a_dry_run_of_a_two_pass_format(llama: Path, tmp_path: Path) -> None:
    stats = llama_stats(tmp_path)

    done = qconvert(
        llama, tmp_path / "out", "--algo", "nvfp4", "--amax", stats, "--kv-cache", "FP8",
        "--dry-run",
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "quantize 14 tensors, 1.9 MiB -> 540.1 KiB",
        "  model.layers.*.mlp.down_proj.weight x2: BF16 [256, 384] -> NVFP4: weight U8 [256, 192], "
        "weight_scale F8_E4M3 [256, 24], weight_scale_2 F32 [], input_scale F32 [] (rule '*')",
        "add      model.layers.0.self_attn.k_proj.k_scale: FP8 cache of model.layers.0.self_attn",
        "exclude  lm_head, model.embed_tokens",
    ):
        assert line in done.stdout.splitlines(), done.stdout
    assert not list(tmp_path.glob("out*"))


def test_a_dry_run_of_a_mixed_recipe(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "rules:\n  - {match: '*.self_attn.*', algo: FP8_PB_WO}\n  - {match: '*', algo: MXFP8}\n"
    )

    done = qconvert(llama, tmp_path / "out", "--recipe", recipe, "--dry-run")

    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "         FP8_PB_WO: 8 tensors, 768.0 KiB -> 384.1 KiB, 8.002 bits per weight" in lines
    (line,) = (line for line in lines if line.startswith("         MXFP8: 6 tensors"))
    assert line.endswith("8.250 bits per weight")


def test_a_dry_run_of_stacked_experts(tmp_path: Path, make: Make) -> None:
    """An expert is a line with the others like it."""
    split = make(split_model("mixtral")[0], config={"model_type": "mixtral", "hidden_size": 128})
    kept = make(
        transposed_stacks(), config={"model_type": "gpt_oss", "hidden_size": 128}, name="kept"
    )

    done = [
        qconvert(path, tmp_path / "out", "--algo", algo, "--dry-run")
        for path, algo in ((split, "MXFP8"), (kept, "W4A16_NVFP4"))
    ]

    assert [found.returncode for found in done] == [0, 0]
    for line in (
        "  model.layers.*.mlp.experts.down_proj[*, 0:128] x3: BF16 [128, 256] "
        "-> MXFP8 model.layers.*.block_sparse_moe.experts.*.w2: weight F8_E4M3 [128, 256], "
        "weight_scale U8 [128, 8] (rule '*')",
        "  model.layers.*.mlp.experts.gate_up_proj[*, 256:512] x3: BF16 [256, 128] "
        "-> MXFP8 model.layers.*.block_sparse_moe.experts.*.w3: weight F8_E4M3 [256, 128], "
        "weight_scale U8 [256, 4] (rule '*')",
    ):
        assert line in done[0].stdout.splitlines()
    assert (
        f"  {LAYER}.feed_forward.experts.gate_up_proj: BF16 [3, 128, 512] -> W4A16_NVFP4: "
        "weight U8 [3, 64, 512], weight_scale F8_E4M3 [3, 8, 512], weight_scale_2 F32 [] (rule '*')"
    ) in done[1].stdout.splitlines()


def test_a_plan_as_json_has_the_units(llama: Path, tmp_path: Path) -> None:
    stats = llama_stats(tmp_path)

    done = qconvert(
        llama, tmp_path / "out", "--algo", "NVFP4", "--amax", stats, "--dry-run", "--format", "json"
    )

    plan = Plan.parse(json.loads(done.stdout), file="stdout")
    sizes = [len(unit.steps) for unit in plan.units if unit.steps[0].algo]
    # q/k/v and gate/up of two layers, o and down
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 3, 3]
    assert all(step.input_amax for step in plan.steps if step.algo)


def test_a_conversion_with_all_of_it(llama: Path, tmp_path: Path) -> None:
    stats, out = llama_stats(tmp_path), tmp_path / "out"

    done = qconvert(
        llama, out, "--algo", "FP8", "--amax", stats, "--kv-cache", "FP8", "--fail-if", "sqnr<20",
        "--on-indivisible", "keep", "--format", "json", "--device", "cpu",
    )  # fmt: skip

    report = Report.parse(json.loads(done.stdout), file="stdout")
    assert (report.recipe.kv_cache, report.recipe.fail_if) == ("FP8", ["sqnr<20"])
    assert report.recipe.on_indivisible == "keep"
    assert {entry.sqnr is not None for entry in report.tensors if entry.algo} == {True}
    config = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (config["quant_algo"], config["kv_cache_quant_algo"]) == ("FP8", "FP8")


def test_the_cache_alone_needs_no_algo(llama: Path, tmp_path: Path) -> None:
    done = qconvert(llama, tmp_path / "out", "--kv-cache", "FP8", "-q", "--device", "cpu")

    assert done.returncode == 0
    assert done.stderr == (
        "note: KV cache FP8 without statistics: no scales are written, engines use 1.0\n"
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert "quant_algo" not in config


def test_none_takes_the_cache_out_of_a_recipe(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [{match: '*', algo: MXFP8}]\nkv_cache: FP8\n")

    done = qconvert(
        llama, tmp_path / "out", "--recipe", recipe, "--kv-cache", "none", "--dry-run",
        "--format", "json",
    )  # fmt: skip

    assert Plan.parse(json.loads(done.stdout), file="stdout").recipe.kv_cache is None


REFUSED = [
    (["--algo", "FP8"], 1, "FP8 has a static scale for each layer's input, which comes from cali"),
    (["--algo", "FP8", "--amax", "nowhere.json"], 1, "nowhere.json: amax-missing: no such file"),
    (["--algo", "FP8_PB_REAL"], 2, "FP8_PB_REAL is read, not written: no engine takes it"),
    (["--algo", "FP8_PB_WO", "--fail-if", "snr<20"], 1, "the command line::$.fail_if[0]"),
    (["--algo", "FP8_PB_WO", "--fail-if", "sqnr<99"], 1, "--fail-if 'sqnr<99': model.layers."),
    (["--algo", "FP8_PB_WO", "--kv-cache", "INT8"], 2, "'INT8' is not one of 'FP8', 'NVFP4'"),
    (["--algo", "FP8_PB_WO", "--on-indivisible", "skip"], 2, "'skip' is not one of"),
    (["--kv-cache", "none"], 2, "give either --algo or --recipe"),
]


@pytest.mark.parametrize(("words", "code", "message"), REFUSED)
def test_what_is_refused_is_one_clear_error(
    llama: Path, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    done = qconvert(llama, tmp_path / "out", *words, "--device", "cpu")

    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    # a gate fails when all is done, which then waits for another gate
    assert [path.name for path in tmp_path.iterdir()] in ([], ["out.partial"])


def test_a_weight_that_does_not_fit_and_how_to_go_on(tmp_path: Path, make: Make) -> None:
    source = make(
        {
            f"{LAYER}.mlp.down_proj.weight": randn(64, 48, seed=1),
            f"{LAYER}.self_attn.o_proj.weight": randn(64, 64, seed=2, dtype=torch.float16),
        }
    )

    refused = qconvert(source, tmp_path / "out", "--algo", "MXFP4", "--dry-run")
    kept = qconvert(
        source, tmp_path / "out", "--algo", "MXFP4", "--dry-run", "--on-indivisible", "keep"
    )

    assert refused.returncode == 1
    assert "found 48; keep it with --exclude" in refused.stderr
    assert "or all such with --on-indivisible keep" in refused.stderr
    assert kept.returncode == 0
    assert (
        f"  {LAYER}.mlp.down_proj.weight: BF16 [64, 48] (MXFP4 needs columns in multiples of 32, "
        "found 48)"
    ) in kept.stdout.splitlines()
