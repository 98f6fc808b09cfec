"""Finding a format's kernels by name."""

import subprocess
import sys

import pytest

import qkernels
from qkernels.errors import KernelError


@pytest.mark.parametrize("name", ["FP8_PB_WO", "fp8_pb_wo", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_a_format_is_its_module(name):
    assert qkernels.kernels_for(name).__name__ == f"qkernels.{name.lower()}"


def test_formats_are_the_files():
    assert qkernels.formats() == ["FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"]


@pytest.mark.parametrize("name", qkernels.formats())
def test_every_format_exports_the_protocol(name):
    wanted = [member for member in vars(qkernels.Kernels) if not member.startswith("_")]
    module = qkernels.kernels_for(name)

    assert len(wanted) == 9
    assert [member for member in wanted if not callable(getattr(module, member, None))] == []


@pytest.mark.parametrize("name", ["NVFP9", "native", "stats", "_e4m3", "", "../errors", "errors"])
def test_unknown_name_lists_what_exists(name):
    with pytest.raises(KernelError, match="there are FP8_PB_WO, FP8_PER_CHANNEL_PER_TOKEN"):
        qkernels.kernels_for(name)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import qkernels, qkernels.native; qkernels.native.available()",
            ["torch", "triton", "numpy"],
        ),
        ("import qkernels; qkernels.kernels_for('FP8_PB_WO')", ["triton"]),
    ],
)
def test_imports_stay_light(statement, absent):
    code = f"{statement}; import sys; print([m for m in {absent} if m in sys.modules])"

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == "[]"
