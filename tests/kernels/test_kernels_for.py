"""Finding a codec by name."""

import subprocess
import sys

import pytest

import qkernels
from qkernels.codec import Codec
from qkernels.errors import KernelError

NAMES = [
    "FP8",
    "FP8_PB_WO",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "W4A16_AWQ",
    "W4A8_NVFP4_FP8",
    "W8A16",
]


def test_codecs_are_the_files():
    assert qkernels.codecs() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_is_what_its_module_holds(name):
    codec = qkernels.kernels_for(name)

    assert isinstance(codec, Codec)
    assert codec.name == name
    assert qkernels.kernels_for(name.lower()) is codec
    assert sys.modules[f"qkernels.{name.lower()}"].CODEC is codec


@pytest.mark.parametrize(
    "name",
    ["NVFP9", "native", "stats", "amax", "codec", "_e4m3", "", "../errors", "errors", "fp8.py"],
)
def test_unknown_name_lists_what_exists(name):
    with pytest.raises(KernelError, match=f"there are {', '.join(NAMES)}$"):
        qkernels.kernels_for(name)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import qkernels, qkernels.native; qkernels.native.available(); qkernels.codecs()",
            ["torch", "triton", "numpy"],
        ),
        ("import qkernels; [qkernels.kernels_for(name) for name in qkernels.codecs()]", ["triton"]),
    ],
)
def test_imports_stay_light(statement, absent):
    code = f"{statement}; import sys; print([m for m in {absent} if m in sys.modules])"

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert result.stdout.strip() == "[]"
