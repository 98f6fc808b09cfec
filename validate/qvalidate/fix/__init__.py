"""Repairs a quantized checkpoint's metadata into a new directory; no value of a weight changes.

`plan_repairs` says what would change, `apply` writes it, `fix` does both. What is repaired is what
the stored tensors tell: names, ranks and dtype labels over the same bytes, the two documents, the
index. What would take a number that is not there (a scale, a calibration) is left, and the rules
still find it.
"""

from qvalidate.fix.output import FixError, apply
from qvalidate.fix.plan import plan_repairs
from qvalidate.fix.repair import FixReport, Left, Repair, Repairs
from qvalidate.fix.run import fix

__all__ = [
    "FixError",
    "FixReport",
    "Left",
    "Repair",
    "Repairs",
    "apply",
    "fix",
    "plan_repairs",
]
