"""`--fail-if`: conditions on the report under which a conversion leaves nothing behind."""

import operator
import re
from collections.abc import Callable, Mapping
from math import prod

from qconvert.errors import ConvertError, some
from qschema.report import TensorReport

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_METRICS: Mapping[str, Callable[[TensorReport], float | None]] = {
    # dB; a weight without noise is no failure
    "sqnr": lambda tensor: tensor.sqnr,
    "relative_error": lambda tensor: tensor.relative_error,
    # the share of elements that are clipped
    "saturated": lambda tensor: (
        None if tensor.num_saturated is None else tensor.num_saturated / max(1, prod(tensor.shape))
    ),
}


def check_gates(gates: list[str], tensors: list[TensorReport]) -> None:
    """Raise ConvertError for the first gate that a tensor fails; it names the worst tensors."""
    for gate in gates:
        match = re.fullmatch(r"(\w+) *([<>]=?) *(.+)", gate)
        assert match is not None, "the recipe's schema allows no other gate"
        metric, compare, limit = _METRICS[match[1]], _COMPARISONS[match[2]], float(match[3])
        failed = [
            (value, tensor)
            for tensor in tensors
            if (value := metric(tensor)) is not None and compare(value, limit)
        ]
        if failed:
            failed.sort(key=lambda item: item[0], reverse=match[2].startswith(">"))
            listed = [
                f"{tensor.source}{tensor.part or ''} ({value:.6g})" for value, tensor in failed
            ]
            raise ConvertError(
                f"--fail-if {gate!r}: {some(listed)}; no checkpoint was made. Give these another "
                "format or --exclude them, or change the gate"
            )
