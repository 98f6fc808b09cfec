"""Distances between log-probabilities, against closed forms."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import qvalidate.compare
from qvalidate.compare import CompareError, compare, violations
from qvalidate.engines.outcome import Comparison, Thresholds

F64 = npt.NDArray[np.float64]
Write = Callable[[str, F64], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(name: str, values_PV: F64) -> Path:
        file = tmp_path / f"{name}.f32"
        file.write_bytes(values_PV.astype("<f4").tobytes())
        return file

    return _write


def log_softmax(logits_PV: F64) -> F64:
    shifted = logits_PV - logits_PV.max(axis=1, keepdims=True)
    result: F64 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def distributions(num_positions: int, vocab: int, *, seed: int = 0) -> F64:
    return log_softmax(np.random.default_rng(seed).normal(0, 3, (num_positions, vocab)))


def test_identical_is_zero_everywhere(write: Write) -> None:
    values = distributions(7, 33)
    targets = [3] * 7

    result = compare(
        write("reference", values), write("candidate", values), vocab=33, targets=targets
    )

    perplexity = math.exp(-values[:, 3].mean())
    assert (result.kl_mean, result.kl_max, result.relative_error) == (0.0, 0.0, 0.0)
    assert (result.top1_agreement, result.num_positions, result.vocab) == (1.0, 7, 33)
    assert result.perplexity_reference == result.perplexity_candidate
    assert result.perplexity_reference == pytest.approx(perplexity, rel=1e-6)


def test_two_categories_by_hand(write: Write) -> None:
    """p = (1/2, 1/2) then (3/4, 1/4); q = (1/4, 3/4) at both."""
    reference = np.log([[1 / 2, 1 / 2], [3 / 4, 1 / 4]])
    candidate = np.log([[1 / 4, 3 / 4], [1 / 4, 3 / 4]])

    result = compare(
        write("reference", reference), write("candidate", candidate), vocab=2, targets=[0, 1]
    )

    kl = [math.log(2) - math.log(3) / 2, math.log(3) / 2]
    # centred rows are (x, -x): x = log(p0 / p1) / 2
    squared_difference = (math.log(3) / 2) ** 2 + math.log(3) ** 2
    assert result.kl_mean == pytest.approx(sum(kl) / 2, rel=1e-6)
    assert result.kl_max == pytest.approx(max(kl), rel=1e-6)
    # the first position ties, so that either choice is right
    assert result.top1_agreement == 0.5
    assert result.relative_error == pytest.approx(
        math.sqrt(squared_difference / (math.log(3) / 2) ** 2), rel=1e-6
    )
    assert result.perplexity_reference == pytest.approx(math.sqrt(8), rel=1e-6)
    assert result.perplexity_candidate == pytest.approx(math.sqrt(16 / 3), rel=1e-6)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.25, 2.0])
def test_scaled_logits_have_that_relative_error(write: Write, factor: float) -> None:
    logits = np.random.default_rng(1).normal(0, 2, (50, 101))

    result = compare(
        write("reference", log_softmax(logits)),
        write("candidate", log_softmax(factor * logits)),
        vocab=101,
        targets=[0] * 50,
    )

    assert result.relative_error == pytest.approx(abs(factor - 1), rel=1e-5)
    assert result.top1_agreement == 1.0


def test_a_shift_of_the_logits_is_no_error(write: Write) -> None:
    """A model's logits are defined up to a constant per position; centring takes it away."""
    values = distributions(5, 64)
    shifted = values + np.arange(5)[:, None]

    result = compare(
        write("reference", values), write("candidate", shifted), vocab=64, targets=[0] * 5
    )

    assert result.relative_error < 1e-6


def test_rolled_vocabulary_never_agrees(write: Write) -> None:
    values = distributions(40, 50)

    result = compare(
        write("reference", values),
        write("candidate", np.roll(values, 1, axis=1)),
        vocab=50,
        targets=[0] * 40,
    )

    assert result.top1_agreement == 0.0
    assert result.relative_error == pytest.approx(math.sqrt(2), abs=0.1)


