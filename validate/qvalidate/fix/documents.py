"""config.json's quantization_config and hf_quant_config.json: made, or changed key by key.

Both say the same: which format, which modules are left alone, how the cache is quantized. What they
have to say comes in as `Facts`; here it gets ModelOpt's spelling, the only one that every engine
takes: vLLM 0.33.0 folds the case of quant_algo, TensorRT-LLM 1.2 takes "fp8_pb_wo" in lower case
and every other name in upper case. Layout: ModelOpt 0.47.0 export/quant_utils.py:683-795 and
export/convert_hf_config.py:24-282.
"""

import difflib
from collections.abc import Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import get_args

from qschema.formats import Format, formats
from qschema.hf_quant_config import HfQuantConfig, Method, Quantization
from qschema.quantization_config import FlatModelOptConfig
from qschema.strict import Json
from qvalidate.assignment import declared_as
from qvalidate.documents import MIXED
from qvalidate.fix.document import Document
from qvalidate.fix.repair import Repair, shown

# names the layout, not the tool: vLLM takes hf_quant_config.json for ModelOpt's under this name
PRODUCER: Mapping[str, Json] = {"name": "modelopt", "version": "0.47.0"}
METHOD = "modelopt"
LAYERS = "quantized_layers"
# keys that describe a format, and mislead beside another one
_OF_FORMATS = frozenset(key for found in formats().values() for key in found.hf_quant_fields) | {
    "lora_rank"
}
_FP8_CACHE: Mapping[str, Json] = {"dynamic": False, "num_bits": 8, "type": "float"}
_STORED = "it is what the stored tensors are"


@dataclass(frozen=True)
class Facts:
    """What both documents have to say. Without an `algo` what they name stays."""

    whole: Format | None
    is_mixed: bool
    layers: Mapping[str, Format]
    # entries of quantized_layers that no quantized module has, and those that stay as they are
    unused: frozenset[str]
    untold: Mapping[str, Json]
    exclude: tuple[str, ...]
    kv_algo: str | None
    producer: Mapping[str, Json]

    @property
    def algo(self) -> str | None:
        if self.is_mixed:
            return MIXED
        return self.whole.spelling if self.whole else None


def made(facts: Facts, *, file: str, root: str, nested: bool, reason: str) -> Document:
    """Return a document that says `facts`, as ModelOpt writes it."""
    raw = _nested(facts) if nested else _flat(facts)
    repair = Repair(
        id="document-made",
        file=file,
        where="" if root == "$" else root,
        was="nothing",
        becomes=shown(raw),
        reason=reason,
    )
    return Document(file=file, root=root, raw=raw, repairs=[repair])


def correct(document: Document, facts: Facts, *, is_in_config: bool) -> Document:
    """Return `document` changed so that it says `facts`.

    The form is changed to that which every reader of the file takes. What it says about the cache
    stays, also where the other document says something else.
    """
    if facts.algo is not None and document.is_nested is is_in_config:
        reason = (
            "vLLM and SGLang read config.json in full in the flat form only"
            if is_in_config
            else "TensorRT-LLM 1.2 reads this file in the nested form only"
        )
        root = document.root
        facts = replace(facts, kv_algo=document.config.kv_algo or facts.kv_algo)
        return made(facts, file=document.file, root=root, nested=not is_in_config, reason=reason)
    _respell(document)
    if facts.algo is not None:
        _name_formats(document, facts)
    _exclude(document, facts)
    _quantize_cache(document, facts)
    _sign(document, facts)
    return document


def _respell(document: Document) -> None:
    """Give keys that are nearly a known one, and no known one, the name of that."""
    inner, outer = set(Quantization.model_fields), set(HfQuantConfig.model_fields)
    if document.is_nested:
        _respell_keys(document, document.raw, outer)
        _respell_keys(document, document.body, inner)
    else:
        _respell_keys(document, document.raw, set(FlatModelOptConfig.model_fields))


