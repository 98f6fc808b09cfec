"""exclude_modules: the collapse that ModelOpt writes."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qconvert.excludes import collapse


@pytest.mark.parametrize(
    ("unquantized", "quantized", "expected"),
    [
        (
            ["lm_head", "model.embed_tokens"],
            ["model.layers.0.self_attn.q_proj"],
            ["lm_head", "model.embed_tokens"],
        ),
        # ModelOpt 0.47, qwen3_moe with experts only: goldens' exclude_modules
        (
            [
                "lm_head",
                "model.embed_tokens",
                "model.layers.0.self_attn.q_proj",
                "model.layers.0.mlp.gate_proj",
                "model.layers.1.mlp.gate",
                "model.layers.1.self_attn.q_proj",
                "model.layers.1.self_attn.o_proj",
            ],
            ["model.layers.1.mlp.experts.0.gate_proj"],
            [
                "lm_head",
                "model.embed_tokens",
                "model.layers.0*",
                "model.layers.1.mlp.gate",
                "model.layers.1.self_attn*",
            ],
        ),
        # "a.mlp*" would take a.mlp2 with it
        (["a.mlp.up"], ["a.mlp2.up"], ["a.mlp.*"]),
        # layer 1 is a prefix of layer 10 as text
        (["m.layers.1.up"], ["m.layers.10.up"], ["m.layers.1.*"]),
        # a module below a quantized one goes by its own name
        (["a.b"], ["a"], ["a.b"]),
        ([], ["a"], []),
    ],
)
def test_collapse_writes_the_shortest_safe_prefix(
    unquantized: list[str], quantized: list[str], expected: list[str]
) -> None:
    assert collapse(unquantized, quantized) == expected


_NAMES = st.lists(st.sampled_from(["a", "b", "ab", "1", "10"]), min_size=1, max_size=4).map(
    ".".join
)


@given(st.dictionaries(_NAMES, st.booleans(), max_size=12))
def test_collapse_names_every_kept_module_and_no_quantized_one(modules: dict[str, bool]) -> None:
    kept = [name for name, quantized in modules.items() if not quantized]
    quantized = [name for name, quantized in modules.items() if quantized]

    patterns = collapse(kept, quantized)

    assert all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in kept)
    assert not any(fnmatchcase(name, pattern) for pattern in patterns for name in quantized)
