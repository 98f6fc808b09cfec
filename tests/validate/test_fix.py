"""A repaired checkpoint has the weights' bytes of the broken one, and the rules are content."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from catalogue import Fault
from checkpoints import MIXED, draft
from fixing import PLANTED, planted, rules_of, weights, written

from qschema.formats import formats
from qvalidate.fix import FixReport, apply, fix, plan_repairs
from qvalidate.fix.run import findings
from qvalidate.loader import load

# faults whose rule has nothing to say after the repair: metadata that the stored tensors tell
REPAIRED = {
    "algorithm_of_another_tool",
    "algorithms_differ",
    "block_scale_squeezed_to_two_dimensions",
    "channel_scale_as_column",
    "excluded_layer_quantized",
    "exclusions_differ",
    "exclusions_under_the_other_key",
    "expert_in_another_format",
    "exponents_as_f8_e8m0",
    "format_of_a_layer_is_not_declared",
    "fused_part_in_another_format",
    "group_size_of_a_layer",
    "group_size_of_another_format",
    "index_lies_about_the_size",
    "layer_in_a_format_that_vllm_does_not_know",
    "lists_of_layers_differ",
    "misspelt_key",
    "module_in_another_format_than_listed",
    "mxfp8_in_the_nested_form",
    "name_of_no_module_listed",
    "nested_form_without_a_key",
    "no_hf_quant_config",
    "no_quant_method",
    "no_quantization_config_at_all",
    "one_part_of_qkv_in_nvfp4_listed",
    "one_part_of_qkv_listed",
    "pattern_hits_the_middle_of_a_name",
    "plain_module_listed",
    "quantized_layer_listed_as_excluded",
    "quantized_layers_excluded_by_wildcard",
    "quantized_module_not_listed",
    "router_not_listed",
    "router_pattern_hits_gate_up",
    "stray_file_beside_a_single_one",
    "stray_file_beside_an_index",
    "stray_file_without_an_index",
    "tensor_outside_the_index",
    "tied_head_not_listed",
    "unquantized_layer_not_listed",
    "vllm_refuses_the_name",
    "weight_of_three_dimensions",
    "weight_only_nvfp4_in_the_nested_form",
    "wildcards_over_the_parts",
}
# the fault's own rule is content, and what remains is another rule's: the checkpoint is in parts
# quantized that engines load as one, is not this model's, or can't be told by a list of names
IN_PART = {
    "one_block_scale_squeezed_to_a_scalar": {"shape-disagrees-with-config"},
    "one_part_of_qkv_unquantized_and_not_listed": {"vllm-partial-fusion"},
    "plain_experts_beside_a_quantized_shared_one": {"shape-disagrees-with-config"},
    "plain_linear_in_no_list": {"vllm-exclusion-overreach"},
}
# an engine's refusal of the format itself
_OF_THE_FORMAT = {"vllm-algo-unsupported", "vllm-experts-unsupported"}


@dataclass(frozen=True)
class Done:
    """A planted checkpoint, and what a run made of it."""

    path: Path
    output: Path
    report: FixReport


Repair = Callable[[str], Done]


@pytest.fixture(scope="module")
def repair(tmp_path_factory: pytest.TempPathFactory) -> Repair:
    """Return a function that repairs the planted fault of a name, once."""
    done: dict[str, Done] = {}

    def run(name: str) -> Done:
        if name not in done:
            folder = tmp_path_factory.mktemp("fix")
            path = written(planted(name), folder / "made")
            done[name] = Done(path, folder / "out", fix(path, folder / "out"))
        return done[name]

    return run


@pytest.mark.parametrize("name", sorted(REPAIRED))
def test_planted_fault_is_repaired_and_nothing_is_left(name: str, repair: Repair) -> None:
    report = repair(name).report

    assert planted(name).rule in {found.rule for found in report.before}
    assert rules_of(report) <= _OF_THE_FORMAT
    assert report.left == []


@pytest.mark.parametrize("name", sorted(IN_PART))
def test_planted_fault_is_repaired_as_far_as_metadata_can(name: str, repair: Repair) -> None:
    report = repair(name).report

    assert planted(name).rule not in rules_of(report)
    assert rules_of(report) >= IN_PART[name]


@pytest.mark.parametrize(
    "fault",
    [fault for fault in PLANTED if fault.name not in REPAIRED | IN_PART.keys()],
    ids=lambda fault: fault.name,
)
def test_what_no_metadata_can_repair_is_still_found(fault: Fault, repair: Repair) -> None:
    assert fault.rule in {found.rule for found in repair(fault.name).report.after}


@pytest.mark.parametrize("name", sorted(REPAIRED | IN_PART.keys()))
def test_bytes_of_the_weights_stay(name: str, repair: Repair) -> None:
    done = repair(name)

    assert weights(done.output) == weights(done.path)


@pytest.mark.parametrize("name", sorted(REPAIRED | IN_PART.keys()))
def test_repaired_checkpoint_needs_no_repair(name: str, repair: Repair) -> None:
    again = plan_repairs(load(repair(name).output))

    assert again.repairs == ()
    assert (again.documents, again.headers, again.left_out) == ({}, {}, ())


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
def test_plan_says_what_the_run_finds(fault: Fault, repair: Repair) -> None:
    """The plan is all that a dry run has."""
    done = repair(fault.name)
    planned = plan_repairs(load(done.path))

    assert list(planned.repairs) == done.report.repairs
    assert [(found.rule, found.where) for found in findings(planned.repaired)] == [
        (found.rule, found.where) for found in done.report.after
    ]


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = written(planted("no_quant_method"), tmp_path / "made")
    report = fix(path, tmp_path / "out", dry_run=True)

    assert [repair.id for repair in report.repairs] == ["method-corrected"]
    assert report.after == findings(plan_repairs(load(path)).repaired)
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("algo", [*formats(), MIXED])
@pytest.mark.parametrize("model", ["llama", "mixtral", "qwen3"])
def test_right_checkpoint_is_left_as_it_is(model: str, algo: str, tmp_path: Path) -> None:
    path = draft(model, algo).write(tmp_path / "made")
    planned = plan_repairs(load(path))
    apply(planned, tmp_path / "out")

    assert (planned.repairs, planned.left) == ((), ())
    for file in path.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