def _respell_keys(document: Document, owner: dict[str, Json], known: Set[str]) -> None:
    for key in [key for key in owner if key not in known]:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if near:
            value, reason = owner[key], f"no reader knows {key!r}, {near[0]!r} is meant"
            document.drop(owner, key, repair="key-respelt", reason=reason)
            if near[0] not in owner:
                document.put(owner, near[0], value, repair="key-respelt", reason=reason)


def _name_formats(document: Document, facts: Facts) -> None:
    body = document.body
    was = document.config.algo
    if facts.whole is not None and declared_as(was) is not facts.whole:
        for key in sorted(_OF_FORMATS & body.keys() - facts.whole.hf_quant_fields.keys()):
            document.drop(body, key, repair="field-corrected", reason=f"is not of {facts.algo}")
    is_spelling = declared_as(was) is facts.whole or facts.is_mixed
    reason = "ModelOpt's spelling, which every engine takes" if was and is_spelling else _STORED
    document.put(body, "quant_algo", facts.algo, repair="algo-corrected", reason=reason)
    for key, value in facts.whole.hf_quant_fields.items() if facts.whole else ():
        if document.is_nested or key in body:
            reason = f"is part of {facts.algo}, and engines ask for it"
            document.put(body, key, value, repair="field-corrected", reason=reason)
    if facts.is_mixed:
        _list_layers(document, facts)
    else:
        reason = "is read for MIXED_PRECISION only"
        document.drop(body, LAYERS, repair="layers-corrected", reason=reason)
    is_other = not is_spelling or any(found.id == "layers-corrected" for found in document.repairs)
    if is_other and "config_groups" in body:
        groups = _groups(facts)
        if groups:
            document.put(body, "config_groups", groups, repair="field-corrected", reason=_STORED)
        else:
            reason = f"ModelOpt writes none for {facts.algo}"
            document.drop(body, "config_groups", repair="field-corrected", reason=reason)


def _list_layers(document: Document, facts: Facts) -> None:
    layers = document.body.get(LAYERS)
    if not isinstance(layers, dict):
        wanted = _layers(facts)
        document.put(document.body, LAYERS, wanted, repair="layers-corrected", reason=_STORED)
        return
    for name in [name for name in layers if name in facts.unused]:
        reason = "no quantized module has this name"
        document.drop(layers, name, repair="layers-corrected", reason=reason)
    for name in facts.untold.keys() - layers.keys():
        stays = deepcopy(facts.untold[name])
        document.put(layers, name, stays, repair="layers-corrected", reason="the other file has it")
    for name, declared in facts.layers.items():
        entry, wanted = layers.get(name), _entry(declared)
        algo = entry.get("quant_algo") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or declared_as(_text(algo)) is not declared:
            document.put(layers, name, wanted, repair="layers-corrected", reason=_STORED)
            continue
        for key, value in wanted.items():
            reason = f"is part of {declared.spelling}"
            document.put(entry, key, value, repair="field-corrected", reason=reason)


def _exclude(document: Document, facts: Facts) -> None:
    body = document.body
    key = "exclude_modules" if document.is_nested else "ignore"
    if key not in body and not document.is_nested and "exclude_modules" in body:
        moved = body["exclude_modules"]
        reason = "vLLM 0.32.0 reads `ignore` in this form, and nothing else"
        document.drop(body, "exclude_modules", repair="key-moved", reason=reason)
        document.put(body, key, moved, repair="key-moved", reason=reason)
    if not document.is_nested:
        reason = "`ignore` is the list in this form"
        document.drop(body, "exclude_modules", repair="key-moved", reason=reason)
    found: Json = body.get(key)
    wanted: list[Json] = list(facts.exclude)
    is_optional = document.is_nested and facts.is_mixed
    if (found is None and is_optional and not wanted) or _is_list_of(found, facts.exclude):
        return
    reason = "it names what is not quantized, and nothing else"
    document.put(body, key, wanted, repair="exclusions-corrected", reason=reason)


