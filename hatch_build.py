"""Compiles kernels/qkernels/native_src/*.c into the shared library that `qkernels.native` loads.

Hatchling runs this as a build hook: an editable install gets `kernels/qkernels/libqkernels.so`, a
wheel gets it inside the package and a platform tag. Where there is no working C compiler the
wheel is pure Python and the package falls back to torch. `python hatch_build.py` compiles in
place, without hatchling.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hatchling.builders.config import BuilderConfig
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    Hook = BuildHookInterface[BuilderConfig]
else:
    try:
        from hatchling.builders.hooks.plugin.interface import BuildHookInterface as Hook
    except ImportError:  # compiling in place needs no hatchling
        Hook = object

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "kernels" / "qkernels" / "native_src"
LIBRARY = ROOT / "kernels" / "qkernels" / "libqkernels.so"
# contraction and fast math would change bytes; see native_src/qk.h
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden")
# the second set is for compilers and C libraries without function multiversioning
VARIANTS: tuple[tuple[str, ...], ...] = ((), ("-DQK_NO_CLONES",))


class CompileError(Exception):
    """No compiler, or none that builds a library which loads; the text says what was tried."""


def compilers() -> list[list[str]]:
    """Command lines of the C compilers to try, in order: what $CC says alone, else the usual names.

    Raises: CompileError for a $CC that is no command line.
    """
    named = os.environ.get("CC", "").strip()
    if named:
        try:
            return [shlex.split(named)]
        except ValueError as error:
            raise CompileError(f"$CC is {named!r}: {error}") from None
    return [[path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]


def compile_library(out: Path, *, extra: Sequence[str] = ()) -> None:
    """Compile all of native_src to the shared library `out`.

    Raises: CompileError with every attempt's reason.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # beside its place, so that it can be moved there in one step
        scratch = tempfile.TemporaryDirectory(dir=out.parent)
    except OSError as error:
        raise CompileError(f"can't write {out.parent}: {error.strerror}") from None
    with scratch as folder:
        _compile_in(Path(folder), out, extra)


def _compile_in(folder: Path, out: Path, extra: Sequence[str]) -> None:
    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    failures = []
    built = folder / out.name
    for compiler in compilers():
        for variant in VARIANTS:
            command = [*compiler, *FLAGS, *variant, *extra, "-o", str(built), *sources, "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
                # resolving the instruction set happens on load, so a bad build shows here
                ctypes.CDLL(str(built))
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", None) or str(error)
                failures.append(f"{shlex.join(command[:1])}: {reason.strip()[:2000]}")
                continue
            # a process that has the old library mapped keeps it: replace, never overwrite
            os.replace(built, out)
            return
    raise CompileError("; ".join(failures) or "no C compiler: set CC or install gcc or clang")


class NativeBuildHook(Hook):
    """Puts the compiled library into wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile and register the library; warn and stay pure Python when that fails."""
        if self.target_name != "wheel":
            return
        try:
            compile_library(LIBRARY)
        except CompileError as error:
            # a library of older sources would be worse than none
            with contextlib.suppress(OSError):
                LIBRARY.unlink()
            self.app.display_warning(
                f"qkernels: no native library, so CPU conversion needs torch and is slower: {error}"
            )
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        # ignored by git, so it must be named; an editable install finds it in the source tree
        if version != "editable":
            build_data["force_include"][str(LIBRARY)] = f"qkernels/{LIBRARY.name}"


if __name__ == "__main__":
    try:
        compile_library(LIBRARY, extra=sys.argv[1:])
    except CompileError as error:
        sys.exit(f"hatch_build.py: {error}")
    print(LIBRARY)
