"""What `--engine`, `--gpu` and `--python` are taken to mean."""

from pathlib import Path

import pytest
from catalogue import PC_PT
from checkpoints import draft

from qvalidate.choice import ChoiceError, Wishes, choose
from qvalidate.loader import load
from qvalidate.result import RunLevel
from qvalidate.rules import RULES
from qvalidate.targets import (
    KNOWN,
    Deployment,
    Target,
    TargetError,
    every_target,
    parse_gpu,
    parse_targets,
)
from qvalidate.validation import predict, validate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vllm", {"vllm": ("0.32.0", "0.33.0")}),
        ("vllm>=0.33", {"vllm": ("0.33.0",)}),
        ("vllm>=0.32,<0.33", {"vllm": ("0.32.0",)}),
        ("vllm>=0.33,sglang==0.5.17", {"vllm": ("0.33.0",), "sglang": ("0.5.17",)}),
        (" vllm ~= 0.33.0 , tensorrt-llm", {"vllm": ("0.33.0",), "tensorrt-llm": None}),
    ],
)
def test_engines_and_versions(text: str, expected: dict[str, tuple[str, ...] | None]) -> None:
    found = {target.engine: target.versions for target in parse_targets(text)}

    assert found == {name: versions or KNOWN[name] for name, versions in expected.items()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vlm", "unknown engine 'vlm'; there is vllm, sglang, tensorrt-llm"),
        ("vllm==0.11", "no rules are known for it, but for 0.32.0, 0.33.0"),
        ("vllm=0.33", "names no versions; expected e.g. vllm==0.33.0"),
        ("vllm,vllm==0.33", "vllm is named twice"),
        (",", "no engine is named"),
        ("", "no engine is named"),
        ("VLM==1", "unknown engine 'vlm'"),
    ],
)
def test_what_names_no_engine(text: str, words: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_targets(text)

    assert words in str(caught.value)


def test_engines_are_found_in_their_own_spelling() -> None:
    (found,) = parse_targets("vLLM>=0.33")

    assert (found.engine, found.text) == ("vllm", "vllm>=0.33")


@pytest.mark.parametrize(
    ("text", "ran", "is_wanted"),
    [
        ("vllm", "0.99.0", True),
        ("vllm==0.33.0", "0.33.0+cpu", True),
        ("vllm==0.33.0", "0.32.0", False),
        ("vllm>=0.33", "0.34.0.dev7", True),
        ("vllm>=0.33", "from-source", True),
    ],
)
def test_versions_that_are_meant(text: str, ran: str, is_wanted: bool) -> None:
    (found,) = parse_targets(text)

    assert found.wants(ran) is is_wanted


def test_one_known_version_of_several() -> None:
    (found,) = parse_targets("vllm")

    assert found.only("0.32.0+cpu") == Target("vllm", ("0.32.0",), "vllm")
    assert found.only("0.34.0") is None


def test_a_cpu_has_no_kind_of_gpu() -> None:
    assert Deployment.on("cpu", tp=2) == Deployment(tp=2, on_cpu=True)
    assert Deployment.on("sm_90") == Deployment(gpu=90)
    assert Deployment.on(None) == Deployment()


def test_gpus() -> None:
    assert (parse_gpu("sm_90"), parse_gpu("SM120")) == (90, 120)
    with pytest.raises(TargetError, match="expected sm_80"):
        parse_gpu("h200")


def test_a_rule_holds_for_the_versions_that_it_names() -> None:
    (both,) = parse_targets("vllm")
    (new,) = parse_targets("vllm==0.33.0")
    (other,) = parse_targets("sglang")
    ignored = RULES["vllm-ignore-key"]

    assert [ignored.holds_for(target) for target in (both, new, other)] == [True, False, False]
    assert RULES["missing-tensor"].holds_for(other)


def test_every_version_is_a_target_of_its_own_where_none_is_named(tmp_path: Path) -> None:
    path = draft("qwen3", PC_PT).write(tmp_path / "made")
    result = validate(path)

    assert [(report.engine, *report.versions) for report in result.engines] == [
        (name, version) for name, versions in KNOWN.items() for version in versions
    ]
    assert result.is_for_any_engine


def test_an_unreadable_checkpoint_has_no_prediction(tmp_path: Path) -> None:
    path = draft("qwen3", PC_PT).write(tmp_path / "made")
    (path / "config.json").unlink()
    result = validate(path, targets=parse_targets("vllm,sglang"))

    assert [report.predicted for report in result.engines] == ["unknown", "unknown"]


def ask(text: str, *pythons: str, level: RunLevel | None = None) -> list[str | None]:
    wishes = Wishes(checkpoint=Path("x"), pythons=pythons, level=level)
    asks, _ = choose(parse_targets(text), wishes)
    return [found.request.python for found in asks if found.request]


def test_an_interpreter_is_named_for_its_engine() -> None:
    assert ask("vllm", "/a/python") == ["/a/python"]
    assert ask("vllm", "vllm=/a/python") == ["/a/python"]
    assert ask("vllm", "/odd=/python") == ["/odd=/python"]


@pytest.mark.parametrize(
    ("text", "pythons", "words"),
    [
        ("vllm,sglang", ["/a/python"], "of which engine? Expected ENGINE=PATH"),
        ("vllm", ["/a", "vllm=/b"], "vllm has two: /a and /b"),
    ],
)
def test_an_interpreter_of_nobody(text: str, pythons: list[str], words: str) -> None:
    with pytest.raises(ChoiceError) as caught:
        ask(text, *pythons)

    assert words in str(caught.value)


def test_an_engine_that_is_not_here_is_asked_only_at_a_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qvalidate.choice.find_spec", lambda name: None)

    assert ask("vllm") == []
    assert ask("vllm", level="generate") == [None]


def test_a_dry_level_stops_before_the_engine_runs() -> None:
    asks, _ = choose(parse_targets("vllm"), Wishes(checkpoint=Path("x"), level="dry", tp=8))
    (found,) = asks

    assert found.request is None
    assert found.dry is not None
    assert (found.level, found.dry.tp) == ("dry", 8)


def test_every_level_of_vllm_begins_with_a_dry_load() -> None:
    (found,) = choose(parse_targets("vllm"), Wishes(checkpoint=Path("x"), level="generate"))[0]
    (other,) = choose(parse_targets("sglang"), Wishes(checkpoint=Path("x"), level="generate"))[0]

    assert found.dry is not None
    assert other.dry is None
    assert (found.stands_in, other.stands_in) == (True, False)


def test_a_server_and_tasks_are_asked_on_request() -> None:
    wishes = Wishes(
        checkpoint=Path("x"), reference=Path("y"), serve=True, tasks=["mmlu"], max_drop=0.5
    )
    (found,) = choose(parse_targets("sglang"), wishes)[0]

    assert found.serve is not None
    assert found.tasks is not None
    assert (found.tasks.tasks, found.tasks.max_drop) == (["mmlu"], 0.5)
    assert found.level == "evaluate"


@pytest.mark.parametrize(
    ("text", "wishes", "words"),
    [
        ("sglang", Wishes(Path("x"), level="dry"), "sglang has none"),
        ("vllm", Wishes(Path("x"), level="compare"), "needs the source: --reference"),
        ("vllm", Wishes(Path("x"), tasks=["mmlu"]), "--tasks needs the source"),
        ("vllm", Wishes(Path("x"), level="rules", serve=True), "--level rules does not"),
        ("", Wishes(Path("x"), serve=True), "need an engine"),
    ],
)
def test_what_does_not_go_together(text: str, wishes: Wishes, words: str) -> None:
    with pytest.raises(ChoiceError, match=words):
        choose(parse_targets(text) if text else (), wishes)


def test_predictions_are_one_engines(tmp_path: Path) -> None:
    """What another engine's rules say does not count."""
    context = load(draft("qwen3", PC_PT).write(tmp_path / "made"))
    findings = list(RULES["vllm-algo-unsupported"].check(context))

    for target in every_target():
        assert isinstance(target, Target)
        assert predict(findings, target) == ("loads", [])
