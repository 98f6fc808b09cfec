"""What the converter writes, qvalidate passes: rules, and every weight against its source."""

from pathlib import Path

import pytest

from qschema.recipe import Recipe
from qvalidate.validation import validate

from .conversion import CHECKPOINTS, WRITABLE, Make, measured, recipe, run
from .test_formats import CASES
from .test_kv_cache import CACHE, KINDS, LAYERS, biases
from .test_smoothing import FOLDS, LINEARS, model, scales, stats
from .test_stacks import STACKABLE, H, split_model, stats_of, transposed_stacks

# models made on the spot are a layer without embedding, norms or tokenizer
OF_A_FRAGMENT = {"missing-module", "tokenizer-missing"}


def complaints(path: Path, reference: Path) -> list[str]:
    """Return the errors and warnings; notes say which engine has no kernel for it."""
    found = validate(path, reference=reference).findings
    return [
        str(finding)
        for finding in found
        if finding.severity != "note" and finding.rule not in OF_A_FRAGMENT
    ]


@pytest.mark.parametrize(("model_name", "algo"), [c for c in CASES if c[0] != "qwen3"])
def test_a_checkpoint_of_one_format(tmp_path: Path, model_name: str, algo: str) -> None:
    source = CHECKPOINTS / model_name

    run(source, tmp_path / "out", algo=algo)

    assert complaints(tmp_path / "out", source) == []


@pytest.mark.parametrize("algo", ["MXFP4", "MXFP8", "W4A8_NVFP4_FP8"])
def test_one_with_weights_that_stay(tmp_path: Path, algo: str) -> None:
    source = CHECKPOINTS / "llama_odd"

    run(source, tmp_path / "out", algo=algo, on_indivisible="keep")

    assert complaints(tmp_path / "out", source) == []


def test_a_mixed_one(tmp_path: Path) -> None:
    source = CHECKPOINTS / "mixtral"

    run(source, tmp_path / "out", asked=recipe(("*.self_attn.*", "FP8"), ("*.experts.*", "NVFP4")))

    assert complaints(tmp_path / "out", source) == []


@pytest.mark.parametrize("rules", [[], [{"match": "*", "algo": "FP8_PB_WO"}]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_cache(tmp_path: Path, kind: str, rules: list[dict[str, str]]) -> None:
    source = CHECKPOINTS / "llama"
    vectors = biases(*LAYERS) if kind == "NVFP4_AFFINE" else None
    statistics = measured(tmp_path, kv_cache=CACHE, vectors=vectors)
    asked = Recipe.parse({"rules": rules, "kv_cache": kind}, file="recipe")

    run(source, tmp_path / "out", asked=asked, statistics=statistics)

    assert complaints(tmp_path / "out", source) == []


@pytest.mark.parametrize("algo", list(FOLDS))
def test_a_smoothed_one(tmp_path: Path, make: Make, algo: str) -> None:
    source = model(kv_rows=64)
    path = make(source, config={"num_hidden_layers": 1})
    statistics = stats(tmp_path, scales(*LINEARS, source=source))

    run(path, tmp_path / "out", algo=algo, statistics=statistics)

    assert complaints(tmp_path / "out", path) == []


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("algo", WRITABLE)
def test_split_stacks(tmp_path: Path, make: Make, algo: str, model_type: str) -> None:
    """Against the same model with one tensor per expert."""
    stacked, single = split_model(model_type)
    config = {"model_type": model_type, "hidden_size": H, "num_hidden_layers": 1}
    path = make(stacked, config=config)
    reference = make(single, config=config, name="reference")

    run(path, tmp_path / "out", algo=algo, statistics=stats_of(tmp_path, single, algo))

    assert complaints(tmp_path / "out", reference) == []


@pytest.mark.parametrize("algo", STACKABLE)
def test_stacks_that_stay(tmp_path: Path, make: Make, algo: str) -> None:
    config = {"model_type": "llama4_text", "hidden_size": H, "num_hidden_layers": 1}
    path = make(transposed_stacks(), config=config)

    run(path, tmp_path / "out", algo=algo)

    assert complaints(tmp_path / "out", path) == []
