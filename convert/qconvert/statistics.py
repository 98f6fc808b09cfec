"""The activation statistics of a conversion: what `--amax FILE` says, shared as formats say.

Opening reads the JSON and the header of the vectors' file; the vectors themselves are read when a
weight is smoothed.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from qconvert.decide import Decision, module_of
from qconvert.errors import ConvertError, some
from qconvert.groups import Group, input_key
from qschema.amax import Amax, load_amax
from qschema.architectures import experts_of, has_tied_head
from qschema.plan import Constant
from qschema.safetensors import Stored, read_header
from qschema.strict import DocumentError, Json

PRE_QUANT_SCALE = "pre_quant_scale"


def _nothing() -> Amax:
    return Amax(document="qconvert-amax", version=1, inputs={})


@dataclass(frozen=True)
class Statistics:
    """What calibration measured; `file` is None where there was none."""

    file: Path | None = None
    amax: Amax = field(default_factory=_nothing)
    vectors: Mapping[str, Stored] = field(default_factory=lambda: MappingProxyType({}))
    # of the vectors' file
    sha256: str | None = None

    def has_smoothing(self, module: str) -> bool:
        """Return whether `module` has a pre_quant_scale."""
        return f"{module}.{PRE_QUANT_SCALE}" in self.vectors


def open_statistics(path: Path) -> Statistics:
    """Return the statistics in the JSON file `path`, and beside it the header of its vectors.

    Raises DocumentError for either file that is not what it should be.
    """
    amax = load_amax(path)
    if amax.vectors is None:
        return Statistics(path, amax)
    file = path.parent / amax.vectors
    if not file.is_file():
        raise DocumentError.of(path, "$.vectors", "amax-vectors", f"no {amax.vectors} beside it")
    header = read_header(file)
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return Statistics(path, amax, header.tensors, digest)


def input_amaxes(decisions: list[Decision], statistics: Statistics) -> dict[str, float]:
    """Return module -> largest |input|, for every module whose format has an input scale.

    Modules that share the scale get the largest of theirs; one without a number of its own gets
    that of those it shares with, as an expert that saw no token does. Raises ConvertError for
    modules without any.
    """
    found: dict[Group, float] = {}
    keys: dict[str, Group] = {}
    missing_algos: dict[str, list[str]] = defaultdict(list)
    for decision in decisions:
        spec = next(iter(decision.declared.specs("input")), None) if decision.declared else None
        if spec is None or decision.declared is None:
            continue
        key = keys[decision.module] = input_key(decision.module, spec.shared)
        for name in _names(decision):
            if name in statistics.amax.inputs:
                found[key] = max(found.get(key, 0.0), statistics.amax.inputs[name])
        missing_algos[decision.declared.name].append(decision.module)
    for algo, modules in missing_algos.items():
        missing = [module for module in modules if keys[module] not in found]
        if missing and statistics.file is None:
            raise ConvertError(
                f"{algo} has a static scale for each layer's input, which comes from calibration: "
                "pass the largest activations with --amax stats.json, or choose a format that "
                "quantizes weights only or scales its input as it comes"
            )
        if missing:
            raise ConvertError(
                f"{statistics.file}: $.inputs has no amax for {some(missing)}, which {algo} needs "
                "for the scale of their input; calibrate again, or --exclude them"
            )
    return {module: found[key] for module, key in keys.items()}


def statistics_notes(
    decisions: list[Decision],
    statistics: Statistics,
    constants: list[Constant],
    *,
    config: Mapping[str, Json],
) -> list[str]:
    """Return notes on what the statistics hold that nothing has a use for."""
    if statistics.file is None:
        return []
    notes = []
    known = {name for decision in decisions for name in (*_names(decision), decision.owner)}
    known |= {module_of(decision.tensor.name) for decision in decisions}
    if has_tied_head(config):
        known.add("lm_head")
    # of experts in a kept stack only the stack is known
    stacks = {name.rpartition(".")[0] for name in known}
    unknown = [
        name
        for name in statistics.amax.inputs
        if name not in known and not ((expert := experts_of(name)) and expert[0] in stacks)
    ]
    if unknown:
        notes.append(f"the statistics have inputs of what the source lacks: {some(unknown)}")
    formats = {decision.module: decision.declared for decision in decisions if decision.declared}
    wanted = {f"{module}.{PRE_QUANT_SCALE}" for module in formats}
    wanted |= {constant.vector for constant in constants if constant.vector}
    idle = [name for name in statistics.vectors if name not in wanted]
    if idle:
        notes.append(f"the statistics' vectors of what is not quantized do nothing: {some(idle)}")
    has_inputs = any(declared.specs("input") for declared in formats.values())
    if not has_inputs and not constants and len(idle) == len(statistics.vectors):
        notes.append("--amax does nothing: no format here has an input scale, and no KV cache")
    return notes


def _names(decision: Decision) -> list[str]:
    """Return the names under which the statistics may know the input of a module."""
    stack = decision.tensor.name
    return (
        [decision.module, stack] if decision.matrix and decision.matrix.part else [decision.module]
    )
