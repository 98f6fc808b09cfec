"""Time the digests of the report on one core: `python benchmarks/digests_cpu.py [--csv FILE]`.

In pieces of 2 MiB, which is what a slice of the converter gives.
"""

import argparse
import datetime
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from processes import HERE, cpu_name
from rows import append, commit

PIECE_NBYTES, NUM_PIECES, ROUNDS = 2 << 20, 128, 7
DIGESTS: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}


@dataclass
class Row:
    """One line of the CSV; the median of alternating rounds."""

    date: str
    commit: str
    digest: str
    gbs: float
    cpu: str
    rounds: int


def rate(make: Callable[[], Any], piece: bytes) -> float:
    """Returns GB/s of one digest over many pieces."""
    digest = make()
    start = time.perf_counter()
    for _ in range(NUM_PIECES):
        digest.update(piece)
    return NUM_PIECES * len(piece) / (time.perf_counter() - start) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=HERE / "digests_cpu.csv")
    args = parser.parse_args()
    piece = os.urandom(PIECE_NBYTES)
    found: dict[str, list[float]] = {name: [] for name in DIGESTS}
    for _ in range(ROUNDS):
        for name, make in DIGESTS.items():
            found[name].append(rate(make, piece))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    rows = [
        Row(today, commit(), name, round(statistics.median(rates), 2), cpu_name(), ROUNDS)
        for name, rates in found.items()
    ]
    append(args.csv, rows)
    for row in rows:
        print(f"{row.digest:<8} {row.gbs:>6.2f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
