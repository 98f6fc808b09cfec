"""How one tensor is encoded: quantize and dequantize, per format, the same bytes on every device.

Each codec is one file named like its format in lower case, which holds a `CODEC`. Formats that
differ only in what stands beside the weight (NVFP4 and NVFP4_AWQ) share one. Importing this package
imports no torch: a codec's module does.
"""

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qkernels.errors import KernelError

if TYPE_CHECKING:
    from qkernels.codec import Codec

# modules of this package that hold no codec
_SHARED = frozenset({"amax", "codec", "errors", "native", "stats"})


def codecs() -> list[str]:
    """Names, upper case and sorted, of the codecs there are."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(stem.upper() for stem in stems - _SHARED if not stem.startswith("_"))


@cache
def kernels_for(name: str) -> "Codec":
    """The codec of a name in any case. Imports torch.

    Raises: KernelError for an unknown name; lists the known ones.
    """
    if name.upper() not in codecs():
        raise KernelError(f"no kernels for {name!r}; there are {', '.join(codecs())}")
    module = importlib.import_module(f"qkernels.{name.lower()}")
    return cast("Codec", module.CODEC)
