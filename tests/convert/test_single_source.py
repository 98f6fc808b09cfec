"""A declaration is the only place: changed there, converter, validator and documents follow.

Each test swaps the declaration of one format and touches nothing else.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from qconvert.errors import ConvertError
from qconvert.planner import make_plan
from qconvert.summary import describe
from qschema.checkpoint import open_checkpoint
from qschema.format_table import markdown
from qschema.formats import Format, TensorSpec, find, formats
from qschema.formats._parts import input_scale
from qschema.plan import Plan
from qvalidate.validation import validate

from .conversion import CHECKPOINTS, WRITABLE, planned, recipe, run, tensors

Declare = Callable[[Format], None]
SOURCE = CHECKPOINTS / "qwen3"
NUM_LINEARS = 7
# every tensor of every format that is not its codes, which the kernels make
BESIDE = [
    (algo, spec.suffix)
    for algo in WRITABLE
    for spec in find(algo).tensors
    if spec.role in ("input", "smoothing") or (spec.role == "global" and find(algo).kernels)
]


@pytest.fixture
def declare() -> Iterator[Declare]:
    """Return what puts a declaration in the place of the one of the same name, for one test."""
    replaced = {}

    def forget() -> None:
        formats.cache_clear()
        find.cache_clear()

    def change(declared: Format) -> None:
        module = import_module(f"qschema.formats.{declared.name.lower()}")
        replaced.setdefault(module, module.FORMAT)
        module.FORMAT = declared
        forget()

    yield change
    for module, declared in replaced.items():
        module.FORMAT = declared
    forget()


def without(algo: str, suffix: str) -> Format:
    """Return a format that lacks one of its tensors."""
    declared = find(algo)
    kept = tuple(spec for spec in declared.tensors if spec.suffix != suffix)
    assert len(kept) == len(declared.tensors) - 1
    return declared.model_copy(update={"tensors": kept})


def suffixes(plan: Plan) -> set[str]:
    return {out.suffix for step in plan.steps if step.algo for out in step.outputs}


def findings(path: Path, rule: str) -> list[str]:
    """Return what qvalidate says by one of its rules."""
    return [found.where for found in validate(path).findings if found.rule == rule]


def section(algo: str) -> str:
    """Return the part of docs/formats.md about a format."""
    return markdown().partition(f"## {algo}\n")[2].partition("\n## ")[0]


def test_docs_list_the_declared_tensors_and_no_other() -> None:
    for algo, declared in formats().items():
        for suffix in {spec.suffix for other in formats().values() for spec in other.tensors}:
            listed = f"| `{suffix}` |" in section(algo)
            assert listed == (suffix in [spec.suffix for spec in declared.tensors])


@pytest.mark.parametrize("algo", WRITABLE)
def test_the_plan_writes_the_declared_tensors(algo: str) -> None:
    plan = planned(SOURCE, algo=algo)

    for step in plan.steps:
        if step.algo:
            rows, columns = step.source.shape
            declared = find(algo).outputs(rows=rows, columns=columns)
            found = {out.suffix: (out.dtype, tuple(out.shape)) for out in step.outputs}
            assert found == dict(declared)


@pytest.mark.parametrize(("algo", "suffix"), [pair for pair in BESIDE if pair[1] == "input_scale"])
def test_a_format_that_loses_its_input_scale(
    tmp_path: Path, declare: Declare, algo: str, suffix: str
) -> None:
    """It is not written, needs no --amax, and is a stranger in what was converted before."""
    run(SOURCE, tmp_path / "before", algo=algo)
    assert findings(tmp_path / "before", "missing-tensor") == []
    assert findings(tmp_path / "before", "orphan-tensor") == []
    assert suffixes(planned(SOURCE, algo=algo)) >= {suffix}
    assert f"| `{suffix}` |" in section(algo)

    old = find(algo)
    declare(without(algo, suffix))

    # no statistics at all
    plan = make_plan(open_checkpoint(SOURCE), recipe(algo=algo))
    assert suffix not in suffixes(plan)
    assert not [line for line in describe(plan) if suffix in line]
    assert f"| `{suffix}` |" not in section(algo)
    run(SOURCE, tmp_path / "after", algo=algo)
    assert not [name for name in tensors(tmp_path / "after") if name.endswith(suffix)]
    assert findings(tmp_path / "after", "missing-tensor") == []
    assert len(findings(tmp_path / "before", "orphan-tensor")) == NUM_LINEARS

    declare(old)

    assert len(findings(tmp_path / "after", "missing-tensor")) == NUM_LINEARS
    with pytest.raises(ConvertError, match="pass the largest activations with --amax"):
        make_plan(open_checkpoint(SOURCE), recipe(algo=algo))


def test_a_format_that_gets_an_input_scale(tmp_path: Path, declare: Declare) -> None:
    """W8A16 with the input scale of SmoothQuant: written by the same code that knew it not."""
    run(SOURCE, tmp_path / "before", algo="W8A16")
    old = find("W8A16")

    new = input_scale(divisor=127.0, zero=127.0, shared="siblings")
    declare(old.model_copy(update={"tensors": (*old.tensors, new)}))

    assert "| `input_scale` | F32 |" in section("W8A16")
    with pytest.raises(ConvertError, match="W8A16 has a static scale for each layer's input"):
        make_plan(open_checkpoint(SOURCE), recipe(algo="W8A16"))
    run(SOURCE, tmp_path / "after", algo="W8A16")
    run(SOURCE, tmp_path / "like", algo="W8A8_SQ_PER_CHANNEL")
    found, like = tensors(tmp_path / "after"), tensors(tmp_path / "like")
    assert sorted(found) == sorted(like)
    assert all(found[name].equal(like[name]) for name in found if name.endswith("input_scale"))
    assert findings(tmp_path / "after", "missing-tensor") == []
    assert len(findings(tmp_path / "before", "missing-tensor")) == NUM_LINEARS


def test_a_format_that_loses_the_scale_of_the_whole_weight(
    tmp_path: Path, declare: Declare
) -> None:
    """W4A8_AWQ without weight_scale_2: one pass, units of one weight."""
    run(SOURCE, tmp_path / "before", algo="W4A8_AWQ")
    assert max(len(unit.steps) for unit in planned(SOURCE, algo="W4A8_AWQ").units) == 3

    declare(without("W4A8_AWQ", "weight_scale_2"))

    plan = planned(SOURCE, algo="W4A8_AWQ")
    assert max(len(unit.steps) for unit in plan.units) == 1
    run(SOURCE, tmp_path / "after", algo="W4A8_AWQ")
    before, after = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    lost = set(before) - set(after)
    assert len(lost) == NUM_LINEARS
    assert all(name.endswith(".weight_scale_2") for name in lost)
    assert all(before[name].equal(after[name]) for name in after)
    assert set(findings(tmp_path / "before", "orphan-tensor")) == lost
    assert "| `weight_scale_2` |" not in section("W4A8_AWQ")


@pytest.mark.parametrize("shared", ["own", "siblings"])
def test_who_shares_a_scale_is_the_declarations(
    tmp_path: Path, declare: Declare, shared: str
) -> None:
    declared = find("FP8")
    specs = tuple(
        spec.model_copy(update={"shared": shared}) if spec.role == "global" else spec
        for spec in declared.tensors
    )
    declare(declared.model_copy(update={"tensors": specs}))

    run(SOURCE, tmp_path / "out", algo="FP8")

    after = tensors(tmp_path / "out")
    stem = "model.layers.0.self_attn."
    scales = {after[f"{stem}{leaf}_proj.weight_scale"].item() for leaf in "qkv"}
    assert len(scales) == (1 if shared == "siblings" else 3)


def test_a_divisor_is_the_declarations(tmp_path: Path, declare: Declare) -> None:
    run(SOURCE, tmp_path / "before", algo="FP8")
    declared = find("FP8")

    def halved(spec: TensorSpec) -> TensorSpec:
        return spec.model_copy(update={"divisor": 224.0}) if spec.role == "input" else spec

    declare(declared.model_copy(update={"tensors": tuple(map(halved, declared.tensors))}))
    run(SOURCE, tmp_path / "after", algo="FP8")

    before, after = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    changed = {name for name in after if not before[name].equal(after[name])}
    assert changed == {name for name in after if name.endswith(".input_scale")}
    assert all(after[name].item() == 2 * before[name].item() for name in changed)


def test_a_size_that_a_format_needs_is_the_declarations(declare: Declare) -> None:
    declare(find("W8A16").model_copy(update={"multiple_of_n": 3}))

    with pytest.raises(ConvertError, match="W8A16 needs rows in multiples of 3, found 256"):
        planned(SOURCE, algo="W8A16")
    assert "needs N in multiples of 3" in section("W8A16")


def test_what_is_read_only_is_the_declarations(declare: Declare) -> None:
    declare(find("MXFP8").model_copy(update={"read_only": "it went out of fashion"}))

    with pytest.raises(ValueError, match="MXFP8 is read, not written: it went out of fashion"):
        planned(SOURCE, algo="MXFP8")


def test_a_tensor_that_need_not_be_there_is_no_finding(tmp_path: Path, declare: Declare) -> None:
    """pre_quant_scale: absent without smoothing; asked for as soon as it is required."""
    run(SOURCE, tmp_path / "out", algo="W4A16_AWQ")
    assert findings(tmp_path / "out", "missing-tensor") == []
    declared = find("W4A16_AWQ")
    specs = tuple(spec.model_copy(update={"required": True}) for spec in declared.tensors)

    declare(declared.model_copy(update={"tensors": specs}))

    missing = findings(tmp_path / "out", "missing-tensor")
    assert len(missing) == NUM_LINEARS
    assert all(name.endswith(".pre_quant_scale") for name in missing)


def test_swapping_leaves_nothing_behind() -> None:
    """The tests above put every declaration back."""
    assert {spec.suffix for spec in find("FP8").tensors} == {
        "weight",
        "weight_scale",
        "input_scale",
    }
    assert {algo for algo, suffix in BESIDE if suffix == "input_scale"} == {
        algo for algo in WRITABLE if find(algo).specs("input")
    }
