"""What SGLang makes of a list of exclusions: the known traps, and its own code as the oracle."""

import ast
import os
import random
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import pytest

from qschema.formats import formats
from qvalidate.rules.sglang_matching import (
    MixedAlgosError,
    layer_name,
    layers,
    listed_algo,
    match,
    match_plainly,
)
from qvalidate.rules.sglang_reading import method_of
from qvalidate.rules.sglang_support import FUSED_NAMES, NEW, OLD

QUANTIZATION = "layers/quantization"
# names of algorithms beside those of the formats
OTHERS = ["", "MIXED_PRECISION", "NVFP4_SVD", "mixed_precision", "FP8_BLOCK_SCALES", "XFP8X"]
LAYERS = [
    "lm_head",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.11.self_attn.qkv_proj",
    "model.layers.1.mlp.gate_up_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.shared_experts.gate_up_proj",
    "model.layers.1.mlp.shared_experts.down_proj",
    "model.layers.1.self_attn.fused_qkv_a_proj_with_mqa",
    "layers.1.self_attn.o_proj",
    "language_model.model.layers.1.self_attn.o_proj",
]
EXPERTS = ["model.layers.1.mlp.experts", "layers.1.block_sparse_moe.experts"]
PATTERNS = [
    "lm_head", "head", "model.lm_head", "*lm_head*", "model.layers.1", "model.layers.1*",
    "model.layers.1.*", "layers.1", "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj", "*.q_proj", "*v_proj*",
    "mlp.gate", "mlp", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "*experts*",
    "re:.*", "*", "model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp.experts*",
    "model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.mlp.gate_up_proj",
    "model.layers.1.self_attn*", "q_a_proj", "model.layers.1.self_attn.kv_b_proj", "o_pro.", "",
    "?x", "model.layers.1.", "(",
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "patterns", "state"),
    [
        ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"], "excluded"),
        ("model.layers.0.mlp.down_proj", ["mlp"], "excluded"),
        ("model.layers.10.mlp.down_proj", ["model.layers.1"], "no"),
        ("model.layers.10.mlp.down_proj", ["model.layers.1*"], "excluded"),
        ("model.layers.1.mlp.gate_up_proj", ["mlp.gate"], "no"),
        ("lm_head", ["head"], "no"),
        ("lm_head", ["model.lm_head"], "no"),
        ("a.qkv_proj", ["*v_proj*"], "excluded"),
        ("a.qkv_proj", ["*.q_proj", "*.k_proj", "*.v_proj"], "no"),
        ("a.qkv_proj", ["a.q_proj", "a.k_proj", "a.v_proj"], "excluded"),
        ("a.qkv_proj", ["a.q_proj"], "refused"),
        ("a.o_proj", ["?"], "refused"),
        ("layers.0.self_attn.o_proj", ["model.layers.0*"], "no"),
        ("language_model.model.x", ["model.x"], "excluded"),
    ],
)
def test_known_traps(layer: str, patterns: list[str], state: str) -> None:
    assert match(layer, tuple(patterns)).state == state


@pytest.mark.parametrize(
    ("patterns", "state"),
    [(["a.experts*"], "excluded"), (["a.experts.*.gate_proj"], "no"), (["a.experts.3.w1"], "no")],
)
def test_experts_are_excluded_as_a_whole(patterns: list[str], state: str) -> None:
    assert match("a.experts", tuple(patterns), is_experts=True).state == state


@pytest.mark.parametrize(
    ("layer", "patterns", "state"),
    [
        ("model.layers.0.self_attn.o_proj", ["model.layers.0.self_attn*"], "no"),
        ("model.layers.0.self_attn.o_proj", ["model.layers.0.self_attn"], "excluded"),
        ("layers.0.self_attn.o_proj", ["model.layers.0.self_attn"], "excluded"),
        ("model.layers.0.mlp.experts", ["layers.0.mlp.experts.3.w1"], "excluded"),
    ],
)
def test_methods_for_blocks_know_no_wildcards(layer: str, patterns: list[str], state: str) -> None:
    assert match_plainly(layer, tuple(patterns)).state == state


