"""The build of the native library: there where a compiler is, and never a failed install."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from qkernels import codecs, native

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_machine_with_a_compiler_has_the_native_kernels(build: ModuleType) -> None:
    """Else the suite would skip what tests them and stay green."""
    assert not build.compilers() or [name for name in codecs() if not native.supports(name)] == []


@pytest.mark.parametrize("command", ["false", "no-such-compiler", 'gcc "'])
def test_a_bad_compiler_is_a_compile_error(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CC", command)

    with pytest.raises(build.CompileError):
        build.compile_library(tmp_path / "lib.so")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_compile_error(build: ModuleType) -> None:
    with pytest.raises(build.CompileError, match="can't write"):
        build.compile_library(Path("/proc/self/lib.so"))


def test_a_blank_cc_is_none(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    usual = build.compilers()
    monkeypatch.setenv("CC", " ")

    assert build.compilers() == usual
