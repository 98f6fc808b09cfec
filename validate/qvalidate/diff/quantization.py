"""What two quantization configs say differently, in words and by the modules they speak of.

Compared is what engines follow: `quantization_config` of config.json, and hf_quant_config.json
where that is missing. The latter is compared by itself too: some engines read nothing else.
Exclusions are taken as shell wildcards over the checkpoint's names; an engine may read one pattern
otherwise than another that takes the same modules here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qschema.strict import Json
from qvalidate.assignment import assign, declared_as
from qvalidate.context import Context
from qvalidate.diff.documents import ABSENT, as_change, differences, json_pair
from qvalidate.diff.result import AssignmentChange, JsonChange, QuantizationDiff, WordChange
from qvalidate.documents import HF_QUANT_CONFIG, QuantConfig

NOT_QUANTIZED = "unquantized"
EXCLUDED = "excluded"
# what the words say, what restates a format, and who wrote it
_IN_WORDS = frozenset(
    {
        "quant_algo",
        "quantized_layers",
        "ignore",
        "exclude_modules",
        "kv_cache_quant_algo",
        "kv_cache_scheme",
        "quant_method",
        "producer",
        "config_groups",
    }
)
_FP8_CACHE: Mapping[str, Json] = {"dynamic": False, "num_bits": 8, "type": "float"}
_MAY_BE_SPELT = ("quant_algo", "kv_cache_quant_algo")


@dataclass
class _Found:
    changes: list[WordChange] = field(default_factory=list)
    assignments: list[AssignmentChange] = field(default_factory=list)
    fields: list[JsonChange] = field(default_factory=list)
    spelling: list[str] = field(default_factory=list)


def quantization_diff(
    a: Context, b: Context, modules: Mapping[str, str]
) -> tuple[QuantizationDiff, list[str]]:
    """Return what the quantization configs say differently, and what they only spell differently.

    modules: name in B -> name in A of every Linear that both sides have.
    """
    found = _Found()
    found.assignments = _assignments(a, b, modules)
    _say(found, "format", _format(a), _format(b))
    _say(found, "kv cache", _kv(a.obeyed), _kv(b.obeyed))
    if a.obeyed is not None and b.obeyed is not None:
        _say(found, "place", _place(a.obeyed), _place(b.obeyed))
        _both(found, a, b, a.obeyed, b.obeyed)
    found.fields += _hf_quant_config(a, b, modules, found.spelling)
    diff = QuantizationDiff(
        changes=found.changes, assignments=found.assignments, fields=found.fields
    )
    return diff, found.spelling


def said_of(context: Context, module: str) -> str:
    """Return the format that the obeyed config gives `module`, or that it gives none."""
    config = context.obeyed
    if config is None:
        return NOT_QUANTIZED
    if context.excluded_by(module) is not None:
        return EXCLUDED
    assignment = context.assignment
    declared = assignment.format_of(module)
    if declared is not None:
        return declared.name
    if not assignment.is_mixed:
        return config.algo or config.method or "unknown"
    key = assignment.key(module)
    return EXCLUDED if key is None else config.layers.get(key) or "unknown"


def _assignments(a: Context, b: Context, modules: Mapping[str, str]) -> list[AssignmentChange]:
    grouped: dict[tuple[str, str], list[str]] = {}
    for there, here in modules.items():
        was, is_now = said_of(a, here), said_of(b, there)
        if was != is_now and {was, is_now} != {NOT_QUANTIZED, EXCLUDED}:
            grouped.setdefault((was, is_now), []).append(there)
    return [
        AssignmentChange(a=was, b=is_now, modules=names) for (was, is_now), names in grouped.items()
    ]


def _both(found: _Found, a: Context, b: Context, here: QuantConfig, there: QuantConfig) -> None:
    """Add what two configs say about more than single modules."""
    _say(found, "method", here.method or "none", there.method or "none")
    if here.is_nested != there.is_nested:
        shapes = [("flat", "nested")[config.is_nested] for config in (here, there)]
        found.spelling.append(f"quantization_config is {shapes[0]} in A, {shapes[1]} in B")
    if _format(a) == _format(b) and here.algo != there.algo:
        if (here.algo or "").upper() == (there.algo or "").upper():
            found.spelling.append(f"quant_algo is spelt {here.algo} in A, {there.algo} in B")
        else:
            _say(found, "name of the format", here.algo or "none", there.algo or "none")
    found.spelling += _exclusion_spelling(found.assignments, here.exclude, there.exclude)
    if (one := here.raw.get("producer")) != (other := there.raw.get("producer")):
        found.spelling.append(f"producer: {_producer(one)} -> {_producer(other)}")
    found.fields += _other_fields(a, b, here, there, found.spelling)


def _exclusion_spelling(
    assignments: list[AssignmentChange], here: tuple[str, ...], there: tuple[str, ...]
) -> Iterator[str]:
    if here == there or any(EXCLUDED in (change.a, change.b) for change in assignments):
        return
    if sorted(here) == sorted(there):
        yield "the exclusions are in another order"
    else:
        yield "the exclusions are written differently and leave out the same modules"


def _other_fields(
    a: Context, b: Context, here: QuantConfig, there: QuantConfig, spelling: list[str]
) -> Iterator[JsonChange]:
    """Yield the differences of what the words do not cover."""
    file = Path(here.file).name
    formats = (*a.assignment.formats, *b.assignment.formats)
    # a flat config says these in config_groups
    restating = {key for declared in formats for key in declared.hf_quant_fields}
    is_other_format = _format(a) != _format(b) or here.is_nested != there.is_nested
    left_out = _IN_WORDS | (restating if is_other_format else set())
    one, other = (
        {key: value for key, value in config.body.items() if key not in left_out}
        for config in (here, there)
    )
    for change in differences(one, other):
        yield as_change(change, file=file, root=_root(here))
    layers = here.layers, there.layers
    for name, algo in layers[0].items():
        if algo.upper() == layers[1].get(name, "").upper():
            root = (*_root(here), "quantized_layers", name)
            for change in differences(_entry(here, name), _entry(there, name)):
                yield as_change(change, file=file, root=root)
    if here.is_mixed and there.is_mixed and bool(here.layers) != bool(there.layers):
        # vLLM takes the list of hf_quant_config.json then, others have none
        was, is_now = (config.body.get("quantized_layers", ABSENT) for config in (here, there))
        yield as_change((("quantized_layers",), was, is_now), file=file, root=_root(here))
    schemes = [_scheme(config.raw.get("kv_cache_scheme")) for config in (here, there)]
    if all(isinstance(scheme, dict) for scheme in schemes):
        for change in differences(schemes[0], schemes[1]):
            yield as_change(change, file=file, root=(*_root(here), "kv_cache_scheme"))
    groups = [config.raw.get("config_groups") for config in (here, there)]
    if groups[0] == groups[1] or _format(a) != _format(b):
        return
    if None in groups:
        side = "A" if groups[1] is None else "B"
        spelling.append(f"config_groups, which restate the format, are in {side} only")
        return
    for change in differences(groups[0], groups[1]):
        yield as_change(change, file=file, root=(*_root(here), "config_groups"))


def _scheme(value: Json) -> Json:
    """Return a kv_cache_scheme with the name of what ModelOpt writes out spelt out."""
    return dict(_FP8_CACHE) if isinstance(value, str) and value.upper() == "FP8" else value


def _hf_quant_config(
    a: Context, b: Context, modules: Mapping[str, str], spelling: list[str]
) -> Iterator[JsonChange]:
    """Yield the differences in meaning of hf_quant_config.json where config.json outranks it."""
    pair = json_pair(a, b, HF_QUANT_CONFIG)
    if pair is None or pair[0] == pair[1] or (a.in_config is None and b.in_config is None):
        return
    in_files = _by_file(a), _by_file(b)
    is_same = all(
        (said_of(in_files[0], here) == EXCLUDED) == (said_of(in_files[1], there) == EXCLUDED)
        for there, here in modules.items()
    )
    changes = list(differences(_canonical(pair[0], is_same), _canonical(pair[1], is_same)))
    if not changes:
        spelling.append(f"{HF_QUANT_CONFIG} is written differently and means the same")
    for change in changes:
        yield as_change(change, file=HF_QUANT_CONFIG)


def _by_file(context: Context) -> Context:
    """Return the context as an engine has it that reads hf_quant_config.json alone."""
    return replace(context, in_config=None, assignment=assign(context.in_file, None))


def _canonical(document: Json, has_same_exclusions: bool) -> Json:
    """Return the document without what is a matter of spelling."""
    if not isinstance(document, dict):
        return document
    found = {key: value for key, value in document.items() if key != "producer"}
    body = found.get("quantization")
    if not isinstance(body, dict):
        return found
    body = {"kv_cache_quant_algo": None, **body}
    for key in _MAY_BE_SPELT:
        body.update(_upper(body, key))
    exclude = body.get("exclude_modules")
    if has_same_exclusions:
        body.pop("exclude_modules", None)
    elif isinstance(exclude, list) and all(isinstance(name, str) for name in exclude):
        body["exclude_modules"] = [*sorted(str(name) for name in exclude)]
    layers = body.get("quantized_layers")
    if isinstance(layers, dict):
        body["quantized_layers"] = {
            name: {**entry, **_upper(entry, "quant_algo")} if isinstance(entry, dict) else entry
            for name, entry in layers.items()
        }
    return {**found, "quantization": body}


def _upper(body: Mapping[str, Json], key: str) -> dict[str, Json]:
    value = body.get(key)
    return {key: value.upper()} if isinstance(value, str) else {}


def _entry(config: QuantConfig, name: str) -> Json:
    layers = config.body.get("quantized_layers")
    entry = layers.get(name) if isinstance(layers, dict) else None
    if not isinstance(entry, dict):
        return entry
    return {key: value for key, value in entry.items() if key != "quant_algo"}


def _root(config: QuantConfig) -> tuple[str, ...]:
    """Return the place of the object that holds quant_algo."""
    path = tuple(config.root.removeprefix("$").strip(".").split(".")) if config.root != "$" else ()
    return (*path, "quantization") if config.is_nested else path


def _say(found: _Found, what: str, a: str, b: str) -> None:
    if a != b:
        found.changes.append(WordChange.model_validate({"what": what, "a": a, "b": b}))


def _format(context: Context) -> str:
    """Return what the obeyed config calls for, by the names of the declarations."""
    config = context.obeyed
    if config is None:
        return "none"
    if context.assignment.is_mixed:
        return f"mixed ({_joined(declared.name for declared in context.assignment.formats)})"
    declared = declared_as(config.algo)
    return declared.name if declared else config.algo or config.method or "unknown"


def _joined(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _kv(config: QuantConfig | None) -> str:
    algo = config.kv_algo if config else None
    return algo.upper() if algo else "none"


def _place(config: QuantConfig) -> str:
    file = Path(config.file).name
    return f"{file} only" if file == HF_QUANT_CONFIG else f"{file}::{config.root}"


def _producer(value: Json) -> str:
    if not isinstance(value, dict):
        return "none"
    return " ".join(str(value[key]) for key in ("name", "version") if key in value)
