"""The command, as a user meets it: its output, its exit codes, one clear line per error."""

import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import get_args

import pytest
import torch

from qschema.plan import Plan
from qschema.report import Report
from qschema.timings import Stage

from .conversion import digests

Make = Callable[..., Path]
RUN = [sys.executable, "-m", "qconvert"]
W = torch.randn(256, 256, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


def qconvert(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RUN, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(env or {})},
    )


def test_a_conversion_without_a_terminal_says_nothing(llama: Path, tmp_path: Path) -> None:
    done = qconvert(llama, tmp_path / "out", "--algo", "fp8_pb_wo", "--device", "cpu")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "config.json").exists()


def test_asked_it_says_where_the_time_went_and_what_to_do_next(llama: Path, tmp_path: Path) -> None:
    done = qconvert(llama, tmp_path / "out", "--algo", "FP8_PB_WO", "--device", "cpu", "-v")

    head, *table, bottleneck, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (0, "")
    assert head.split() == ["stage", "busy", "share", "GB/s"]
    assert {line.split()[0] for line in table} == {*get_args(Stage), "all"}
    assert re.match(rf"bottleneck: ({'|'.join(get_args(Stage))}), \d+ % of", bottleneck)
    assert last.startswith(f"{tmp_path / 'out'}: 1.4 MiB, 9.69 bits per weight, on cpu")
    assert last.endswith(f"qvalidate {tmp_path / 'out'} --reference {llama}")


def test_notes_are_printed_in_any_case(llama: Path, tmp_path: Path) -> None:
    done = qconvert(llama, tmp_path / "out", "--algo", "FP8_PB_WO", "--exclude", "visual", "-q")

    assert (done.returncode, done.stderr) == (0, "note: 'visual' matches no module\n")


