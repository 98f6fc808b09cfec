"""What calibration measured: the largest activations, and the scales that smooth them.

    {"document": "qconvert-amax", "version": 1,
     "inputs": {"model.layers.0.self_attn.q_proj": 4.0625, ...},
     "kv_cache": {"model.layers.0.self_attn": {"k": 3.5, "v": 4.25}, ...},
     "vectors": "amax.safetensors"}

`qconvert --amax FILE` takes input_scale and the scales of the KV cache from it. Names are those of
the checkpoint; experts that share one measured input may stand under the name of their stack
(`model.layers.0.mlp.experts.gate_up_proj`). `vectors` is a safetensors file beside this one:

    <module>.pre_quant_scale  F32 [K]  what the input of a module is multiplied with before it is
                                       quantized (AWQ, SmoothQuant); `inputs` then holds the amax of
                                       the product
    <attention>.k_bias, .v_bias  BF16  what is taken off keys and values (NVFP4_AFFINE)
"""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field

from qschema.strict import DocumentError, Strict, load_json, violation

# the largest f32
_LARGEST = 3.4028234663852886e38


def _in_range(amax: float) -> float:
    if not 0 <= amax <= _LARGEST:
        raise violation("amax-value", "expected an f32 number of at least 0")
    return amax


AmaxValue: TypeAlias = Annotated[
    float, Field(json_schema_extra={"minimum": 0}), AfterValidator(_in_range)
]


class KeyValueAmax(Strict):
    """Largest |key| and |value| that an attention layer stored, keys after their rotation."""

    k: AmaxValue
    v: AmaxValue


class Amax(Strict):
    """The statistics of one model's activations. Strict: an unknown key is an error."""

    document: Literal["qconvert-amax"]
    version: Literal[1]
    # module -> largest |x| of its input, after smoothing if it has a pre_quant_scale
    inputs: dict[str, AmaxValue]
    # attention module -> its cache
    kv_cache: dict[str, KeyValueAmax] = Field(default_factory=dict)
    # a file in the same directory
    vectors: str | None = Field(default=None, pattern=r"^[^/]+\.safetensors$")


def load_amax(path: Path) -> Amax:
    """Return the statistics in the JSON file `path`.

    Raises DocumentError for a file that is missing, not JSON, or has a key or a value too many.
    """
    if not path.is_file():
        raise DocumentError.of(path, "", "amax-missing", "no such file")
    return Amax.parse(load_json(path), file=str(path))
