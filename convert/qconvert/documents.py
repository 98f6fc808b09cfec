"""The JSON files of the output: config.json, hf_quant_config.json and the index.

Layout: ModelOpt 0.47.0 export/unified_export_hf.py:1464-1492, export/convert_hf_config.py:188-282,
key order included. vLLM obeys config.json's quantization_config, the file only without that.
"""

import json
from collections.abc import Mapping

from qschema.formats import Format, find
from qschema.plan import Plan
from qschema.strict import Json

# names the layout, not the tool: engines take the file for ModelOpt's only under this name, and
# the version says which ModelOpt's layout it is. Who really wrote it stands in qconvert_report.json
PRODUCER: dict[str, Json] = {"name": "modelopt", "version": "0.47.0"}


def hf_quant_config(plan: Plan) -> dict[str, Json]:
    """Return hf_quant_config.json."""
    declared = _format(plan)
    return {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": declared.spelling,
            "kv_cache_quant_algo": None,
            **declared.hf_quant_fields,
            "exclude_modules": list(plan.exclude_modules),
        },
    }


def config(source: Mapping[str, Json], plan: Plan) -> dict[str, Json]:
    """Return config.json: the source's keys in their order, `quantization_config` last."""
    return {
        **source,
        "quantization_config": {
            "ignore": list(plan.exclude_modules),
            "quant_algo": _format(plan).spelling,
            "producer": PRODUCER,
            "quant_method": "modelopt",
        },
    }


def index(source_metadata: Mapping[str, Json], plan: Plan) -> dict[str, Json]:
    """Return the index: every tensor's file in order of names, total_size counted anew."""
    outputs = [span for step in plan.steps for span in step.outputs]
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


def _format(plan: Plan) -> Format:
    algo = next(step.algo for step in plan.steps if step.algo)
    return find(algo)
