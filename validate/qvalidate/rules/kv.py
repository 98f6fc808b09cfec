"""The scales of a quantized KV cache: in pairs, in every layer or in none, one number each."""

from collections.abc import Iterator, Mapping

from qschema.safetensors import Stored
from qvalidate.context import KV_SCALES, Context
from qvalidate.rules.registry import Spot, rule, some

_BIASES = frozenset({"k_bias", "v_bias"})
# `qschema` name of the cache whose numbers are shifted by a bias per head and dimension
_WITH_BIAS = "NVFP4_AFFINE"


@rule(
    "kv-scale-unpaired",
    severity="error",
    summary="an attention has a scale for its keys or its values, but not for both",
    text="""The cache of a layer is quantized as a whole. vLLM takes the one scale for both, and
    what it was not made for saturates or loses its small numbers, without a message. With an
    NVFP4_AFFINE cache, k_bias and v_bias belong to every pair.""",
    effects={"vllm": "wrong"},
    evidence=("vLLM 0.33.0 layers/quantization/kv_cache.py:21-42",),
)
def kv_scale_unpaired(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    has_bias = obeyed is not None and obeyed.kv_algo == _WITH_BIAS
    for attention, owned in _attentions(context).items():
        wanted = KV_SCALES | _BIASES if has_bias or _BIASES & owned.keys() else KV_SCALES
        file = str(next(iter(owned.values())).file)
        for suffix in sorted(wanted - owned.keys()):
            message = f"missing; {some(sorted(owned))} of {attention} are there"
            yield Spot(file, _name(attention, suffix, owned), message)


@rule(
    "kv-scale-incomplete",
    severity="error",
    summary="some layers have scales for the KV cache and others do not",
    text="""Calibration sees every layer. Without scales vLLM caches a layer's keys and values with
    the scale 1.0 and a warning at most. A checkpoint without any such scale is no mistake: presets
    that cast to the cache's dtype write none.""",
    effects={"vllm": "wrong"},
    evidence=("vLLM 0.33.0 layers/quantization/kv_cache.py:21-42",),
)
def kv_scale_incomplete(context: Context) -> Iterator[Spot]:
    found = _attentions(context)
    if context.obeyed is None or context.obeyed.kv_algo is None or not found:
        return
    like = {attention.rpartition(".")[2] for attention in found}
    for name, module in context.modules.items():
        attention, _, leaf = name.rpartition(".")
        is_keys = leaf == "k_proj" and attention.rpartition(".")[2] in like
        if is_keys and attention not in found:
            message = f"missing; {len(found)} other layers have scales for the KV cache"
            yield Spot(module.file, f"{name}.k_scale", message)


@rule(
    "kv-scale-shape",
    severity="error",
    summary="a scale of the KV cache is not one F32 number",
    text="""Engines take one number for all keys of a layer and one for all values: "KV-cache scale
    expects a scalar weight".""",
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0 layers/quantization/base_config.py:220-252",),
)
def kv_scale_shape(context: Context) -> Iterator[Spot]:
    for owned in _attentions(context).values():
        for suffix in sorted(KV_SCALES & owned.keys()):
            stored = owned[suffix]
            if stored.dtype != "F32" or stored.shape not in ((), (1,)):
                message = f"expected F32 [], got {stored.dtype} {list(stored.shape)}"
                yield Spot(str(stored.file), stored.name, message)


def _attentions(context: Context) -> Mapping[str, Mapping[str, Stored]]:
    """Return attention -> suffix -> what it owns for the KV cache."""
    found: dict[str, dict[str, Stored]] = {}
    for name, module in context.modules.items():
        for suffix in (KV_SCALES | _BIASES) & module.tensors.keys():
            parent, _, leaf = name.rpartition(".")
            attention = parent if leaf == f"{suffix[0]}_proj" else name
            found.setdefault(attention, {})[suffix] = module.tensors[suffix]
    return found


def _name(attention: str, suffix: str, owned: Mapping[str, Stored]) -> str:
    """Return the name of the missing tensor, spelt like its neighbours."""
    is_below = any("_proj." in stored.name for stored in owned.values())
    return f"{attention}.{suffix[0]}_proj.{suffix}" if is_below else f"{attention}.{suffix}"
