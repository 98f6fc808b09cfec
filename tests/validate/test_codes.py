"""The sample of the codes: how much is read, what it sees, and that nothing right looks wrong."""

from pathlib import Path

import pytest
from catalogue import DOWN, GATE, Q
from checkpoints import MIXED, draft
from encoded import converted
from value_faults import edit, right

from qschema.formats import formats
from qschema.strict import Finding
from qvalidate.loader import load
from qvalidate.rules import RULES, codes

RULE_IDS = ("codes-nan", "codes-constant", "codes-saturated", "codes-unsigned")
ZEROS = "model.layers.0.mlp.gate_proj.weight"
GOLDENS = Path(__file__).parents[2] / "fixtures" / "goldens"


def found(path: Path) -> list[Finding]:
    context = load(path)
    return [finding for rule_id in RULE_IDS for finding in RULES[rule_id].check(context)]


@pytest.mark.parametrize("algo", [*formats(), MIXED])
@pytest.mark.parametrize("model", ["llama", "llama_odd", "llama_adv", "mixtral"])
def test_right_codes_raise_no_alarm(model: str, algo: str, tmp_path: Path) -> None:
    """llama_adv has a weight of zeros, and one that an outlier makes zeros."""
    findings = found(converted(model, algo, tmp_path / "made"))

    # zeros with the scale of a sibling are said, whatever made them
    expected = [ZEROS] if (model, algo) == ("llama_adv", "FP8") else []
    assert [finding.where for finding in findings] == expected


@pytest.mark.parametrize(
    "golden", sorted(path.parent.name for path in GOLDENS.glob("*/quantized.safetensors"))
)
def test_codes_of_goldens_raise_no_alarm(golden: str) -> None:
    assert found(GOLDENS / golden) == []


def test_zeros_in_the_source_are_no_finding_but_a_hole_is(tmp_path: Path) -> None:
    """Both have codes of zeros; the scale of zeros is 1."""
    made = right("llama", "FP8_PB_WO", "plain")
    for module in (Q, GATE):
        edit(made, f"{module}.weight", lambda values: values * 0)
    edit(made, f"{GATE}.weight_scale", lambda scale: scale * 0 + 1)

    (finding,) = found(made.write(tmp_path / "made"))

    assert finding.where == f"{Q}.weight"
    assert finding.message == "all 12288 sampled codes are 0"


def test_one_value_is_read_on_before_it_is_said(tmp_path: Path) -> None:
    """Of 98304 bytes of zeros, 12288 sampled, one is not, in none of the samples."""
    made = right("llama", "FP8_PB_WO", "plain")
    edit(made, f"{DOWN}.weight", lambda values: values * 0)
    dtype, shape, data = made.tensor(f"{DOWN}.weight")
    made.put(f"{DOWN}.weight", (dtype, shape, data[:20000] + b"\x7e" + data[20001:]))

    assert found(made.write(tmp_path / "made")) == []


@pytest.mark.parametrize(
    ("at", "is_sampled"),
    [
        # 10 rows of 384 are at most 4096 bytes
        (0, True),
        (3839, True),
        (3840, False),
        (128 * 384, True),
        (246 * 384 - 1, False),
        (246 * 384, True),
        (256 * 384 - 1, True),
    ],
)
def test_first_middle_and_last_rows_are_sampled(at: int, is_sampled: bool, tmp_path: Path) -> None:
    made = draft("llama", "FP8_PB_WO")
    dtype, shape, data = made.tensor(f"{DOWN}.weight")
    made.put(f"{DOWN}.weight", (dtype, shape, data[:at] + b"\xff" + data[at + 1 :]))
    findings = found(made.write(tmp_path / "made"))

    assert shape == (256, 384)
    expected = [("codes-nan", f"{DOWN}.weight")] if is_sampled else []
    assert [(finding.rule, finding.where) for finding in findings] == expected


def test_many_weights_are_sampled_evenly_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second of 14: of both layers."""
    made = right("llama", "FP8_PB_WO", "plain")
    names = [name for shard in made.shards.values() for name in shard if name.endswith("_scale")]
    for name in names:
        edit(made, name.removesuffix("_scale"), lambda values: values * 0)
    path = made.write(tmp_path / "made")
    monkeypatch.setattr(codes, "_MOST_MODULES", 7)
    findings = found(path)

    assert len(names) == 14
    assert [finding.where for finding in findings] == sorted(
        name.removesuffix("_scale") for name in names
    )[::2]
    assert findings[0].message.endswith("; 7 of 14 weights were sampled")


def test_all_samples_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = converted("llama", "FP8_PB_WO", tmp_path / "made")
    monkeypatch.setattr(codes, "_MOST_NBYTES", 14 * 3 * 256)
    samples = list(codes._sampled(load(path)))

    assert len(samples) == 14
    assert sum(sample.num_codes for sample in samples) <= 14 * 3 * 256


def test_samples_are_those_of_the_checkpoint_that_is_asked_about(tmp_path: Path) -> None:
    one = load(converted("llama", "FP8_PB_WO", tmp_path / "one"))
    made = right("llama", "FP8_PB_WO", "plain")
    edit(made, f"{Q}.weight", lambda values: values * 0)
    other = load(made.write(tmp_path / "other"))

    for context, num in ((one, 0), (other, 1), (one, 0)):
        assert len(list(RULES["codes-constant"].check(context))) == num
