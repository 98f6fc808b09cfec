"""Names that Transformers 5 has in memory and no engine knows, back to those of the hub.

ModelOpt 0.47.0 leaves them where it can't turn the conversion around: the experts of a Mixtral in
FP8 blocks come out as `mlp.experts.E.gate_proj`. vLLM 0.33.0 stops at them.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

from qschema.architectures import HUB_PARTS, experts_of, hub_name
from qschema.safetensors import Stored
from qschema.strict import Json
from qvalidate.assignment import assign
from qvalidate.context import Context, Module
from qvalidate.documents import QuantConfig

# model type -> the part of an expert in memory -> on the hub
_EXPERT_PARTS: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
}


def hub_named(context: Context) -> tuple[Context, Mapping[str, str]]:
    """Return `context` with the hub's names, in its documents too, and new -> old tensor name.

    The context is the same, and nothing is renamed, where two tensors would get one name.
    """
    model_type = context.model_type
    if model_type not in HUB_PARTS:
        return context, {}
    tensors: dict[str, Stored] = {}
    origin: dict[str, str] = {}
    for name, stored in context.checkpoint.tensors.items():
        new = on_hub(name, model_type)
        tensors[new] = replace(stored, name=new)
        if new != name:
            origin[new] = name
    if not origin or len(tensors) < len(context.checkpoint.tensors):
        return context, {}
    in_config, in_file = (
        config and _renamed(config, model_type) for config in (context.in_config, context.in_file)
    )
    assignment = assign(in_config or in_file, in_file)
    modules: dict[str, Module] = {}
    for name, module in context.modules.items():
        new = on_hub(name, model_type)
        owned = {
            suffix: tensors[on_hub(stored.name, model_type)]
            for suffix, stored in module.tensors.items()
        }
        modules[new] = Module(new, owned, assignment.format_of(new), module.is_stack)
    renamed = replace(
        context,
        checkpoint=replace(context.checkpoint, tensors=tensors),
        in_config=in_config,
        in_file=in_file,
        assignment=assignment,
        modules=dict(sorted(modules.items())),
    )
    return renamed, origin


def on_hub(name: str, model_type: str | None) -> str:
    """Return the hub's name of a tensor, a module or a pattern over modules."""
    found = hub_name(name, model_type=model_type)
    parts = found.split(".")
    if experts_of(found) is not None:
        leaves = _EXPERT_PARTS.get(model_type or "", {})
        parts = [leaves.get(part, part) for part in parts]
    return ".".join(parts)


def _renamed(config: QuantConfig, model_type: str | None) -> QuantConfig:
    """Return `config` with the hub's names in its two lists."""
    raw = deepcopy(dict(config.raw))
    nested = raw.get("quantization")
    body = nested if isinstance(nested, dict) else raw
    patterns, layers = body.get(config.exclude_key), body.get("quantized_layers")
    if isinstance(patterns, list):
        body[config.exclude_key] = [_on_hub(pattern, model_type) for pattern in patterns]
    if isinstance(layers, dict):
        body["quantized_layers"] = {
            on_hub(name, model_type): entry for name, entry in layers.items()
        }
    return replace(config, raw=raw)


def _on_hub(pattern: Json, model_type: str | None) -> Json:
    return on_hub(pattern, model_type) if isinstance(pattern, str) else pattern
