"""Mutants of the positive examples must fail: a model that lets one pass is not strict."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qschema import catalog
from qschema.recipe_file import load_yaml
from qschema.strict import DocumentError

POSITIVE = Path(__file__).resolve().parents[2] / "fixtures" / "documents" / "positive"
KINDS = [kind for kind in catalog.ids() if kind != "safetensors-header"]
# JSON that is free by definition
FREE = {"modelopt_quant_config", "observer_kwargs"}
# below these, the keys that follow are optional or free text
LOOSE = {"sparsity_config", "transform_config"}
# keys that can't be left out wherever they occur
REQUIRED = {
    "hf-quant-config": {"producer", "quantization", "name", "version", "quant_algo"},
    "config": {"activation_scheme", "targets", "method", "num_experts", "name"},
    "safetensors-index": {"weight_map", "metadata"},
    "recipe": {"rules", "match", "algo"},
    "amax": {"document", "version", "inputs", "k", "v"},
    "plan": {
        *("tool", "source", "recipe", "units", "steps", "outputs", "reason", "offset", "rules"),
        *("axis", "factor", "kind", "of", "output", "workers", "disk_nbytes"),
    },
    "report": {"tool", "source", "recipe", "tensors", "outputs", "reason", "digest", "rules"},
    "timings": {"tool", "plan_sha256", "stages", "stage", "seconds", "wall_s", "reused_nbytes"},
}
# keys whose text is one of a fixed set
CHOICES = {
    "hf-quant-config": {"quant_algo", "kv_cache_quant_algo"},
    "config": {
        *("quant_algo", "kv_cache_quant_algo", "activation_scheme", "fmt", "scale_fmt"),
        *("type", "strategy", "quantization_status", "expert_dtype", "actorder"),
    },
    "safetensors-index": {"w"},
    "recipe": {"algo", "kv_cache", "on_indivisible"},
    "amax": {"document"},
    "plan": {"document", "action", "axis", "kind", "kv_cache"},
    "report": {"document", "action"},
    "timings": {"document", "stage"},
}

Place = tuple[str | int, ...]


def load(path: Path) -> Any:
    return load_yaml(path) if path.suffix == ".yaml" else json.loads(path.read_text())


def strict_parts(kind: str, document: Any) -> list[Place]:
    """Returns the places below which the document is checked strictly."""
    if kind != "config":
        return [()]
    found = [("quantization_config",), ("text_config", "quantization_config")]
    found.append(("compression_config",))
    return [place for place in found if strictly_checked(at(document, place))]


def strictly_checked(config: Any) -> bool:
    return isinstance(config, dict) and config.get("quant_method") not in ("awq", "gptq")


def at(document: Any, place: Place) -> Any:
    for part in place:
        document = document.get(part) if isinstance(document, dict) else document[part]
        if document is None:
            return None
    return document


def places(value: Any, place: Place) -> Iterator[Place]:
    """Yields every place at or below `place` outside free JSON."""
    yield place
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for key, child in children:
        if key not in FREE:
            yield from places(child, (*place, key))


def examples(kind: str) -> list[tuple[Any, list[Place]]]:
    """Returns (document, places in its strict parts) of the positive examples of `kind`."""
    found = []
    for path in sorted((POSITIVE / kind).iterdir()):
        document = load(path)
        inside = [
            place
            for part in strict_parts(kind, document)
            for place in places(at(document, part), part)
        ]
        if inside:
            found.append((document, inside))
    return found


EXAMPLES = {kind: examples(kind) for kind in KINDS}


def survives(kind: str, document: Any) -> bool:
    try:
        catalog.by_id(kind).model.parse(document, file="mutant")
    except DocumentError:
        return False
    return True


def mutants(kind: str, change: Any) -> Iterator[tuple[Place, Any]]:
    """Yields (place, mutant) for each place of each example where `change` applies."""
    for document, inside in EXAMPLES[kind]:
        for place in inside:
            mutant = copy.deepcopy(document)
            if change(mutant, place):
                yield place, mutant


def drop(kind: str) -> Any:
    def change(document: Any, place: Place) -> bool:
        if not place or place[-1] not in REQUIRED[kind] or LOOSE & set(place):
            return False
        del at(document, place[:-1])[place[-1]]
        return True

    return change


def misspell(kind: str) -> Any:
    def change(document: Any, place: Place) -> bool:
        if not place or place[-1] not in CHOICES[kind] or LOOSE & set(place):
            return False
        value = at(document, place)
        if not isinstance(value, str):
            return False
        at(document, place[:-1])[place[-1]] = value[:-1] + "!"
        return True

    return change


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mutation", [drop, misspell], ids=["drop", "misspell"])
def test_every_dropped_or_misspelt_key_fails(kind, mutation):
    made = 0
    for place, mutant in mutants(kind, mutation(kind)):
        made += 1
        assert not survives(kind, mutant), place

    assert made


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_unknown_key_fails_in_every_object(kind, data):
    document, inside = data.draw(st.sampled_from(EXAMPLES[kind]))
    objects = [place for place in inside if isinstance(at(document, place), dict)]
    place = data.draw(st.sampled_from(objects))
    mutant = copy.deepcopy(document)
    # no object of ours has this key, and no map of ours has a value like this
    at(mutant, place)["qschema_unknown"] = [[None]]

    assert not survives(kind, mutant), place


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_value_of_another_type_fails_everywhere(kind, data):
    document, inside = data.draw(st.sampled_from(EXAMPLES[kind]))
    place = data.draw(st.sampled_from([place for place in inside if place]))
    mutant = copy.deepcopy(document)
    at(mutant, place[:-1])[place[-1]] = [[None]]

    assert not survives(kind, mutant), place


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_number_as_text_and_text_as_number_fail(kind, data):
    document, inside = data.draw(st.sampled_from(EXAMPLES[kind]))
    scalars = [
        place for place in inside if place and isinstance(at(document, place), bool | int | str)
    ]
    place = data.draw(st.sampled_from(scalars))
    value = at(document, place)
    mutant = copy.deepcopy(document)
    at(mutant, place[:-1])[place[-1]] = 7.5 if isinstance(value, str) else str(value)

    # index metadata may hold any scalar
    assert not survives(kind, mutant) or place[0] == "metadata", place
