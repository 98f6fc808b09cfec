"""The numbers in config.json are numbers, and the weights have the sizes that they say.

Rows and columns are those of the Linear: of a packed weight, what it unpacks to. Sources:
Transformers 5.14 models/*/modeling_*.py of the known model types.
"""

import re
from collections.abc import Iterator, Mapping

from qschema.architectures import KNOWN, text_config
from qschema.dtypes import HIGH_PRECISION
from qvalidate.context import LM_HEAD, Context, positive_int
from qvalidate.layout import sizes
from qvalidate.rules.registry import Spot, rule

_POSITIVE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
# models without experts may say 0
_NOT_NEGATIVE = ("num_local_experts", "num_experts", "n_routed_experts")
_IN_LAYER = re.compile(r"(?:model\.)?layers\.\d+\.(?P<name>.+)")
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.\d+\.(?P<leaf>\w+)")
# attention of its own shapes
_OTHER_ATTENTION = frozenset({"deepseek_v3"})
# model types whose heads are not hidden_size / num_attention_heads wide where head_dim is missing
_OTHER_HEAD_DIM = frozenset({"gemma3_text"})

Size = tuple[int | None, int | None]


@rule(
    "config-number",
    severity="error",
    summary="a size or count in config.json is no positive whole number",
    text="""Sizes and counts of the model are whole numbers above zero (experts: not below).
    true counts as 1 in Python, -1 and 0 make empty models; engines and Transformers differ in
    what they make of them. Checked for model types with known names only.""",
    effects={"vllm": "unknown"},
)
def config_number(context: Context) -> Iterator[Spot]:
    if context.model_type not in KNOWN:
        return
    text = text_config(context.checkpoint.config)
    root = "$" if text is context.checkpoint.config else "$.text_config"
    for keys, least in ((_POSITIVE, 1), (_NOT_NEGATIVE, 0)):
        for key in keys:
            found = text.get(key)
            if found is None or (type(found) is int and found >= least):
                continue
            message = f"expected a whole number of at least {least}, found {str(found)[:40]}"
            yield Spot(context.config_file, f"{root}.{key}", message)


@rule(
    "shape-disagrees-with-config",
    severity="error",
    summary="a weight does not have the rows and columns that config.json implies",
    text="""Engines make each layer as large as config.json says, and copy the weight into it.
    vLLM stops where rows are too few, and cuts off without a message what is too much: rows of
    q_proj, columns of o_proj. A transposed weight looks like this too. Checked for model types
    with known names only.""",
    effects={"vllm": "unknown"},
    evidence=("vLLM 0.33.0, run with its own loader: too many rows of q are truncated",),
)
def shape_disagrees_with_config(context: Context) -> Iterator[Spot]:
    if context.model_type not in KNOWN:
        return
    in_layers, at_root = _expected(context)
    for name, module in context.modules.items():
        if match := _IN_LAYER.fullmatch(name):
            expert = _EXPERT.fullmatch(match["name"])
            key = f"experts.{expert['leaf']}" if expert else match["name"]
            expected = in_layers.get(key)
        else:
            expected = at_root.get(name.removeprefix("model."))
        found = _size(context, name)
        if expected is None or found is None:
            continue
        if any(want is not None and want != got for want, got in zip(expected, found, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            message = f"expected [{wanted}] by config.json, got {list(found)}"
            yield Spot(module.file, module.weight_name, message)


def _expected(context: Context) -> tuple[Mapping[str, Size], Mapping[str, Size]]:
    """Return name below the layer -> (rows, columns), and the same at the root.

    A size that config.json does not tell is None.
    """
    config = context.checkpoint.config
    hidden = positive_int(config, "hidden_size")
    dense = positive_int(config, "intermediate_size")
    experts = positive_int(config, "moe_intermediate_size")
    if context.model_type == "mixtral":
        experts = dense
    table: dict[str, Size] = {
        **_mlp("mlp", dense, hidden),
        **_mlp("experts", experts, hidden),
        "experts.w1": (experts, hidden),
        "experts.w3": (experts, hidden),
        "experts.w2": (hidden, experts),
    }
    if context.model_type not in _OTHER_ATTENTION:
        table |= _attention(context, hidden)
    vocab = positive_int(config, "vocab_size")
    return table, {"embed_tokens": (vocab, hidden), LM_HEAD: (vocab, hidden)}


def _mlp(parent: str, middle: int | None, hidden: int | None) -> dict[str, Size]:
    return {
        f"{parent}.gate_proj": (middle, hidden),
        f"{parent}.up_proj": (middle, hidden),
        f"{parent}.gate_up_proj": (_times(middle, 2), hidden),
        f"{parent}.down_proj": (hidden, middle),
    }


def _attention(context: Context, hidden: int | None) -> dict[str, Size]:
    config = context.checkpoint.config
    heads = positive_int(config, "num_attention_heads")
    kv_heads = positive_int(config, "num_key_value_heads") or heads
    head_dim = positive_int(config, "head_dim")
    if head_dim is None and hidden and heads and context.model_type not in _OTHER_HEAD_DIM:
        head_dim = hidden // heads
    queries, keys = _times(heads, head_dim), _times(kv_heads, head_dim)
    fused = None if queries is None or keys is None else queries + 2 * keys
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.qkv_proj": (fused, hidden),
        "self_attn.o_proj": (hidden, queries),
    }


def _times(size: int | None, factor: int | None) -> int | None:
    return None if size is None or factor is None else size * factor


def _size(context: Context, name: str) -> tuple[int, int] | None:
    """Return the Linear's (rows, columns), None where its format or its rank does not tell."""
    weight = context.modules[name].tensors.get("weight")
    if weight is None:
        return None
    if weight.dtype in HIGH_PRECISION:
        return (weight.shape[0], weight.shape[1]) if len(weight.shape) == 2 else None
    module = context.modules[name]
    return sizes(module, module.declared) if module.declared else None