def test_modules_are_grouped_as_they_are_loaded() -> None:
    names = ["model.a.v_proj", "model.a.k_proj", "model.a.q_proj", "model.b.experts.1.w1"]
    qkv, experts = layers(names, "llama")

    assert qkv.parts == ("model.a.q_proj", "model.a.k_proj", "model.a.v_proj")
    assert (qkv.name, qkv.leaf, qkv.is_experts) == ("model.a.qkv_proj", "qkv_proj", False)
    assert (experts.name, experts.is_experts) == ("model.b.experts", True)


def test_experts_of_a_quantized_mixtral_are_layers_of_their_own() -> None:
    assert layer_name("a.experts.3.w1", "mixtral") == "a.experts.3.w1"
    assert layer_name("a.experts.3.w1", "qwen3_moe") == "a.experts"


@pytest.mark.parametrize(
    ("layer", "listed", "is_mapped", "expected"),
    [
        ("a.o_proj", ["a.o_proj"], False, "FP8"),
        ("a.qkv_proj", ["a.v_proj"], True, "FP8"),
        ("a.qkv_proj", ["a.q_proj", "a.k_proj", "a.v_proj"], False, None),
        ("a.experts", ["a.experts"], False, "FP8"),
        ("a.experts", ["a.experts.3.w1"], False, "FP8"),
        ("layers.0.x", ["model.layers.0.x"], True, None),
        ("model.lm_head", ["lm_head"], True, "FP8"),
    ],
)
def test_entries_of_a_mixed_list(
    layer: str, listed: list[str], is_mapped: bool, expected: str | None
) -> None:
    assert listed_algo(layer, dict.fromkeys(listed, "fp8"), is_mapped=is_mapped) == expected


def test_parts_in_several_formats_are_refused() -> None:
    with pytest.raises(MixedAlgosError, match="qkv_proj"):
        listed_algo("a.qkv_proj", {"a.q_proj": "FP8", "a.k_proj": "NVFP4"}, is_mapped=True)


@pytest.mark.skipif("SGLANG_SOURCE" not in os.environ, reason="SGLANG_SOURCE is not set")
def test_matching_is_sglangs_own() -> None:
    """20000 random lists: the same verdict as the functions in the source of $SGLANG_SOURCE."""
    own = _sglangs_own()
    generator = random.Random(1)
    for _ in range(20_000):
        patterns = generator.sample(PATTERNS, generator.randint(0, 5))
        layer, is_experts = generator.choice(
            [*((name, False) for name in LAYERS), *((name, True) for name in EXPERTS)]
        )
        expected = own(layer, patterns, is_experts)

        assert match(layer, tuple(patterns), is_experts=is_experts).state == expected, (
            layer,
            patterns,
        )


@pytest.mark.skipif("SGLANG_SOURCE" not in os.environ, reason="SGLANG_SOURCE is not set")
def test_plain_matching_is_sglangs_own() -> None:
    """20000 random lists, as MXFP8's method reads them."""
    skipped = _functions(f"{QUANTIZATION}/utils.py", {"_module_path_match", "is_layer_skipped"})
    generator = random.Random(2)
    for _ in range(20_000):
        patterns = generator.sample(PATTERNS, generator.randint(0, 5))
        layer = generator.choice([*LAYERS, *EXPERTS])
        bases = [pattern.removeprefix("model.") for pattern in patterns]
        both = [name for base in bases for name in (base, f"model.{base}")]
        try:
            expected = "excluded" if skipped["is_layer_skipped"](layer, both) else "no"
        except ValueError:
            expected = "refused"

        assert match_plainly(layer, tuple(patterns)).state == expected, (layer, patterns)


@pytest.mark.skipif("SGLANG_SOURCE" not in os.environ, reason="SGLANG_SOURCE is not set")
def test_entries_are_sglangs_own() -> None:
    """20000 random lists: the same algorithm as the function in the source of $SGLANG_SOURCE."""
    resolve = _sglangs_resolve()
    generator = random.Random(3)
    names = [*LAYERS, *EXPERTS, *(text for text in PATTERNS if "." in text and "*" not in text)]
    for _ in range(20_000):
        chosen = generator.sample(names, generator.randint(0, 4))
        listed = {name: generator.choice(["FP8", "nvfp4"]) for name in chosen}
        layer, is_mapped = generator.choice([*LAYERS, *EXPERTS]), generator.random() < 0.5
        try:
            found = listed_algo(layer, listed, is_mapped=is_mapped) or ""
        except MixedAlgosError:
            found = "refused"

        assert found == resolve(layer, listed, is_mapped), (layer, listed, is_mapped)


