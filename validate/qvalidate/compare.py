"""How far one model's log-probabilities are from another's.

Both are files of little-endian float32, [P, V] row major: P positions, V the vocabulary. They are
read in chunks of rows and summed in float64, so that size is no matter. Only numpy is needed.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvalidate.engines.outcome import Comparison, Thresholds

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F64 = npt.NDArray[np.float64]
    LogProbs = npt.NDArray[np.float32]

# about 32 MB of float64 per array
_CHUNK_ELEMENTS = 1 << 22


class CompareError(ValueError):
    """There is no number to compare; `rule` says why in one word."""

    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        super().__init__(message)


@dataclass
class _Sums:
    kl: float = 0.0
    kl_max: float = 0.0
    num_agreeing: int = 0
    squared_difference: float = 0.0
    squared_reference: float = 0.0
    target_reference: float = 0.0
    target_candidate: float = 0.0


def numpy_missing() -> str | None:
    """Return the sentence that says how to get numpy, None if it is there."""
    if importlib.util.find_spec("numpy") is not None:
        return None
    return "comparing needs numpy: pip install 'qconvert[validate]'"


def compare(reference: Path, candidate: Path, *, vocab: int, targets: Sequence[int]) -> Comparison:
    """Return how far the `candidate` file's distributions are from the `reference` file's.

    targets: the token that really follows at each position; there are as many as positions.
    A token that both give -inf (masked out) counts nowhere; ties for the first choice count as
    agreement.

    Raises CompareError for files of the wrong size, for NaN, +inf or a -inf on one side only, and
    for a reference without any contrast; ModuleNotFoundError without numpy.
    """
    import numpy as np

    reference_PV = _open(reference, vocab=vocab, num_positions=len(targets))
    candidate_PV = _open(candidate, vocab=vocab, num_positions=len(targets))
    targets_P = np.asarray(targets, np.int64)
    _check_values(reference_PV, candidate_PV)
    sums = _Sums()
    for rows in _chunks(len(targets), vocab):
        _add(
            sums,
            reference_PV[rows].astype(np.float64),
            candidate_PV[rows].astype(np.float64),
            targets_P[rows],
        )
    if sums.squared_reference == 0.0:
        raise CompareError(
            "compare-reference", "the reference gives every token the same probability everywhere"
        )
    return Comparison(
        num_positions=len(targets),
        vocab=vocab,
        kl_mean=sums.kl / len(targets),
        kl_max=sums.kl_max,
        top1_agreement=sums.num_agreeing / len(targets),
        relative_error=float(np.sqrt(sums.squared_difference / sums.squared_reference)),
        perplexity_reference=float(np.exp(-sums.target_reference / len(targets))),
        perplexity_candidate=float(np.exp(-sums.target_candidate / len(targets))),
    )


def violations(comparison: Comparison, thresholds: Thresholds) -> Iterator[tuple[str, str]]:
    """Yield (rule, message) for every threshold that `comparison` is beyond."""
    over = f"over {comparison.num_positions} positions"
    if comparison.kl_mean > thresholds.max_kl:
        yield (
            "compare-kl",
            f"mean KL to the reference {comparison.kl_mean:.4g} nats {over}, "
            f"largest {comparison.kl_max:.4g}; at most {thresholds.max_kl:g} expected",
        )
    if comparison.top1_agreement < thresholds.min_top1:
        yield (
            "compare-top1",
            f"first choice agrees with the reference at {comparison.top1_agreement:.3f} "
            f"of the positions, {over}; at least {thresholds.min_top1:g} expected",
        )
    if comparison.relative_error > thresholds.max_relative_error:
        yield (
            "compare-relative-error",
            f"relative error of the log-probabilities {comparison.relative_error:.3f} {over}; "
            f"at most {thresholds.max_relative_error:g} expected",
        )


def _open(file: Path, *, vocab: int, num_positions: int) -> "LogProbs":
    import numpy as np

    expected = num_positions * vocab * 4
    found = file.stat().st_size
    if found != expected or not expected:
        raise CompareError(
            "compare-size",
            f"expected {num_positions} positions of {vocab} float32 log-probabilities "
            f"({expected} bytes), {file.stem} has {found} bytes",
        )
    return np.memmap(file, np.dtype("<f4"), mode="r", shape=(num_positions, vocab))


def _chunks(num_positions: int, vocab: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // vocab)
    for start in range(0, num_positions, step):
        yield slice(start, min(start + step, num_positions))


def _check_values(reference_PV: "LogProbs", candidate_PV: "LogProbs") -> None:
    """Raise if any position holds a value that no distance can be taken of."""
    import numpy as np

    bad: dict[str, list[int]] = {"reference": [], "candidate": []}
    for rows in _chunks(*reference_PV.shape):
        masked = {
            "reference": np.isneginf(reference_PV[rows]),
            "candidate": np.isneginf(candidate_PV[rows]),
        }
        both = masked["reference"] & masked["candidate"]
        for name, values in (("reference", reference_PV[rows]), ("candidate", candidate_PV[rows])):
            wrong = ~(np.isfinite(values) | both)
            bad[name].extend((rows.start + np.flatnonzero(wrong.any(axis=1))).tolist())
    for name, positions in bad.items():
        if positions:
            raise CompareError(
                "compare-reference" if name == "reference" else "compare-nonfinite",
                f"the {name} has NaN or Inf log-probabilities at {len(positions)} of "
                f"{reference_PV.shape[0]} positions, first at position {positions[0]}",
            )


def _add(
    sums: _Sums, reference_PV: "F64", candidate_PV: "F64", targets_P: "npt.NDArray[np.int64]"
) -> None:
    import numpy as np

    masked = np.isneginf(reference_PV)
    probability_PV = np.exp(reference_PV)
    rows = np.arange(len(targets_P))
    choice_P = candidate_PV.argmax(axis=1)
    is_agreeing = reference_PV[rows, choice_P] == reference_PV.max(axis=1)
    sums.num_agreeing += int(np.count_nonzero(is_agreeing))
    sums.target_reference += float(reference_PV[rows, targets_P].sum())
    sums.target_candidate += float(candidate_PV[rows, targets_P].sum())
    reference_PV[masked] = 0.0
    candidate_PV[masked] = 0.0
    difference_PV = candidate_PV - reference_PV
    kl_P = -(probability_PV * difference_PV).sum(axis=1)
    sums.kl += float(kl_P.sum())
    sums.kl_max = max(sums.kl_max, float(kl_P.max()))
    sums.squared_difference += _centred_square(difference_PV, masked)
    sums.squared_reference += _centred_square(reference_PV, masked)


def _centred_square(values_PV: "F64", masked: "npt.NDArray[np.bool_]") -> float:
    """Return the sum of squares about each row's mean; masked entries are zero and do not count."""
    import numpy as np

    count_P = np.maximum((~masked).sum(axis=1), 1)
    return float(((values_PV**2).sum(axis=1) - values_PV.sum(axis=1) ** 2 / count_P).sum())