def _is_list_of(found: Json, wanted: Sequence[str]) -> bool:
    """Whether `found` has the names of `wanted` in some order, and nothing else."""
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return False
    return set(map(str, found)) == set(wanted)


def _quantize_cache(document: Document, facts: Facts) -> None:
    body = document.body
    if facts.kv_algo is not None and document.config.kv_algo is None:
        key = "kv_cache_quant_algo" if document.is_nested else "kv_cache_scheme"
        value = facts.kv_algo if document.is_nested else _cache_scheme(facts.kv_algo)
        reason = "the cache's scales are stored, and the other document says so"
        document.put(body, key, value, repair="kv-cache-corrected", reason=reason)
    if document.is_nested and "kv_cache_quant_algo" not in body:
        reason = "engines ask for the key, which may be null"
        document.put(body, "kv_cache_quant_algo", None, repair="field-corrected", reason=reason)


def _sign(document: Document, facts: Facts) -> None:
    """Say whose layout it is, where nothing does."""
    raw = document.raw
    if not isinstance(raw.get("producer"), dict):
        reason = "engines know ModelOpt's layout by it"
        producer = dict(facts.producer)
        document.put(raw, "producer", producer, repair="producer-added", reason=reason)
    is_unsigned = document.config.method is None if document.is_nested else True
    if is_unsigned and raw.get("quant_method") not in get_args(Method):
        reason = "engines take the model for unquantized without it"
        document.put(raw, "quant_method", METHOD, repair="method-corrected", reason=reason)


def _flat(facts: Facts) -> dict[str, Json]:
    """Return config.json's quantization_config."""
    found: dict[str, Json] = {}
    groups = _groups(facts)
    if groups:
        found["config_groups"] = groups
    if facts.is_mixed:
        found[LAYERS] = _layers(facts)
    found |= {"ignore": list(facts.exclude), "quant_algo": facts.algo}
    if facts.kv_algo is not None:
        found["kv_cache_scheme"] = _cache_scheme(facts.kv_algo)
    return {**found, "producer": dict(facts.producer), "quant_method": METHOD}


def _nested(facts: Facts) -> dict[str, Json]:
    """Return hf_quant_config.json."""
    body: dict[str, Json] = {"quant_algo": facts.algo, "kv_cache_quant_algo": facts.kv_algo}
    if facts.whole is not None:
        body |= {**facts.whole.hf_quant_fields, "exclude_modules": list(facts.exclude)}
    else:
        body |= {"exclude_modules": list(facts.exclude)} if facts.exclude else {}
        body[LAYERS] = _layers(facts)
    return {"producer": dict(facts.producer), "quantization": body}


def _groups(facts: Facts) -> dict[str, Json]:
    if facts.whole is not None:
        targets: list[Json] = ["Linear"]
        group: dict[str, Json] = {**facts.whole.config_group, "targets": targets}
        return {"group_0": group} if facts.whole.has_config_group else {}
    members: dict[str, list[Json]] = {}
    for module, declared in facts.layers.items():
        members.setdefault(declared.name, []).append(module)
    return {
        f"group_{place}": {**formats()[name].config_group, "targets": modules}
        for place, (name, modules) in enumerate(members.items())
    }


def _layers(facts: Facts) -> dict[str, Json]:
    told = {name: _entry(declared) for name, declared in facts.layers.items()}
    return {**told, **deepcopy(dict(facts.untold))}


def _entry(declared: Format) -> dict[str, Json]:
    return {"quant_algo": declared.spelling, **declared.hf_quant_fields}


def _cache_scheme(algo: str) -> Json:
    return dict(_FP8_CACHE) if algo == "FP8" else algo


def _text(value: Json) -> str | None:
    return value if isinstance(value, str) else None
