"""Which format the stored tensors have: by the documents where they fit, else by elimination.

A format fits a module whose tensors are those of its declaration, after what `tensors` can mend. It
is contradicted by a tensor that is there with another dtype or shape; one that is missing says
nothing, since it may be lost.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qschema.architectures import experts_of
from qschema.formats import Format, formats
from qvalidate.assignment import Assignment, assign, declared_as
from qvalidate.context import Context, Module
from qvalidate.documents import QuantConfig
from qvalidate.fix.tensors import mended
from qvalidate.layout import expected
from qvalidate.rules.suffixes import KV_SUFFIX, QUANT_SUFFIX

# FP8_PB_WO as engines call it in quantized_layers, with a 2-D weight_scale_inv: SGLang 0.5.23
# modelopt_quant.py:908-918, vLLM 0.33.0 modelopt.py:1615-1624
_OTHER_SPELLINGS = frozenset({"FP8_BLOCK_SCALES"})


@dataclass(frozen=True)
class Decision:
    """The format of each module. `whole` is that of a checkpoint of one format.

    `layers` are the entries of a mixed one that can be told; `undecided` says why nothing can be
    told of the rest, and then no algorithm in a document is touched.
    """

    whole: Format | None = None
    is_mixed: bool = False
    layers: Mapping[str, Format] = field(default_factory=dict)
    undecided: str = ""

    @property
    def assignment(self) -> Assignment:
        """Return what the documents say once they say this."""
        return Assignment(whole=self.whole, is_mixed=self.is_mixed, layers=dict(self.layers))


def decide(context: Context) -> Decision:
    """Return the formats that the documents are to name."""
    configs = [config for config in (context.in_config, context.in_file) if config is not None]
    if context.obeyed is not None and context.obeyed.is_mixed:
        return Decision(is_mixed=True, layers=_layers(context, configs))
    if any(config.is_mixed for config in configs):
        return _whole_or_mixed(context)
    return _whole(context, configs)


def fit(
    module: Module, declared: Format, *, is_mixed: bool
) -> Literal["fits", "lacks", "contradicts"]:
    """Return how the stored tensors of `module` go with `declared`, once they are mended."""
    owned = mended(module, declared, is_mixed=is_mixed)
    shapes = expected(owned, declared)
    if shapes is None or (module.is_stack and not declared.stackable):
        return "contradicts"
    lacks = False
    for spec in declared.tensors:
        stored = owned.tensors.get(spec.suffix)
        if stored is None:
            lacks = lacks or spec.required
        elif (stored.dtype, stored.shape) != shapes[spec.suffix]:
            return "contradicts"
    return "lacks" if lacks else "fits"


def recognise(context: Context, modules: Iterable[Module], *, is_mixed: bool) -> tuple[Format, ...]:
    """Return the formats that all of `modules` have exactly, with no tensor too many.

    None has tensors below the module: SVDQuant keeps a part of the weight there.
    Of two that differ in a tensor which a right module may do without, and no module has, the one
    without it.
    """
    modules = list(modules)
    owners = {name.rpartition(".")[0] for name in context.modules}
    if any(module.name in owners for module in modules):
        return ()
    found = [
        declared
        for declared in formats().values()
        if not declared.read_only
        and all(_is_exactly(module, declared, is_mixed=is_mixed) for module in modules)
    ]
    stored = {suffix for module in modules for suffix in module.tensors}
    plain = [
        declared
        for declared in found
        if all(spec.required or spec.suffix in stored for spec in declared.tensors)
    ]
    return tuple(plain or found)


def _is_exactly(module: Module, declared: Format, *, is_mixed: bool) -> bool:
    if fit(module, declared, is_mixed=is_mixed) != "fits":
        return False
    own = {spec.suffix for spec in declared.tensors}
    owned = mended(module, declared, is_mixed=is_mixed).tensors
    return not any(
        QUANT_SUFFIX.fullmatch(suffix) and not KV_SUFFIX.fullmatch(suffix)
        for suffix in owned.keys() - own
    )


def _whole(context: Context, configs: Sequence[QuantConfig]) -> Decision:
    """Return the one format of the checkpoint."""
    modules = list(context.quantized.values())
    named = list(dict.fromkeys(config.algo.upper() for config in configs if config.algo))
    known = list({one.name: one for one in map(declared_as, named) if one}.values())
    # how many modules contradict each
    against = {
        one.name: sum(fit(module, one, is_mixed=False) == "contradicts" for module in modules)
        for one in known
    }
    possible = [one for one in known if against[one.name] < len(modules)]
    best = [one for one in possible if against[one.name] == 0]
    for candidates in (possible, best):
        if len(candidates) == 1:
            return Decision(whole=candidates[0])
    found = recognise(context, modules, is_mixed=False)
    if len(found) == 1:
        return Decision(whole=found[0])
    if len(known) == 1 and all(map(declared_as, named)):
        # all documents say so, and nothing tells better: the rules say what is wrong with it
        return Decision(whole=known[0])
    said = " and ".join(named) or "nothing"
    fitting = " or ".join(one.name for one in best or found) or "no format"
    return Decision(undecided=f"the documents say {said}, and {fitting} fits what is stored")


def _whole_or_mixed(context: Context) -> Decision:
    """Return the format where config.json names one and the other document one for each layer."""
    whole, listed = context.assignment.whole, assign(context.in_file, None)
    modules = list(context.quantized.values())
    if whole and all(fit(module, whole, is_mixed=False) != "contradicts" for module in modules):
        return Decision(whole=whole)
    own = [(module, listed.format_of(module.name)) for module in modules]
    if all(found and fit(module, found, is_mixed=True) != "contradicts" for module, found in own):
        layers = {name: declared for name, declared in listed.layers.items() if declared}
        return Decision(is_mixed=True, layers=layers)
    return Decision(undecided="one document names one format, the other several, and neither fits")


def _layers(context: Context, configs: Sequence[QuantConfig]) -> Mapping[str, Format]:
    """Return the entries of quantized_layers whose format is known: right, corrected and new ones.

    All experts of a layer that no entry names get one. An entry that no quantized module has goes.
    """
    listed = context.assignment.layers
    algos = {name: algo for config in reversed(configs) for name, algo in config.layers.items()}
    owners: dict[str, list[Module]] = {}
    for module in context.quantized.values():
        experts = experts_of(module.name)
        key = context.assignment.key(module.name)
        owners.setdefault(key or (experts[0] if experts else module.name), []).append(module)
    found: dict[str, Format] = {}
    for name, modules in owners.items():
        declared = listed.get(name)
        if name in listed and algos.get(name, "").upper() in _OTHER_SPELLINGS:
            continue
        if declared is None or any(
            fit(module, declared, is_mixed=True) == "contradicts" for module in modules
        ):
            others = [declared_as(config.layers.get(name, "")) for config in configs]
            candidates = recognise(context, modules, is_mixed=True)
            for known in (others, context.assignment.formats, candidates):
                told = [one for one in candidates if one in known]
                if len(told) == 1:
                    declared = told[0]
                    break
        if declared is not None:
            found[name] = declared
    # in the order of the list, new ones last
    kept = {name: found[name] for name in listed if name in found}
    return {**kept, **found}
