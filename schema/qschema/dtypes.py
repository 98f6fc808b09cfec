"""The dtypes of the safetensors format, by their names in a header.

Source: safetensors 0.8.0, safetensors/src/tensor.rs, enum Dtype (22 names).
"""

from math import prod

# bits per element, in the order of the enum, by which files are laid out
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# dtypes that only quantized weights have
QUANTIZED = frozenset(dtype for dtype in BITS if dtype.startswith(("F4", "F6_", "F8_")))

# what a converter may quantize
HIGH_PRECISION = frozenset({"F32", "F16", "BF16"})


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor: ceil(elements * bits / 8) for sub-byte dtypes."""
    return (prod(shape) * BITS[dtype] + 7) // 8