@pytest.mark.skipif("SGLANG_SOURCE" not in os.environ, reason="SGLANG_SOURCE is not set")
@pytest.mark.parametrize("listed", [{}, {"a": "FP8"}, {"a": "FP8", "b": "nvfp4"}])
def test_method_of_an_algorithm_is_sglangs_own(listed: dict[str, str]) -> None:
    file = "configs/model_config.py"
    wanted = {"_parse_modelopt_quant_config", "unwrap_modelopt_quantization_config"}
    found = _functions(file, wanted)
    version = NEW if len(found) == 2 else OLD
    entries = {name: {"quant_algo": algo} for name, algo in listed.items()}
    for algo in [*(spelled for one in formats() for spelled in (one, one.lower())), *OTHERS]:
        body = {"quant_algo": algo, "quantized_layers": entries}
        parsed = found["_parse_modelopt_quant_config"](None, {"quantization": body})
        expected = parsed["quant_method"] if isinstance(parsed, dict) else None

        assert method_of(algo, listed, version) == expected, algo


def _functions(file: str, wanted: set[str]) -> dict[str, Callable[..., object]]:
    """Return the first function of each name in a file below sglang/srt, without importing it."""
    root = Path(os.environ["SGLANG_SOURCE"]) / "sglang" / "srt"
    names: dict[str, object] = {
        "re": re,
        "lru_cache": lru_cache,
        "Mapping": Mapping,
        "MappingProxyType": MappingProxyType,
        "List": list,
        "Optional": dict,
        "Tuple": tuple,
        "_FALLBACK_FUSED_SHARDS": {
            name: list(group)
            for group, name in FUSED_NAMES.items()
            if name in ("qkv_proj", "gate_up_proj")
        },
    }
    for node in ast.walk(ast.parse((root / file).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in wanted - set(names):
            node.decorator_list, node.returns = [], None
            exec(ast.unparse(node), names)
    return {name: found for name, found in names.items() if name in wanted and callable(found)}


def _sglangs_own() -> Callable[[str, list[str], bool], str]:
    """Return what ModelOptQuantConfig._get_quant_method asks of its two functions."""
    skipped = _functions(f"{QUANTIZATION}/utils.py", {"_module_path_match", "is_layer_skipped"})
    excluded = _functions(
        f"{QUANTIZATION}/modelopt_quant.py", {"_compile_exclusion_pattern", "is_layer_excluded"}
    )

    class Config:
        exclude_modules: list[str]

    def own(layer: str, patterns: list[str], is_experts: bool) -> str:
        config = Config()
        config.exclude_modules = patterns
        try:
            hit = not is_experts and skipped["is_layer_skipped"](layer, patterns, {})
            return "excluded" if hit or excluded["is_layer_excluded"](config, layer) else "no"
        except (ValueError, re.error):
            return "refused"

    return own


def _sglangs_resolve() -> Callable[[str, Mapping[str, str], bool], str]:
    """Return SGLang's lookup in a mixed list, cut out of its source."""
    found = _functions(
        f"{QUANTIZATION}/modelopt_quant.py",
        {"_resolve_quant_algo", "_quantized_layer_prefix_candidates"},
    )

    class Config:
        packed_modules_mapping: ClassVar[dict[str, list[str]]]
        quantized_layers: ClassVar[dict[str, dict[str, str]]]
        _quantized_layer_prefix_candidates = staticmethod(
            found["_quantized_layer_prefix_candidates"]
        )

    def own(layer: str, listed: Mapping[str, str], is_mapped: bool) -> str:
        mapping = {name: list(group) for group, name in FUSED_NAMES.items()} if is_mapped else {}
        config = Config()
        config.packed_modules_mapping = mapping  # type: ignore[misc]
        config.quantized_layers = {  # type: ignore[misc]
            name: {"quant_algo": algo} for name, algo in listed.items()
        }
        try:
            algo = found["_resolve_quant_algo"](config, layer)
        except ValueError:
            return "refused"
        return str(algo or "")

    return own
