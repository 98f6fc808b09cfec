"""What the tests of `qvalidate fix` have in common: faults to plant, and what became of them."""

import json
from pathlib import Path

import document_faults
import format_faults
import mixed_faults
import tensor_faults
import vllm_faults
from catalogue import FAULTS, Fault
from checkpoints import Draft, bytes_of, draft

from qvalidate.fix import FixReport, fix
from qvalidate.loader import load
from qvalidate.rules import RULES

# what is planted here; the catalogue has others, about deployments and about what is lost
_MODULES = (document_faults, format_faults, mixed_faults, tensor_faults, vllm_faults)
PLANTED = [
    fault for fault in FAULTS if fault.plant.__module__ in {module.__name__ for module in _MODULES}
]


def planted(name: str) -> Fault:
    return next(fault for fault in PLANTED if fault.name == name)


def written(fault: Fault, path: Path) -> Path:
    made = draft(fault.model, fault.algo)
    fault.plant(made)
    return made.write(path)


def rules_of(report: FixReport) -> set[str]:
    """Return the rules that find something afterwards: those for any engine, and vLLM's."""
    rules = {found.rule for found in report.after}
    return {rule for rule in rules if rule not in RULES or RULES[rule].engine in (None, "vllm")}


def weights(path: Path) -> dict[tuple[str, int], bytes]:
    """Return (shard, place among its tensors) -> the bytes of each tensor of the shards."""
    found = {}
    for shard in load(path).checkpoint.shards:
        for place, stored in enumerate(shard.tensors.values()):
            found[shard.file.name, place] = bytes_of(stored)
    return found


def repaired(made: Draft, tmp_path: Path) -> FixReport:
    return fix(made.write(tmp_path / "made"), tmp_path / "out")


def in_json(path: Path, name: str) -> dict[str, object]:
    found = json.loads((path / name).read_text())
    assert isinstance(found, dict)
    return found
