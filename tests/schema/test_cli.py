"""The qschema command: what it prints where, its exit codes, and what it does not import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qschema import __version__, catalog
from qschema.cli import main

EXAMPLES = Path(__file__).resolve().parents[2] / "fixtures" / "documents"
GOOD = EXAMPLES / "positive" / "hf-quant-config" / "modelopt_llama-fp8_kv_fp8.json"
BAD = EXAMPLES / "negative" / "hf-quant-config" / "two-faults.json"
NOTED = EXAMPLES / "positive" / "config" / "other_awq.json"


def run(*args: object):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_clean_file_exits_0_and_prints_nothing_to_stdout():
    result = run("check", GOOD)

    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "1 file checked, no errors\n"


def test_findings_exit_1_one_line_each():
    result = run("check", BAD, GOOD)

    first, second = result.stdout.splitlines()
    assert result.exit_code == 1
    assert first.startswith(f"{BAD}::$.quantization.quant_algo: literal-error: ")
    assert second == (
        f"{BAD}::$.quantization.has_zero_point: bool-type: Input should be a valid boolean, "
        "found 'no'"
    )
    assert result.stderr == "2 files checked, 2 errors in 1 file\n"


def test_unreadable_file_exits_2_and_the_others_are_still_checked(tmp_path):
    result = run("check", tmp_path / "gone.json", BAD)

    assert result.exit_code == 2
    assert f"qschema: can't read {tmp_path / 'gone.json'}: No such file" in result.stderr
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize("args", [[], ["check"], ["check", "--as", "x", GOOD], ["chek"]])
def test_misuse_exits_2(args):
    assert run(*args).exit_code == 2


def test_json_format_is_one_document_and_survives_quiet():
    result = run("check", "-q", "--format", "json", BAD, NOTED)

    files = json.loads(result.stdout)["files"]
    assert (result.exit_code, result.stderr) == (1, "")
    assert [(entry["document"], len(entry["findings"])) for entry in files] == [
        ("hf-quant-config", 2),
        ("config", 1),
    ]
    assert set(files[0]["findings"][0]) == {"where", "rule", "message", "severity"}


def test_notes_are_printed_but_do_not_fail_and_quiet_hides_them():
    assert "quant-method-unknown: note: " in run("check", NOTED).stdout
    assert run("check", NOTED).exit_code == 0
    assert run("check", "-q", NOTED).stdout == ""


def test_verbose_says_what_each_file_was_checked_as():
    result = run("check", "-v", GOOD, BAD)

    assert f"{GOOD}: hf-quant-config: ok\n" in result.stderr
    assert f"{BAD}: hf-quant-config: findings\n" in result.stderr


def test_directory_means_its_known_files(tmp_path):
    for name in ("hf_quant_config.json", "tokenizer.json", "notes.txt"):
        (tmp_path / name).write_bytes(GOOD.read_bytes())
    (tmp_path / "model.safetensors").symlink_to("gone")

    result = run("check", "-v", tmp_path)

    assert "hf_quant_config.json: hf-quant-config: ok" in result.stderr
    assert "tokenizer" not in result.stderr
    assert f"can't read {tmp_path / 'model.safetensors'}" in result.stderr
    assert result.exit_code == 2


def test_color_is_on_demand():
    assert "\x1b[" in run("check", "--color", "always", BAD).stdout
    assert "\x1b[" not in run("check", "--color", "never", BAD).stdout
    assert "\x1b[" not in run("check", BAD).stdout


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"\x1b[2J\ud800": 1, "producer": 1, "quantization": 1}))

    result = run("check", path)

    assert result.exit_code == 1
    assert "\x1b" not in result.stdout


def test_list_names_every_document():
    lines = run("list").stdout.splitlines()

    assert [line.split()[0] for line in lines] == catalog.ids()


def test_export_prints_what_it_wrote(tmp_path):
    result = run("export", tmp_path)

    assert result.exit_code == 0
    assert [Path(line) for line in result.stdout.splitlines()] == [
        tmp_path / document.schema_file for document in catalog.DOCUMENTS
    ]


def test_version():
    assert run("--version").stdout.endswith(f"{__version__}\n")


def test_check_imports_nothing_heavy():
    """A hook pays for every import: no torch, triton, numpy, and no jsonschema or rich either."""
    probe = (
        "import atexit, sys\n"
        "from qschema.cli import main\n"
        "atexit.register(lambda: print(*sys.modules))\n"
        "main(['check', *sys.argv[1:]])\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", probe, str(GOOD)], capture_output=True, text=True, check=True
    )

    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "qschema" in loaded
    assert not loaded & {"torch", "triton", "numpy", "jsonschema", "rich", "transformers", "yaml"}