def test_side_files_are_copied_byte_for_byte_with_umask_modes(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
        (source / file.name).chmod(0o600)
    (source / "remote").mkdir()
    (source / "remote" / "modeling.py").write_text("x = 1\n")

    qconvert(source, tmp_path / "out", "--algo", "FP8_PB_WO", "-q", "--device", "cpu")

    names = {"chat_template.jinja", "tokenizer.json", "generation_config.json"}
    for name in (*names, "tokenizer_config.json", "remote/modeling.py"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    for file in (tmp_path / "out").iterdir():
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_dry_run_prints_the_plan_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    done = qconvert(llama, tmp_path / "out", "--algo", "FP8_PB_WO", "--dry-run")

    assert done.returncode == 0
    for line in (
        "quantize 14 tensors",
        "model.layers.*.self_attn.q_proj.weight x2: BF16 [256, 256] -> FP8_PB_WO: weight F8_E4M3 "
        "[256, 256], weight_scale F32 [2, 1, 2, 1]",
        "lm_head.weight: BF16 [512, 256] (output head)",
        "exclude  lm_head, model.embed_tokens",
        "tokenizer.json",
    ):
        assert line in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json_is_the_plan(llama: Path, tmp_path: Path) -> None:
    done = qconvert(llama, tmp_path / "out", "--algo", "FP8_PB_WO", "--dry-run", "--format", "json")

    assert Plan.parse(json.loads(done.stdout), file="stdout").recipe.rules[0].algo == "FP8_PB_WO"


def test_the_report_is_in_the_output_and_on_stdout_if_asked(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = qconvert(llama, out, "--algo", "FP8_PB_WO", "--format", "json", "--device", "cpu")

    report = Report.parse(json.loads(done.stdout), file="stdout")
    assert json.loads((out / "qconvert_report.json").read_text()) == json.loads(done.stdout)
    assert report.bits_per_quantized_weight == pytest.approx(8, abs=0.01)


def test_a_cpu_conversion_imports_no_torch(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from qconvert.cli_commands import qconvert; "
        f"qconvert([{str(llama)!r}, {str(tmp_path / 'out')!r}, '--algo', 'FP8_PB_WO', '-q', "
        "'--device', 'cpu'], standalone_mode=False); "
        "print([name for name in ('torch', 'numpy', 'triton') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_a_conversion_without_native_kernels_says_so(llama: Path, tmp_path: Path) -> None:
    command = [llama, tmp_path / "out", "--algo", "FP8_PB_WO", "--device", "cpu", "-q"]

    done = qconvert(*command, env={"QKERNELS_NATIVE": "0"})

    assert done.returncode == 0
    assert done.stderr.startswith("note: no native kernels")


def test_a_recipe_file_does_what_the_options_do(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules:\n  - {match: '*', algo: fp8_pb_wo}\nexclude: ['model.layers.0']\n")

    qconvert(llama, tmp_path / "a", "--recipe", recipe, "-q", "--device", "cpu")
    qconvert(
        llama, tmp_path / "b", "--algo", "FP8_PB_WO", "--exclude", "model.layers.0", "-q",
        "--device", "cpu",
    )  # fmt: skip

    for file in (tmp_path / "a").glob("model*"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    config = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())
    assert config["quantization"]["exclude_modules"] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0*",
    ]


@pytest.mark.parametrize(
    ("name", "shape", "algo"),
    [
        ("model.layers.0.mlp.up_proj.weight", [1 << 15, 1 << 15], "FP8_PB_WO"),
        # read twice, cut within an expert and transposed
        ("model.layers.0.feed_forward.experts.down_proj", [3, 1 << 15, 1 << 12], "W4A16_NVFP4"),
    ],
)
def test_memory_does_not_grow_with_the_tensor(
    tmp_path: Path, make: Make, name: str, shape: list[int], algo: str
) -> None:
    config = {"model_type": "llama4_text", "hidden_size": 1 << 12}
    source = make({name: W}, config=config)
    # 2 GiB or 768 MiB of zeros that take no disk
    nbytes = 2 * prod(shape)
    info = {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}
    header = json.dumps({name: info}).encode()
    with open(source / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    code = (
        "from pathlib import Path; from qconvert.cli_commands import qconvert; "
        f"qconvert([{str(source)!r}, {str(tmp_path / 'out')!r}, '--algo', {algo!r}, '-q', "
        "'--device', 'cpu', '--memory-budget', '64MiB'], standalone_mode=False); "
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    # the interpreter and pydantic take about 50 MiB
    assert int(done.stdout) < (64 + 128) * 1024


def test_a_terminal_gets_a_bar(llama: Path, tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    command = [*RUN, str(llama), str(tmp_path / "out"), "--algo", "FP8_PB_WO", "--device", "cpu"]
    with subprocess.Popen(command, stderr=terminal) as process:
        process.wait(timeout=60)
    os.close(terminal)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)

    assert "converting" in shown
    assert "check it with: qvalidate" in shown


def test_a_quiet_terminal_gets_neither_bar_nor_summary(llama: Path, tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    command = [*RUN, str(llama), str(tmp_path / "out"), "--algo", "FP8_PB_WO", "-q"]
    with subprocess.Popen(command, stderr=terminal) as process:
        process.wait(timeout=60)
    os.set_blocking(main, False)
    with pytest.raises(BlockingIOError):
        os.read(main, 1)
    os.close(terminal)
    os.close(main)

    assert process.returncode == 0


def test_done_before_is_success_and_changes_nothing(llama: Path, tmp_path: Path) -> None:
    command = [llama, tmp_path / "out", "--algo", "FP8_PB_WO", "--device", "cpu"]
    timings = tmp_path / "timings.json"
    qconvert(*command)
    before = digests(tmp_path / "out")

    again = qconvert(*command, "--timings", timings, "-v")

    assert (again.returncode, digests(tmp_path / "out")) == (0, before)
    assert f"note: {tmp_path / 'out'}: is complete already; nothing was done" in again.stderr
    assert "was there already" in again.stderr
    assert not timings.exists()


def test_a_directory_named_like_a_command_is_reached_by_a_path(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan").symlink_to(llama)
    monkeypatch.chdir(tmp_path)

    done = qconvert("./plan", "out", "--algo", "FP8_PB_WO")

    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "config.json").exists()


def test_ctrl_c_while_it_starts_is_one_line_too() -> None:
    code = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pydantic': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "sys.argv = ['qconvert', 'in', 'out', '--algo', 'FP8_PB_WO']\n"
        "from qconvert.cli import main\n"
        "main()"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 130
    assert done.stderr == "qconvert: interrupted; nothing was written\n"


def test_commands_to_copy_are_quoted(llama: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "my out", tmp_path / "my plan.json"

    plan = qconvert("plan", llama, "--algo", "FP8_PB_WO", "-o", file, "-v")
    done = qconvert("apply", file, out, "-v")

    assert plan.stderr.rstrip().endswith(f"qconvert apply '{file}' OUT_DIR")
    assert done.stderr.rstrip().endswith(f"qvalidate '{out}' --reference {llama}")


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, make: Make) -> None:
    source = make({"model.layers.0.mlp.up_proj.weight": torch.randn(8192, 8192)})
    # one worker without the native kernels takes seconds for this
    env = {**os.environ, "QKERNELS_NATIVE": "0"}
    command = [*RUN, str(source), str(tmp_path / "out"), "--algo", "FP8_PB_WO", "--workers", "1"]
    with subprocess.Popen(
        [*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        while not (tmp_path / "out.partial" / "model.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)

    assert words.splitlines()[-1] == (
        "qconvert: interrupted; run the same command again to go on, or with --fresh to start over"
    )
    assert process.returncode == 130
    assert not (tmp_path / "out").exists()


def test_the_current_directory_can_be_the_output(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")

    done = qconvert(llama, ".", "--algo", "FP8_PB_WO", "-q", "--device", "cpu")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_sigterm_leaves_nothing_behind(tmp_path: Path, make: Make) -> None:
    source = make({"model.layers.0.mlp.up_proj.weight": torch.randn(8192, 8192)})
    env = {**os.environ, "QKERNELS_NATIVE": "0"}
    command = [*RUN, str(source), str(tmp_path / "out"), "--algo", "FP8_PB_WO", "--workers", "1"]
    with subprocess.Popen(
        [*command, "--device", "cpu"], stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        while not (tmp_path / "out.partial" / "model.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        process.communicate(timeout=60)

    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
