"""The converter against ModelOpt's own exports: every tensor of every golden in fixtures/oracle.

From the bf16 source and what calibration recorded (`--amax`), with the recipe that the golden's
hf_quant_config.json describes. What departs is listed by name in test_oracle_rules.py, where each
departure is made again from ModelOpt's rule; only what no conversion can do is listed here.
"""

import hashlib
import json
from pathlib import Path

import pytest

from qconvert.backends import resolve
from qconvert.convert import convert
from qconvert.planner import make_plan
from qconvert.statistics import open_statistics
from qschema.checkpoint import open_checkpoint
from qschema.formats import find
from qschema.recipe import Recipe
from qschema.strict import DocumentError

from . import calib
from .calib import ORACLE
from .test_oracle_rules import ATTENTION, DEPARTURES, GOLDENS, MLP, scales, weights

READ_ONLY = [name for name in GOLDENS if name.endswith("fp8_pb_real")]
LINEARS = (*ATTENTION, *MLP)
CODES_AND_SCALES = weights(*LINEARS) | scales(*LINEARS)
GLOBAL_SCALES = weights(*LINEARS, suffix="weight_scale_2")
# NVFP4 block scales that a search chose, not the largest magnitude: four-over-six also divides by
# another number, which leaves the codes of three weights as they are
SEARCHED = {
    "llama_adv-nvfp4_46": (CODES_AND_SCALES | GLOBAL_SCALES)
    - weights("mlp.gate_proj", "mlp.up_proj", "self_attn.v_proj"),
    "llama_s-nvfp4_46": CODES_AND_SCALES | GLOBAL_SCALES,
    "llama_s-nvfp4_mse_sweep": CODES_AND_SCALES,
}
# ModelOpt left the names of transformers 5 in memory; tests/convert/test_goldens.py maps them
IN_MEMORY_NAMES = "mixtral-fp8_pb_wo"
CONVERTED = [name for name in GOLDENS if name not in (*READ_ONLY, IN_MEMORY_NAMES)]


def quantization(golden: str) -> dict[str, object]:
    document = json.loads((ORACLE / golden / "hf_quant_config.json").read_text())
    return dict(document["quantization"])


def recipe(golden: str) -> Recipe:
    """Return the recipe that a golden's hf_quant_config.json describes."""
    found = quantization(golden)
    rules, include = [{"match": "*", "algo": found["quant_algo"]}], []
    layers = found.get("quantized_layers")
    if isinstance(layers, dict):
        rules = [
            {
                "match": f"{module}.*" if module.endswith("experts") else module,
                "algo": layer["quant_algo"],
            }
            for module, layer in layers.items()
        ]
        include = [module for module in layers if "layers" not in module]
    return Recipe.parse(
        {"rules": rules, "include": include, "kv_cache": found["kv_cache_quant_algo"]},
        file=golden,
    )


def run(golden: str, tmp_path: Path) -> Path:
    statistics = open_statistics(calib.write(ORACLE / golden, tmp_path))
    checkpoint = open_checkpoint(ORACLE / "bf16" / golden.split("-")[0])
    plan = make_plan(checkpoint, recipe(golden), statistics)
    convert(
        checkpoint,
        plan,
        tmp_path / "out",
        statistics=statistics,
        device=resolve("cpu", codecs=sorted({find(algo).codec for algo in plan.algos})),
        workers=2,
        budget=16 << 20,
        watch=lambda progress: None,
    )
    return tmp_path / "out"


def tensors(path: Path) -> dict[str, tuple[str, list[int], str]]:
    """Return name -> (dtype, shape, sha256 of the bytes)."""
    found = {}
    for name, stored in open_checkpoint(path).tensors.items():
        raw = stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]
        found[name] = (stored.dtype, list(stored.shape), hashlib.sha256(raw).hexdigest())
    return found


def golden_tensors(golden: str) -> dict[str, tuple[str, list[int], str]]:
    listed = json.loads((ORACLE / golden / "tensors.json").read_text())
    return {
        name: (entry["dtype"], entry["shape"], entry["sha256"]) for name, entry in listed.items()
    }


@pytest.mark.parametrize("golden", CONVERTED)
def test_every_tensor_equals_modelopts_but_for_the_listed(tmp_path: Path, golden: str) -> None:
    ours, theirs = tensors(run(golden, tmp_path)), golden_tensors(golden)

    departing = {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}
    listed = set().union(*DEPARTURES.get(golden, {}).values()) | SEARCHED.get(golden, set())
    assert departing == listed
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("golden", CONVERTED)
def test_the_documents_equal_modelopts(tmp_path: Path, golden: str) -> None:
    out = run(golden, tmp_path)

    for file, key in (
        ("hf_quant_config.json", "quantization"),
        ("config.json", "quantization_config"),
    ):
        ours = json.loads((out / file).read_text())[key]
        theirs = json.loads((ORACLE / golden / file).read_text())[key]
        # the order of keys included
        assert json.dumps(ours) == json.dumps(theirs)


@pytest.mark.parametrize("golden", READ_ONLY)
def test_what_is_only_read_is_not_written(golden: str) -> None:
    with pytest.raises(DocumentError, match="fp8_pb_real is read, not written"):
        recipe(golden)


def test_most_is_equal() -> None:
    """How many tensors of how many goldens the tests above compare, and how many depart."""
    listed = [golden_tensors(golden) for golden in CONVERTED]
    departing = [
        name
        for golden in CONVERTED
        for names in DEPARTURES.get(golden, {}).values()
        for name in names
    ]

    assert len(CONVERTED) == 41
    assert sum(map(len, listed)) == 1342
    assert len(departing) + sum(map(len, SEARCHED.values())) == 152
