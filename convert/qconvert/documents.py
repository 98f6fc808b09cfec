"""The JSON files of the output: config.json, hf_quant_config.json and the index.

Layout: ModelOpt 0.47.0 export/unified_export_hf.py:1464-1492, export/convert_hf_config.py:188-282,
key order included. vLLM obeys config.json's quantization_config, the file only without that.
"""

import json
from collections.abc import Callable, Mapping

from qconvert.side_files import CONFIG, QUANT_CONFIG
from qschema.checkpoint import Checkpoint
from qschema.formats import find
from qschema.plan import Plan
from qschema.strict import Json

# names the layout, not the tool: engines take the file for ModelOpt's only under this name, and
# the version says which ModelOpt's layout it is. Who really wrote it stands in qconvert_report.json
PRODUCER: dict[str, Json] = {"name": "modelopt", "version": "0.47.0"}


def files(checkpoint: Checkpoint, plan: Plan) -> dict[str, Callable[[], bytes]]:
    """Return file name -> what makes its bytes, for every file that follows from the plan."""
    made: dict[str, Callable[[], bytes]] = {
        CONFIG: lambda: dump(config(checkpoint.config, plan)),
        QUANT_CONFIG: lambda: dump(hf_quant_config(plan)),
    }
    if checkpoint.index is not None:
        made[checkpoint.index] = lambda: dump(index(checkpoint.index_metadata, plan))
    return made


def hf_quant_config(plan: Plan) -> dict[str, Json]:
    """Return hf_quant_config.json."""
    return {"producer": PRODUCER, "quantization": _quantization(plan)}


def config(source: Mapping[str, Json], plan: Plan) -> dict[str, Json]:
    """Return config.json: the source's keys in their order, `quantization_config` last."""
    found: dict[str, Json] = {}
    groups = _config_groups(plan)
    if groups:
        found["config_groups"] = groups
    if plan.quantized_layers:
        found["quantized_layers"] = _layers(plan)
    found["ignore"] = list(plan.exclude_modules)
    if plan.algos:
        found["quant_algo"] = _algo(plan)
    kv_cache = plan.recipe.kv_cache
    if kv_cache:
        fp8: dict[str, Json] = {"dynamic": False, "num_bits": 8, "type": "float"}
        found["kv_cache_scheme"] = fp8 if kv_cache == "FP8" else kv_cache
    found |= {"producer": PRODUCER, "quant_method": "modelopt"}
    return {**source, "quantization_config": found}


def _quantization(plan: Plan) -> dict[str, Json]:
    found: dict[str, Json] = {
        "quant_algo": _algo(plan),
        "kv_cache_quant_algo": plan.recipe.kv_cache,
    }
    if len(plan.algos) == 1:
        fields = find(plan.algos[0]).hf_quant_fields
        return {**found, **fields, "exclude_modules": list(plan.exclude_modules)}
    # a mixed checkpoint, or one of which only the KV cache is quantized
    return {**found, "quantized_layers": _layers(plan)}


def _algo(plan: Plan) -> str | None:
    if len(plan.algos) > 1:
        return "MIXED_PRECISION"
    return find(plan.algos[0]).spelling if plan.algos else None


def _layers(plan: Plan) -> dict[str, Json]:
    return {
        module: {"quant_algo": find(algo).spelling, **find(algo).hf_quant_fields}
        for module, algo in plan.quantized_layers.items()
    }


def _config_groups(plan: Plan) -> dict[str, Json]:
    """Return the groups in compressed-tensors' words: one, or one per format that is mixed."""
    if len(plan.algos) == 1:
        declared = find(plan.algos[0])
        if not declared.has_config_group:
            return {}
        return {"group_0": {**declared.config_group, "targets": ["Linear"]}}
    # in the order in which the layers meet them
    targets: dict[str, list[Json]] = {}
    for module, algo in plan.quantized_layers.items():
        targets.setdefault(algo, []).append(module)
    return {
        f"group_{place}": {**find(algo).config_group, "targets": sorted(modules, key=str)}
        for place, (algo, modules) in enumerate(targets.items())
    }


def index(source_metadata: Mapping[str, Json], plan: Plan) -> dict[str, Json]:
    """Return the index: every tensor's file in order of names, total_size counted anew."""
    outputs = list(plan.outputs())
    total = sum(span.nbytes for span in outputs)
    weight_map: dict[str, Json] = {
        span.name: span.file for span in sorted(outputs, key=lambda span: span.name)
    }
    kept = {
        key: value for key, value in source_metadata.items() if not isinstance(value, dict | list)
    }
    return {"metadata": {**kept, "total_size": total}, "weight_map": weight_map}


def dump(document: Mapping[str, Json]) -> bytes:
    """Return the bytes of a JSON file: indented by four, UTF-8, one newline at the end."""
    try:
        return (json.dumps(document, indent=4, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # half a character, which JSON can hold as an escape and UTF-8 can't
        return (json.dumps(document, indent=4) + "\n").encode()
