"""The qdiff command: its spelling, exit status, and what goes where."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from catalogue import PB_WO
from checkpoints import FIXTURES, MIXED, draft
from click.testing import CliRunner, Result
from encoded import converted
from qdiff_edits import DOWN, edit_tensor

from qvalidate.diff import cli, tensors
from qvalidate.diff.comparison import compare
from qvalidate.diff.result import DiffResult

LLAMA = FIXTURES / "llama"


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    one, other = draft("llama", PB_WO), draft("llama", PB_WO)
    other.quantize_cache("FP8")
    other.set_exclude([*reversed(other.exclude)])
    return one.write(tmp_path / "a"), other.write(tmp_path / "b")


def test_text_says_what_matters(two: tuple[Path, Path]) -> None:
    result = invoke(*two)

    assert result.exit_code == 1
    assert result.stdout == (
        "quantization\n"
        "  kv cache: none -> FP8\n"
        '  hf_quant_config.json::$.quantization.kv_cache_quant_algo: null -> "FP8"\n'
        "tensors: 35 equal, 4 added\n"
        "  + *.k_scale x2: F32 []\n"
        "  + *.v_scale x2: F32 []\n"
        "only spelt differently\n"
        "  the exclusions are in another order\n"
    )
    assert result.stderr.startswith(f"{two[0]} -> {two[1]}: different in quantization, tensors\n")


def test_the_same_prints_nothing_but_a_summary(two: tuple[Path, Path]) -> None:
    result = invoke(two[0], two[0])

    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"{two[0]} -> {two[0]}: the same in meaning\n"


def test_quiet_leaves_out_spelling_and_words(two: tuple[Path, Path]) -> None:
    result = invoke(*two, "-q")

    assert "order" not in result.stdout
    assert result.stderr == ""


def test_verbose_lists_every_tensor(two: tuple[Path, Path]) -> None:
    assert "  + model.layers.1.self_attn.k_proj.k_scale: F32 []\n" in invoke(*two, "-v").stdout


def test_json_is_a_strict_document(two: tuple[Path, Path]) -> None:
    result = invoke(*two, "--format", "json")
    document = DiffResult.parse(json.loads(result.stdout), file="-")

    assert result.exit_code == 1
    assert (document.document, document.version) == ("qvalidate-diff", 1)
    assert document == compare(*two)


def test_output_goes_to_a_file_without_color(two: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "diff.txt"
    result = invoke(*two, "--output", file)

    assert result.stdout == ""
    assert file.read_text().startswith("quantization\n  kv cache: none -> FP8\n")


def test_color_is_on_request(two: tuple[Path, Path]) -> None:
    assert "\x1b[" not in invoke(*two).stdout
    assert "\x1b[32m+\x1b[0m *.k_scale" in invoke(*two, "--color", "always").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{a}"], "Missing argument 'B'"),
        (["{a}", "{a}/nowhere"], "does not exist"),
        (["{a}", "{a}", "--max-error", "nan"], "expected a number from 0 up"),
        (["{a}", "{a}", "--max-error", "-1"], "expected a number from 0 up"),
        (["{a}", "{a}", "--output", "{a}/no/where"], "can't write"),
        (["{a}", "{a}/.."], "config-missing"),
    ],
)
def test_misuse_exits_2(args: list[str], words: str, two: tuple[Path, Path]) -> None:
    result = invoke(*(arg.format(a=two[0]) for arg in args))

    assert result.exit_code == 2
    assert words in result.stderr


def test_checkpoint_that_cannot_be_read_exits_2(two: tuple[Path, Path]) -> None:
    (two[1] / "model-00002-of-00003.safetensors").unlink()
    result = invoke(*two)

    assert result.exit_code == 2
    assert "index-missing-shard" in result.stderr


def test_without_weights_says_so_and_reads_none(two: tuple[Path, Path]) -> None:
    shard = two[0] / "model-00001-of-00003.safetensors"
    other = Path(shutil.copytree(two[0], two[0].parent / "c"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    (other / shard.name).write_bytes(data)
    result = invoke(two[0], other, "--no-weights")

    assert result.exit_code == 0
    assert "no tensor was read" in result.stdout
    assert "hint: without --no-weights the weights are compared too" in result.stderr
    assert invoke(two[0], other).exit_code == 1


@pytest.mark.parametrize("option", ["--no-weights", "--weights"])
def test_equal_tensors_need_neither_numpy_nor_torch(two: tuple[Path, Path], option: str) -> None:
    script = (
        "import sys; from qvalidate.diff.cli import main\n"
        f"try: main([{str(two[0])!r}, {str(two[1])!r}, {option!r}])\n"
        "except SystemExit as end: assert end.code == 1, end.code\n"
        "print([name for name in ('torch', 'triton', 'numpy', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.stdout.endswith("[]\n"), done.stderr


def test_missing_numpy_is_named(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(cli, "compare", refuse)
    result = invoke(*two)

    assert result.exit_code == 2
    assert "pip install 'qconvert[validate]', or --no-weights" in result.stderr


def test_errors_up_to_a_limit_count_as_the_same(tmp_path: Path) -> None:
    one, other = draft("llama", PB_WO), draft("llama", PB_WO)
    edit_tensor(f"{DOWN}.weight_scale", lambda scale: scale * 1.01, "<f4")(other)
    paths = one.write(tmp_path / "a"), other.write(tmp_path / "b")
    results = [invoke(*paths, "--max-error", limit) for limit in ("0", "0.009", "0.011")]

    assert [result.exit_code for result in results] == [1, 1, 0]
    assert results[-1].stderr.startswith(
        f"{paths[0]} -> {paths[1]}: the same in meaning, weights to within 0.011\n"
    )


def test_text_lists_kinds_worst_first(tmp_path: Path) -> None:
    path = converted("llama", MIXED, tmp_path / "out")
    result = invoke(LLAMA, path)
    lines = result.stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("weights: "))

    assert lines[at].startswith("weights: 7 equal, 14 differ by 0.0")
    assert lines[at + 1 : at + 3] == ["  BF16 -> NVFP4: 6 weights", "  BF16 -> FP8: 8 weights"]
    assert lines[at + 3].startswith("  mlp.")
    assert f"hint: qvalidate {path} --reference {LLAMA} judges" in result.stderr


def test_shard_that_ends_early_exits_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draft("llama", PB_WO).write(tmp_path / "a")
    other = Path(shutil.copytree(path, tmp_path / "b"))

    def refuse(*args: object) -> bytearray:
        raise OSError(0, "ends before its header says", "x.safetensors")

    monkeypatch.setattr(tensors, "read", refuse)
    result = invoke(path, other)

    assert result.exit_code == 2
    assert "can't read x.safetensors: ends before its header says" in result.stderr
