"""Whether the layers can be divided over the GPUs of `--tp`, `--ep` and `--pp`, in any engine.

What an engine's blocks and groups need beyond that is in the engine's own modules.
"""

from collections.abc import Iterator, Mapping

from qschema.architectures import text_config
from qvalidate.context import Context, Module, positive_int
from qvalidate.layout import sizes
from qvalidate.rules.registry import Effect, Spot, rule

# last names of layers that engines divide by their columns, and by their rows; others are repeated
_BY_COLUMNS = frozenset({"o_proj", "down_proj", "w2", "out_proj", "fc2"})
_BY_ROWS = frozenset(
    {"q_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "q_b_proj", "kv_b_proj"}
)
_KEYS_VALUES = frozenset({"k_proj", "v_proj"})

_EVIDENCE = (
    "vLLM 0.33.0 config/model.py verify_with_parallel_config; distributed/utils.py divide",
    "SGLang 0.5.23 layers/linear.py and model files: divide(), heads % tp",
)
_EFFECTS: Mapping[str, Effect] = {"vllm": "refuses", "sglang": "refuses"}


def local_sizes(context: Context, module: Module) -> tuple[int, int] | None:
    """Return (rows, columns) of the module on each GPU, rounded down; None for unknown sizes.

    Key and value heads that are fewer than the GPUs are repeated, a whole head on each.
    """
    found = sizes(module, module.declared) if module.declared else None
    if found is None:
        return None
    rows, columns = found
    tp, leaf = context.deployment.tp, module.name.rpartition(".")[2]
    if leaf in _BY_COLUMNS:
        return rows, columns // tp
    if leaf in _KEYS_VALUES:
        heads = kv_heads(context)
        return (rows // min(tp, heads) if heads else rows // tp), columns
    return (rows // tp if leaf in _BY_ROWS else rows), columns


def heads(context: Context) -> int | None:
    """Return the number of query heads."""
    return positive_int(context.checkpoint.config, "num_attention_heads", "n_head")


def kv_heads(context: Context) -> int | None:
    """Return the number of key and value heads."""
    return positive_int(context.checkpoint.config, "num_key_value_heads") or heads(context)


@rule(
    "tp-heads",
    severity="error",
    summary="the attention heads can't be divided over the GPUs of --tp",
    text="""Each GPU takes the same number of query heads, and of key and value heads; where there
    are fewer of these than GPUs, each is repeated on the same number of GPUs.""",
    effects=_EFFECTS,
    evidence=_EVIDENCE,
)
def tp_heads(context: Context) -> Iterator[Spot]:
    tp = context.deployment.tp
    queries, keys = heads(context), kv_heads(context)
    if queries is not None and queries % tp:
        message = f"{queries} heads can't be divided over {tp} GPUs"
        yield Spot(context.config_file, _path(context, "num_attention_heads"), message)
    elif keys is not None and keys % tp and tp % keys:
        message = f"{keys} key and value heads can't be divided over, or repeated on, {tp} GPUs"
        yield Spot(context.config_file, _path(context, "num_key_value_heads"), message)


@rule(
    "tp-size",
    severity="error",
    summary="a layer's rows or columns can't be divided over the GPUs of --tp",
    text="""Engines divide q, k, v, gate and up by their rows, and o and down by their columns, and
    stop where that leaves a rest. They pad the vocabulary only.""",
    effects=_EFFECTS,
    evidence=_EVIDENCE,
)
def tp_size(context: Context) -> Iterator[Spot]:
    tp = context.deployment.tp
    if tp == 1:
        return
    for module, declared in context.encoded:
        found, leaf = sizes(module, declared), module.name.rpartition(".")[2]
        if found is None:
            continue
        for names, size, kind in ((_BY_ROWS, found[0], "rows"), (_BY_COLUMNS, found[1], "columns")):
            if leaf in names and size % tp:
                message = f"has {size} {kind}, which can't be divided over {tp} GPUs"
                yield Spot(module.file, module.weight_name, message)


@rule(
    "pp-layers",
    severity="error",
    summary="there are fewer layers than GPUs in --pp",
    text="""Each stage of a pipeline has at least one layer. Engines divide unevenly where they
    must.""",
    effects=_EFFECTS,
    evidence=("vLLM 0.33.0 distributed/utils.py get_pp_indices",),
)
def pp_layers(context: Context) -> Iterator[Spot]:
    layers = positive_int(context.checkpoint.config, "num_hidden_layers", "n_layer")
    if layers is not None and layers < context.deployment.pp:
        message = f"{layers} layers for {context.deployment.pp} stages"
        yield Spot(context.config_file, _path(context, "num_hidden_layers"), message)


@rule(
    "ep-experts",
    severity="error",
    summary="there are fewer experts than GPUs in --ep, or none",
    text="""Expert parallelism gives each GPU whole experts. vLLM gives some GPUs one more where
    they can't be divided evenly.""",
    effects=_EFFECTS,
    evidence=("vLLM 0.33.0 model_executor/layers/fused_moe/layer.py determine_expert_map",),
)
def ep_experts(context: Context) -> Iterator[Spot]:
    keys = ("num_local_experts", "n_routed_experts", "num_experts")
    experts = positive_int(context.checkpoint.config, *keys) or 0
    if context.deployment.ep > 1 and experts < context.deployment.ep:
        message = f"{experts} experts for {context.deployment.ep} GPUs"
        where = next((key for key in keys if key in text_config(context.checkpoint.config)), "")
        yield Spot(context.config_file, _path(context, where), message)


def _path(context: Context, key: str) -> str:
    nested = context.checkpoint.config.get("text_config")
    prefix = "$.text_config" if isinstance(nested, dict) and key in nested else "$"
    return f"{prefix}.{key}" if key else prefix
