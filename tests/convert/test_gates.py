"""`--fail-if`: which tensors a gate catches, how they are listed, and that nothing is left."""

from pathlib import Path

import pytest

from qconvert.errors import ConvertError
from qconvert.gates import check_gates
from qschema.recipe import Recipe
from qschema.report import TensorReport
from qschema.strict import DocumentError

from .conversion import CHECKPOINTS, Make, digests, randn, run


def entry(
    name: str,
    *,
    sqnr: float | None = None,
    relative_error: float | None = None,
    num_saturated: int | None = None,
    part: str | None = None,
) -> TensorReport:
    return TensorReport(
        source=name,
        part=part,
        dtype="BF16",
        shape=[10, 20],
        action="quantize",
        reason="rule '*'",
        outputs=[],
        sqnr=sqnr,
        relative_error=relative_error,
        num_saturated=num_saturated,
    )


TENSORS = [
    entry("a", sqnr=20.0, relative_error=0.1, num_saturated=0),
    entry("b", sqnr=18.5, relative_error=0.118850, num_saturated=2),
    entry("c", sqnr=31.25, relative_error=0.0273842, num_saturated=40),
    # without noise, and kept
    entry("d", sqnr=None, relative_error=0.0, num_saturated=0),
    entry("e"),
]


@pytest.mark.parametrize(
    ("gate", "caught"),
    [
        ("sqnr<20", ["b (18.5)"]),
        ("sqnr<=20", ["b (18.5)", "a (20)"]),
        ("sqnr>20", ["c (31.25)"]),
        ("sqnr>=20", ["c (31.25)", "a (20)"]),
        ("sqnr<1.85e1", []),
        ("sqnr <= 1.85E+1", ["b (18.5)"]),
        ("relative_error>0.1", ["b (0.11885)"]),
        ("relative_error>=0.1", ["b (0.11885)", "a (0.1)"]),
        ("relative_error<0.0273842", ["d (0)"]),
        ("relative_error<=0.0273842", ["d (0)", "c (0.0273842)"]),
        ("relative_error>0.118850", []),
        # of 200 elements
        ("saturated>0", ["c (0.2)", "b (0.01)"]),
        ("saturated>0.01", ["c (0.2)"]),
        ("saturated>=0.01", ["c (0.2)", "b (0.01)"]),
        ("saturated>0.2", []),
        ("saturated<0.01", ["a (0)", "d (0)"]),
    ],
)
def test_what_a_gate_catches_worst_first(gate: str, caught: list[str]) -> None:
    if not caught:
        check_gates([gate], TENSORS)
        return

    with pytest.raises(ConvertError) as found:
        check_gates([gate], TENSORS)

    assert str(found.value) == (
        f"--fail-if {gate!r}: {', '.join(caught)}; no checkpoint was made. Give these another "
        "format or --exclude them, or change the gate"
    )


def test_many_are_counted_and_the_worst_five_shown() -> None:
    many = [entry(f"t{place}", sqnr=10.0 + place, part=f"[{place}, 0:9]") for place in range(9)]

    with pytest.raises(ConvertError, match=r"'sqnr<18': t0\[0, 0:9\] \(10\), t1.*, t4.*, \.\.\. "):
        check_gates(["sqnr<18"], many[::-1])
    with pytest.raises(ConvertError, match=r"t4\[4, 0:9\] \(14\), \.\.\. \(8 in all\)"):
        check_gates(["sqnr<18"], many)


def test_every_gate_is_tried() -> None:
    check_gates([], TENSORS)
    check_gates(["sqnr<1", "saturated>0.5"], TENSORS)

    with pytest.raises(ConvertError, match=r"--fail-if 'saturated>0\.1': c"):
        check_gates(["sqnr<1", "saturated>0.1"], TENSORS)


@pytest.mark.parametrize(
    ("gate", "is_met"),
    [
        ("sqnr<17", True),
        ("sqnr<25", False),
        ("relative_error>0.2", True),
        ("relative_error>0.05", False),
        ("saturated>0.001", True),
        ("saturated>=0", False),
    ],
)
def test_a_conversion_that_fails_a_gate_leaves_nothing(
    tmp_path: Path, gate: str, is_met: bool
) -> None:
    """NVFP4 of normal weights has about 20 dB, an error of 0.1."""
    source = CHECKPOINTS / "qwen3"
    if is_met:
        report = run(source, tmp_path / "out", algo="NVFP4", fail_if=[gate])
        assert report.recipe.fail_if == [gate]
        assert (tmp_path / "out" / "hf_quant_config.json").exists()
    else:
        with pytest.raises(ConvertError, match=rf"--fail-if '{gate}': model\.layers\.0\..*weight"):
            run(source, tmp_path / "out", algo="NVFP4", fail_if=[gate])
        assert not (tmp_path / "out").exists()


def test_a_gate_changes_no_weight(tmp_path: Path) -> None:
    run(CHECKPOINTS / "qwen3", tmp_path / "a", algo="FP8_PB_WO", fail_if=["sqnr<20"])
    run(CHECKPOINTS / "qwen3", tmp_path / "b", algo="FP8_PB_WO")

    found = [digests(tmp_path / name) for name in "ab"]
    # the recipe stands in it
    for files in found:
        del files["qconvert_report.json"]
    assert found[0] == found[1]


def test_the_worst_tensor_is_the_worst(tmp_path: Path, make: Make) -> None:
    """One huge number in a weight takes the others' bits under one scale."""
    source = {f"model.layers.{n}.mlp.down_proj.weight": randn(64, 64, seed=n) for n in range(3)}
    source["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e6

    with pytest.raises(ConvertError) as found:
        run(make(source), tmp_path / "out", algo="FP8", fail_if=["relative_error<1"])

    names = [word for word in str(found.value).split() if word.startswith("model.layers")]
    assert names[0] == "model.layers.1.mlp.down_proj.weight"


BAD = [
    "snr<20",
    "sqnr",
    "sqnr<",
    "sqnr=20",
    "sqnr==20",
    "sqnr<-20",
    "sqnr<nan",
    "sqnr<20dB",
    "<20",
    "sqnr<20, saturated>0",
    "sqnr<20\n",
    "",
]


@pytest.mark.parametrize("gate", BAD)
def test_a_gate_that_makes_no_sense_is_refused(gate: str) -> None:
    with pytest.raises(DocumentError, match=r"\$\.fail_if\[1\]"):
        Recipe.parse({"rules": [], "fail_if": ["sqnr<20", gate]}, file="recipe")
