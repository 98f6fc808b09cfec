"""What vLLM makes of a list of exclusions: the known traps, and its own code as the oracle."""

import ast
import os
import random
import subprocess
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

import pytest

from qvalidate.rules.vllm_matching import layer_name, layers, listed_entry, match
from qvalidate.rules.vllm_support import FUSED_NAMES

LAYERS = [
    "lm_head",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.11.self_attn.qkv_proj",
    "model.layers.1.mlp.gate_up_proj",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.experts",
    "model.layers.1.mlp.shared_experts.gate_up_proj",
    "model.layers.1.mlp.shared_experts.down_proj",
    "language_model.model.layers.1.self_attn.o_proj",
]
PATTERNS = [
    "lm_head", "head", "model.lm_head", "*lm_head*", "model.layers.1", "model.layers.1*",
    "model.layers.1.*", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.v_proj", "*.q_proj", "*.k_proj", "*.v_proj", "mlp.gate",
    "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "*experts*", "re:.*", "*",
    "model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp.shared_experts.down_proj",
    "model.layers.1.mlp.gate_up_proj", "model.layers.1.self_attn*",
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "patterns", "state"),
    [
        ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"], "excluded"),
        ("model.layers.10.mlp.down_proj", ["model.layers.1"], "excluded"),
        ("model.layers.10.mlp.down_proj", ["model.layers.1*"], "excluded"),
        ("model.layers.10.mlp.down_proj", ["model.layers.1.*"], "no"),
        ("model.layers.1.mlp.gate_up_proj", ["mlp.gate"], "excluded"),
        ("lm_head", ["head"], "excluded"),
        ("lm_head", ["model.lm_head"], "no"),
        ("a.qkv_proj", ["*.q_proj", "*.k_proj", "*.v_proj"], "no"),
        ("a.qkv_proj", ["a.q_proj", "a.k_proj", "a.v_proj"], "excluded"),
        ("a.qkv_proj", ["a.q_proj"], "partial"),
        ("a.qkv_proj", ["re:.*"], "no"),
        ("a.experts", ["a.experts.3.w1"], "excluded"),
        ("language_model.model.x", ["model.x"], "excluded"),
    ],
)
def test_known_traps(layer: str, patterns: list[str], state: str) -> None:
    assert match(layer, tuple(patterns)).state == state


def test_modules_are_grouped_as_they_are_loaded() -> None:
    found = layers(["a.v_proj", "a.k_proj", "a.q_proj", "a.o_proj", "b.experts.1.w1"])

    assert found["a.qkv_proj"].parts == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert found["a.o_proj"].parts == ("a.o_proj",)
    assert found["b.experts"].is_experts
    assert layer_name("b.experts.gate_up_proj") == "b.experts"


@pytest.mark.engine_vllm
@pytest.mark.skipif(
    "QVALIDATE_VLLM_PYTHON" not in os.environ, reason="QVALIDATE_VLLM_PYTHON is not set"
)
def test_matching_is_vllms_own() -> None:
    """20000 random lists: the same verdict as the functions in the installed vLLM's source."""
    own = _vllms_own()
    generator = random.Random(1)
    for _ in range(20_000):
        patterns = generator.sample(PATTERNS, generator.randint(0, 5))
        layer = generator.choice(LAYERS)

        assert match(layer, tuple(patterns)).state == own(layer, patterns), (layer, patterns)


@pytest.mark.parametrize(
    ("layer", "listed", "expected"),
    [
        ("a.o_proj", ["a.o_proj"], "a.o_proj"),
        ("a.qkv_proj", ["a.v_proj"], "a.v_proj"),
        ("a.o_proj", ["a.q_proj"], None),
        ("a.experts", ["a.experts.3.w1"], "a.experts.3.w1"),
        ("a.experts", ["a.shared_expert.up_proj"], "a.shared_expert.up_proj"),
        ("model.lm_head", ["lm_head"], "lm_head"),
        ("language_model.model.x", ["model.language_model.x"], "model.language_model.x"),
    ],
)
def test_entries_of_a_mixed_list(layer: str, listed: list[str], expected: str | None) -> None:
    assert listed_entry(layer, dict.fromkeys(listed, "FP8")) == expected


@pytest.mark.engine_vllm
@pytest.mark.skipif(
    "QVALIDATE_VLLM_PYTHON" not in os.environ, reason="QVALIDATE_VLLM_PYTHON is not set"
)
def test_entries_are_vllms_own() -> None:
    """20000 random lists: the same algorithm as the function in the installed vLLM's source."""
    resolve = _vllms_resolve()
    generator = random.Random(2)
    names = [*LAYERS, *(pattern for pattern in PATTERNS if "." in pattern and "*" not in pattern)]
    for _ in range(20_000):
        chosen = generator.sample(names, generator.randint(0, 4))
        listed = {name: generator.choice(["FP8", "NVFP4"]) for name in chosen}
        layer = generator.choice(LAYERS)
        expected = resolve(layer, listed)
        entry = listed_entry(layer, listed)

        if expected != "refused":
            assert (listed[entry] if entry else None) == expected, (layer, listed)


def _vllms_resolve():  # type: ignore[no-untyped-def]
    """Return vLLM's lookup in a mixed list, cut out of its source."""
    tree = ast.parse((_vllms_folder() / "modelopt.py").read_text())
    names: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in (
            "_resolve_quant_algo",
            "_quantized_layer_prefix_candidates",
        ):
            node.decorator_list = []
            exec(ast.unparse(node), names)

    class Config:
        packed_modules_mapping: ClassVar = {n: list(group) for group, n in FUSED_NAMES.items()}
        _quantized_layer_prefix_candidates = staticmethod(
            names["_quantized_layer_prefix_candidates"]
        )

    def own(layer: str, listed: Mapping[str, str]) -> str | None:
        config = Config()
        config.quantized_layers = {name: {"quant_algo": algo} for name, algo in listed.items()}
        try:
            return names["_resolve_quant_algo"](config, layer)
        except ValueError:
            return "refused"

    return own


def _vllms_folder() -> Path:
    script = "import importlib.util as i; print(i.find_spec('vllm').submodule_search_locations[0])"
    python = os.environ["QVALIDATE_VLLM_PYTHON"]
    root = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return Path(root.stdout.strip()) / "model_executor" / "layers" / "quantization"


def _vllms_own():  # type: ignore[no-untyped-def]
    """Return vLLM's matching, cut out of its source so that nothing of it is imported."""
    folder = _vllms_folder()
    names = {
        "Mapping": Mapping,
        "MappingProxyType": MappingProxyType,
        "Literal": Literal,
        "fnmatch": fnmatch,
        "WeightsMapper": object,
    }
    wanted = {"is_layer_skipped", "is_layer_excluded", "apply_vllm_mapper"}
    for file in ("utils/quant_utils.py", "modelopt.py"):
        for node in ast.walk(ast.parse((folder / file).read_text())):
            # the base class comes first; the mixed config overrides one of them
            if isinstance(node, ast.FunctionDef) and node.name in wanted - set(names):
                exec(ast.unparse(node), names)

    class Config:
        def __init__(self, patterns: list[str]) -> None:
            self.exclude_modules = patterns
            self.packed_modules_mapping = {n: list(group) for group, n in FUSED_NAMES.items()}

    class Mapper:
        def apply_list(self, patterns: list[str]) -> list[str]:
            return patterns

    def own(layer: str, patterns: list[str]) -> str:
        config = Config(list(patterns))
        names["apply_vllm_mapper"](config, Mapper())
        try:
            return "excluded" if names["is_layer_excluded"](config, layer) else "no"
        except ValueError:
            return "partial"

    return own
