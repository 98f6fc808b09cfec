"""Every module is there that the model type, the config or the other layers imply."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice

from qschema.architectures import KNOWN
from qvalidate.context import LM_HEAD, Context, positive_int
from qvalidate.rules.layers import Layers, alike, decoder, files, stacks
from qvalidate.rules.registry import Severity, Spot, rule, some
from qvalidate.rules.required import LAYER_PARTS, ROOTS, TIED_BY_DEFAULT, Part, tensor

# six digits are more layers or experts than any model has; longer ones are no number
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d{1,6})\.(?P<rest>.+)")


@rule(
    "missing-module",
    severity="error",
    summary="a module that the model type, the config or the other layers imply has no tensors",
    text="""Three sources say what must be there. The model type, where it is a known one: its
    attention, MLP and norms in each layer, the embedding, the last norm, and lm_head unless it
    is tied. config.json: layers up to num_hidden_layers, experts up to their number. And, for
    any model, the other layers and experts: what all layers like this one own, and this one
    lacks alone. Layers that own something else instead (dense among MoE layers, linear among
    full attention) are another kind, and a lack that recurs is taken for the architecture. For
    an unknown type a lack of the first layer is a warning, since some models leave something
    out there. vLLM fills the hole with uninitialised memory and does not say so.""",
    effects={"vllm": "wrong"},
    evidence=(
        "vLLM 0.33.0 model_executor/model_loader/default_loader.py:510-524",
        "run with vLLM 0.32.0 on CPU: without an o_proj it loads, and generates",
    ),
)
def missing_module(context: Context) -> Iterator[Spot]:
    seen: set[str] = set()
    for spot in _missing(context):
        if spot.where not in seen:
            seen.add(spot.where)
            yield spot


def _missing(context: Context) -> Iterator[Spot]:
    found = stacks(context.modules)
    near = files(context.modules)
    if context.model_type in KNOWN:
        yield from _layers(context, found)
    if context.model_type in LAYER_PARTS:
        yield from _declared(context, found, near)
    yield from _like_the_others(context, found, near)
    yield from _experts(context)


def _layers(context: Context, found: Mapping[str, Layers]) -> Iterator[Spot]:
    """Yield the gaps in the numbers of the layers."""
    expected = positive_int(context.checkpoint.config, "num_hidden_layers")
    own = decoder(found)
    if own is None and expected is not None:
        yield Spot(_file(context), "model.layers.0", f"no tensors of any of {expected} layers")
    for stack, layers in found.items():
        total = expected if stack == own else None
        yield from _gaps(context, stack, layers.keys(), total or max(layers) + 1)


def _declared(
    context: Context, found: Mapping[str, Layers], near: Mapping[str, str]
) -> Iterator[Spot]:
    """Yield what the model type's layers and root always own and here do not."""
    assert context.model_type is not None
    stack = decoder(found)
    if stack is None:
        return
    owned = set().union(*found[stack].values())
    for index, atoms in _without_mtp(context, found[stack]).items():
        for part in LAYER_PARTS[context.model_type]:
            for name in _lacking(part, atoms, owned):
                message = f"missing; every layer of {context.model_type} has it"
                layer = f"{stack}.{index}"
                yield Spot(near[layer], f"{layer}.{name}", message)
    for name in _roots(context, stack):
        if f"{name}.weight" not in context.checkpoint.tensors:
            message = f"missing; {context.model_type} has it outside its layers"
            yield Spot(_file(context), f"{name}.weight", message)


def _without_mtp(context: Context, layers: Layers) -> Layers:
    depth = positive_int(context.checkpoint.config, "num_hidden_layers")
    return {index: owned for index, owned in layers.items() if depth is None or index < depth}


def _roots(context: Context, stack: str) -> Iterator[str]:
    parent = stack.removesuffix("layers")
    yield from (f"{parent}{name}" for name in ROOTS)
    config = context.checkpoint.config
    tied = context.is_tied or (
        context.model_type in TIED_BY_DEFAULT and "tie_word_embeddings" not in config
    )
    # models for embeddings and classes have no head
    architectures = config.get("architectures")
    has_head = not isinstance(architectures, list) or any(
        isinstance(name, str) and name.endswith("ForCausalLM") for name in architectures
    )
    if parent and has_head and not tied:
        yield LM_HEAD


def _lacking(part: Part, atoms: frozenset[str], owned: set[str]) -> Iterator[str]:
    """Yield the tensors that `atoms` lacks of the way it stores `part`.

    The way is the one that it has most of, then the one that some layer has all of.
    """
    ways = [[tensor(name) for name in way] for way in part]
    if any(atoms.issuperset(way) for way in ways):
        return
    best = max(ways, key=lambda way: (len(atoms.intersection(way)), owned.issuperset(way)))
    yield from (name for name in best if name not in atoms)


def _like_the_others(
    context: Context, found: Mapping[str, Layers], near: Mapping[str, str]
) -> Iterator[Spot]:
    """Yield what a layer lacks alone among the layers of its stack."""
    own = decoder(found)
    for stack, layers in found.items():
        compared = _without_mtp(context, layers) if stack == own else layers
        for index, lacking, num_others in alike(compared):
            is_known = context.model_type in KNOWN and stack == own
            severity: Severity | None = None if is_known or index != min(layers) else "warning"
            for name in sorted(lacking):
                message = f"missing; the {num_others} layers like this one have it"
                layer = f"{stack}.{index}"
                yield Spot(near[layer], f"{layer}.{name}", message, severity)


def _experts(context: Context) -> Iterator[Spot]:
    """Yield experts that are missing, and what one expert lacks and another of the layer has."""
    experts: dict[str, dict[int, set[str]]] = {}
    shards: dict[str, str] = {}
    for name, module in context.modules.items():
        if "weight" in module.tensors and (found := _EXPERT.fullmatch(name)):
            by_index = experts.setdefault(found["experts"], {})
            by_index.setdefault(int(found["index"]), set()).add(found["rest"])
            shards.setdefault(found["experts"], module.file)
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    total = positive_int(context.checkpoint.config, *keys)
    for name, by_index in experts.items():
        if context.model_type in KNOWN:
            yield from _gaps(context, name, by_index.keys(), total or max(by_index) + 1)
        every = set().union(*by_index.values())
        for index, owned in sorted(by_index.items()):
            for rest in sorted(every - owned):
                message = f"missing; other experts of {name} have it"
                yield Spot(shards[name], f"{name}.{index}.{rest}.weight", message)


def _gaps(context: Context, name: str, found: Iterable[int], total: int) -> Iterator[Spot]:
    """Yield one spot for the numbers below `total` that are not `found`, whatever `total` is."""
    inside = {index for index in found if index < total}
    num_missing = total - len(inside)
    if num_missing == 0:
        return
    first = islice((index for index in count() if index not in inside), min(num_missing, 5))
    names = [f"{name}.{index}" for index in first]
    more = f", ... ({num_missing} in all)" if num_missing > len(names) else ""
    yield Spot(_file(context), names[0], f"no tensors of {some(names)}{more}")


def _file(context: Context) -> str:
    """Return the file that lists the tensors: the index, or the only shard."""
    checkpoint = context.checkpoint
    return str(context.path / (checkpoint.index or checkpoint.shards[0].file.name))
