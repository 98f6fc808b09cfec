"""`exclude_modules` as ModelOpt writes it: the modules left alone, collapsed to prefixes.

Each name becomes the shortest dotted prefix P that no quantized module shares, written `P*` when no
quantized name starts with P as text, `P.*` when only names below P are free, else the name itself;
sorted, without duplicates. Source: ModelOpt 0.47.0 export/quant_utils.py:609-680 (behaviour).
"""

from bisect import bisect_left
from collections.abc import Iterable


def collapse(unquantized: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Return sorted patterns that name every module of `unquantized`, none of `quantized`."""
    taken = sorted(quantized)

    def is_taken(prefix: str) -> bool:
        place = bisect_left(taken, prefix)
        return place < len(taken) and taken[place].startswith(prefix)

    names = set(taken)
    found = set()
    for module in unquantized:
        parts = module.split(".")
        for depth in range(1, len(parts)):
            prefix = ".".join(parts[:depth])
            if not is_taken(prefix):
                found.add(f"{prefix}*")
                break
            if prefix not in names and not is_taken(f"{prefix}."):
                found.add(f"{prefix}.*")
                break
        else:
            found.add(module)
    return sorted(found)
