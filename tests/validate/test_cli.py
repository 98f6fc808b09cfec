"""The command: its spelling, exit status, and what goes where."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from catalogue import PB_WO, PC_PT
from checkpoints import draft
from click.testing import CliRunner, Result

from qvalidate import cli, cli_check
from qvalidate.reports.schema import PUBLISHED
from qvalidate.result import Result as Document
from qvalidate.rules import RULES
from qvalidate.rules.outside import ENGINE, LOADING

WHERE = "model.layers.0.mlp.down_proj.weight_scale"


@pytest.fixture
def good(tmp_path: Path) -> str:
    return str(draft("qwen3", PC_PT).write(tmp_path / "good"))


@pytest.fixture
def bad(tmp_path: Path) -> str:
    made = draft("qwen3", PB_WO)
    made.pop(WHERE)
    return str(made.write(tmp_path / "bad"))


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.main, list(args))


def test_clean_checkpoint_exits_0_and_prints_nothing(good: str) -> None:
    result = invoke(good)

    assert (result.exit_code, result.stdout) == (0, "")
    assert "0 errors, 0 warnings, 0 notes" in result.stderr


def test_command_may_be_spelt_out(good: str) -> None:
    assert invoke("check", good).exit_code == 0
    assert invoke("--level", "rules", good).exit_code == 0


def test_finding_is_a_line_with_file_tensor_and_rule(bad: str) -> None:
    result = invoke(bad)

    assert result.exit_code == 1
    assert result.stdout == (
        f"{bad}/model.safetensors::{WHERE}: missing-tensor: missing; FP8_PB_WO needs F32 "
        "[2, 1, 2, 1] (scale of each 128x128 block; edge blocks are ragged)\n"
    )
    assert "hint: qvalidate explain missing-tensor" in result.stderr


def test_quiet_says_nothing_on_stderr(bad: str) -> None:
    assert invoke(bad, "-q").stderr == ""


def test_json_is_a_strict_document(bad: str) -> None:
    result = invoke(bad, "--format", "json")
    document = Document.parse(json.loads(result.stdout), file="-")

    assert result.exit_code == 1
    assert document.findings[0].where == WHERE
    assert document.checkpoint.algo == "fp8_pb_wo"
    assert document.checkpoint.digest is not None
    assert "missing-tensor" in document.rules


@pytest.mark.parametrize(
    ("style", "start"),
    [
        ("junit", '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="qvalidate"'),
        ("sarif", '{\n  "$schema": "https://docs.oasis-open.org/sarif'),
        ("html", "<!DOCTYPE html>\n"),
    ],
)
def test_reports_name_the_finding(style: str, start: str, bad: str) -> None:
    result = invoke(bad, "--format", style)

    assert result.exit_code == 1
    assert result.stdout.startswith(start)
    assert "model.layers.0.mlp.down_proj.weight" in result.stdout.replace("<wbr>", "")


def test_json_and_html_have_the_numbers_of_the_pictures(good: str) -> None:
    document = Document.parse(json.loads(invoke(good, "--format", "json").stdout), file="-")

    assert document.measured is not None
    assert document.measured.scales != []
    assert "<svg" in invoke(good, "--format", "html").stdout


def test_schema_is_the_published_one() -> None:
    assert invoke("schema").stdout == PUBLISHED.read_text(encoding="utf-8")


def test_output_goes_to_a_file(bad: str, tmp_path: Path) -> None:
    file = tmp_path / "report.txt"
    result = invoke(bad, "--output", str(file), "-q")

    assert result.stdout == ""
    assert f"::{WHERE}: missing-tensor:" in file.read_text()


def test_color_is_for_terminals_or_on_request(bad: str) -> None:
    assert "\x1b[" not in invoke(bad).stdout
    assert "\x1b[31mmissing-tensor" in invoke(bad, "--color", "always").stdout


def test_warnings_fail_only_if_strict(tmp_path: Path) -> None:
    made = draft("qwen3", PC_PT)
    del made.files["tokenizer.json"]
    path = str(made.write(tmp_path / "made"))

    assert invoke(path).exit_code == 0
    assert invoke(path, "--strict").exit_code == 1


def test_many_findings_of_a_rule_are_cut(tmp_path: Path) -> None:
    made = draft("mixtral", PB_WO)
    for tensors in made.shards.values():
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            del tensors[name]
    path = str(made.write(tmp_path / "made"))

    assert "... and 22 more of missing-tensor (-v shows them)" in invoke(path).stdout
    assert invoke(path, "-v").stdout.count("missing-tensor:") == 32


def test_unreadable_checkpoint_is_findings(tmp_path: Path) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "made")
    (path / "model-00002-of-00003.safetensors").unlink()
    (path / "model-00003-of-00003.safetensors").write_bytes(b"123")
    result = invoke(str(path))

    assert result.exit_code == 1
    assert "$.weight_map: index-missing-shard: names model-00002-of-00003" in result.stdout
    assert "model-00003-of-00003.safetensors: safetensors-truncated" in result.stdout


def test_file_that_cannot_be_read_exits_2(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", f"{good}/model.safetensors")

    monkeypatch.setattr(cli_check, "validate", refuse)
    result = invoke(good)

    assert result.exit_code == 2
    assert f"can't read {good}/model.safetensors: Permission denied" in result.stderr


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}'])
def test_broken_hf_quant_config_is_a_finding(text: str, good: str) -> None:
    (Path(good) / "hf_quant_config.json").write_text(text)
    result = invoke(good)

    assert result.exit_code == 1
    assert result.stdout.startswith(f"{good}/hf_quant_config.json::$: ")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{tmp}/nowhere"], "does not exist"),
        (["{good}", "--engine", "vlm"], "there is vllm"),
        (["{good}", "--level", "load"], "needs an engine"),
        (["{good}", "--engine", "vllm", "--level", "compare"], "--reference DIR"),
        (["{good}", "--engine", "vllm", "--timeout", "-1"], "-1.0 is not in the range x>0"),
        (["{good}", "--engine", "vllm", "--timeout", "nan"], "nan is not a finite number"),
        (["{good}", "--timeout", "inf"], "inf is not a finite number"),
        (["{good}", "--max-kl", "nan"], "nan is not a finite number"),
        (["{good}", "--max-kl", "0"], "0.0 is not in the range x>0"),
        (["{good}", "--max-rel", "-1"], "-1.0 is not in the range x>0"),
        (["{good}", "--min-top1", "1.5"], "1.5 is not in the range 0<=x<=1"),
        (["{good}", "--min-top1", "nan"], "nan is not a finite number"),
        (["{good}", "--output", "{tmp}/no/where"], "there is no directory {tmp}/no"),
        (["{good}", "--engine", ""], "no engine is named"),
        (["{good}", "--engine", "vllm", "--python", "sglang=/x"], "sglang is not in --engine"),
        (["{good}", "--tp", "1025"], "1025 is not in the range 1<=x<=1024"),
        (["matrix", "--engine", "vllm", "--gpu", "h100"], "expected what it runs on: sm_90"),
        (["matrix", "--engine", "vllm", "--gpu", "any"], "expected what it runs on: sm_90"),
        (["explain", "mising-tensor"], "did you mean missing-tensor?"),
        (["{good}", "--bogus"], "No such option"),
    ],
)
def test_misuse_exits_2_in_one_sentence(
    args: list[str], words: str, good: str, tmp_path: Path
) -> None:
    result = invoke(*(arg.format(good=good, tmp=tmp_path) for arg in args))

    assert result.exit_code == 2
    assert words.format(tmp=tmp_path) in result.stderr
    assert "validation error" not in result.stderr


def test_a_name_that_is_not_utf8_is_misuse(tmp_path: Path) -> None:
    odd = tmp_path / "n\udcff"
    odd.mkdir()
    result = invoke(str(odd), "--format", "json")

    assert result.exit_code == 2
    assert "is not UTF-8; rename it" in result.stderr


def test_interrupted_is_neither_clean_nor_findings(
    good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_check, "validate", interrupt)
    result = invoke(good)

    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_hints_lead_somewhere(good: str) -> None:
    (Path(good) / "hf_quant_config.json").write_text('{"quantization": 1}')
    stderr = invoke(good, "--level", "rules").stderr
    hints = re.findall(r"hint: qvalidate explain (\S+)", stderr)

    assert all(invoke("explain", rule_id).exit_code == 0 for rule_id in hints)


def test_rules_need_no_torch(good: str) -> None:
    script = (
        "import sys; from qvalidate.cli import main\n"
        f"try: main([{good!r}])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print([name for name in ('torch', 'triton', 'numpy', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.stdout == "[]\n", done.stderr


def test_explain_says_whom_it_concerns_and_how_it_is_known() -> None:
    text = invoke("explain", "vllm-experts-unsupported").stdout

    assert "Holds for vllm >=0.32,<0.34." in text
    assert "run on an H200 with vLLM 0.33.0" in text
    assert "no safetensors file" in invoke("explain", "checkpoint-empty").stdout


def test_every_rule_is_listed_and_explained() -> None:
    listed = invoke("rules").stdout
    for rule_id in RULES:
        assert rule_id in listed
        assert invoke("explain", rule_id).exit_code == 0


def test_every_id_of_the_loader_is_explained() -> None:
    """The ids in the source of the loader and of the engine adapters, found as text."""
    root = Path(__file__).parents[2]
    files = [root / "schema/qschema" / f"{name}.py" for name in ("checkpoint", "safetensors")]
    found = set()
    for file in [*files, root / "schema/qschema/strict.py"]:
        pattern = r'"((?:safetensors|index|weights|checkpoint|config|tensor|file|json)-[a-z0-9-]+)"'
        found |= set(re.findall(pattern, file.read_text()))
    for file in [*(root / "validate/qvalidate/engines").glob("*.py")]:
        found |= set(re.findall(r'"(engine-[a-z-]+)"', file.read_text()))

    # a violation inside the request's model, never a finding
    assert found - set(LOADING) - set(ENGINE) - {"engine-reference"} == set()


def test_committed_catalogue_is_the_generated_one() -> None:
    """Run `qvalidate rules --markdown > docs/rules.md` after changing a rule."""
    committed = (Path(__file__).parents[2] / "docs" / "rules.md").read_text()

    assert committed == invoke("rules", "--markdown").stdout