def test_chunks_do_not_change_the_result(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = write("reference", distributions(23, 31, seed=2))
    candidate = write("candidate", distributions(23, 31, seed=3))
    targets = [position % 31 for position in range(23)]
    whole = compare(reference, candidate, vocab=31, targets=targets)

    monkeypatch.setattr(qvalidate.compare, "_CHUNK_ELEMENTS", 4 * 31)
    chunked = compare(reference, candidate, vocab=31, targets=targets)

    assert chunked.model_dump() == pytest.approx(whole.model_dump(), rel=1e-12)


def test_tokens_masked_on_both_sides_do_not_count(write: Write) -> None:
    reference, candidate = distributions(9, 20, seed=4), distributions(9, 20, seed=5)
    masked = np.full((9, 3), -np.inf)
    plain = compare(
        write("reference", reference), write("candidate", candidate), vocab=20, targets=[1] * 9
    )

    wider = compare(
        write("wider_reference", np.hstack([reference, masked])),
        write("wider_candidate", np.hstack([candidate, masked])),
        vocab=23,
        targets=[1] * 9,
    )

    assert wider.model_dump(exclude={"vocab"}) == pytest.approx(plain.model_dump(exclude={"vocab"}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_nonfinite_is_named_with_its_side_and_position(
    write: Write, side: str, value: float
) -> None:
    values = {"reference": distributions(6, 8), "candidate": distributions(6, 8)}
    values[side][4, 2] = value
    files = [write(name, values[name]) for name in ("reference", "candidate")]

    with pytest.raises(CompareError, match=f"the {side} has .* 1 of 6 positions, .* 4") as caught:
        compare(*files, vocab=8, targets=[0] * 6)

    assert caught.value.rule == (
        "compare-nonfinite" if side == "candidate" else "compare-reference"
    )


def test_flat_reference_is_refused(write: Write) -> None:
    flat = np.full((3, 4), math.log(1 / 4))

    with pytest.raises(CompareError, match="same probability") as caught:
        compare(
            write("reference", flat),
            write("candidate", distributions(3, 4)),
            vocab=4,
            targets=[0] * 3,
        )

    assert caught.value.rule == "compare-reference"


@pytest.mark.parametrize(("num_positions", "num_targets"), [(5, 6), (6, 5), (0, 0)])
def test_wrong_size_is_refused_with_numbers(
    write: Write, num_positions: int, num_targets: int
) -> None:
    file = write("candidate", np.zeros((num_positions, 4)))

    with pytest.raises(CompareError, match=f"{num_positions * 16} bytes") as caught:
        compare(file, file, vocab=4, targets=[0] * num_targets)

    assert caught.value.rule == "compare-size"


def test_missing_numpy_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert "pip install 'qconvert[validate]'" in (qvalidate.compare.numpy_missing() or "")


def comparison(*, kl: float, top1: float, relative_error: float) -> Comparison:
    return Comparison(
        num_positions=10,
        vocab=4,
        kl_mean=kl,
        kl_max=2 * kl,
        top1_agreement=top1,
        relative_error=relative_error,
        perplexity_reference=2.0,
        perplexity_candidate=2.0,
    )


@pytest.mark.parametrize(
    ("kl", "top1", "relative_error", "rules"),
    [
        (0.10, 0.81, 0.16, []),
        (0.3, 0.6, 0.4, []),
        (0.31, 0.9, 0.1, ["compare-kl"]),
        (0.1, 0.59, 0.1, ["compare-top1"]),
        (0.1, 0.9, 0.41, ["compare-relative-error"]),
        (1.537, 0.274, 0.651, ["compare-kl", "compare-top1", "compare-relative-error"]),
    ],
    ids=["measured-fp8", "at-the-limit", "kl", "top1", "relative-error", "measured-times-8"],
)
def test_thresholds(kl: float, top1: float, relative_error: float, rules: list[str]) -> None:
    found = list(
        violations(comparison(kl=kl, top1=top1, relative_error=relative_error), Thresholds())
    )

    assert [rule for rule, _ in found] == rules
    assert all("10 positions" in message for _, message in found)
