"""What a user asks for: which weights get which format, what stays, and how to treat oddities.

`--algo X` is the recipe with the one rule `{match: "*", algo: X}`. Patterns are shell wildcards
(fnmatch, case sensitive) over module names such as `model.layers.0.self_attn.q_proj`. Rules of
several formats make a mixed checkpoint (MIXED_PRECISION).
"""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from qschema.formats import UnknownFormatError, find
from qschema.strict import Strict, violation


def _known(algo: str) -> str:
    try:
        declared = find(algo)
    except UnknownFormatError as error:
        raise violation("unknown-algo", str(error)) from None
    if declared.read_only:
        raise violation("read-only-algo", f"{algo} is read, not written: {declared.read_only}")
    return algo


# the name of a declared format that can be written, its spelling or an alias
AlgoName: TypeAlias = Annotated[str, AfterValidator(_known)]


# what ModelOpt 0.47.0 writes as kv_cache_quant_algo (export/quant_utils.py:438-462)
KvCache: TypeAlias = Literal["FP8", "NVFP4", "NVFP4_AFFINE"]
_GATE = r"^(sqnr|relative_error|saturated) *[<>]=? *[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"


def _gate(text: str) -> str:
    if not re.fullmatch(_GATE, text):
        raise violation(
            "gate",
            "expected a metric (sqnr in dB, relative_error, saturated), <, <=, > or >=, and a "
            "number, such as 'sqnr<20'",
        )
    return text


# a metric of the report, a comparison and a number; a tensor for which it holds is a failure
FailIf: TypeAlias = Annotated[
    str, AfterValidator(_gate), WithJsonSchema({"type": "string", "pattern": _GATE})
]


# of a shell, over the names of modules, tensors or files; an empty one can match nothing
Pattern: TypeAlias = Annotated[str, Field(min_length=1)]


class Rule(Strict):
    """Modules that match `match` get the format `algo`; the first matching rule decides."""

    match: Pattern
    algo: AlgoName


class Recipe(Strict):
    """An ordered list of rules and what is exempt from them. Strict: an unknown key is an error."""

    version: Literal[1] = 1
    # none where only the KV cache is quantized
    rules: list[Rule]
    # modules that stay as they are, beside the default ones (embeddings, lm_head, routers, ...)
    exclude: list[Pattern] = Field(default_factory=list)
    # modules that are quantized although a default exclusion names them
    include: list[Pattern] = Field(default_factory=list)
    # tensors that are not written at all; a pattern for a module means all tensors below it
    drop: list[Pattern] = Field(default_factory=list)
    # files of the source to leave behind, beside known second copies of the weights
    leave: list[Pattern] = Field(default_factory=list)
    # files to copy although they look like a second copy, or belong to no index
    copy_files: list[Pattern] = Field(default_factory=list)
    # how engines keep keys and values: FP8 or NVFP4, with scales from the statistics; none if null
    kv_cache: KvCache | None = None
    # a weight whose size its format can't have: an error, or kept as it is and listed
    on_indivisible: Literal["refuse", "keep"] = "refuse"
    # conditions under which nothing is written, such as "sqnr<20": see qconvert --help
    fail_if: list[FailIf] = Field(default_factory=list)
    # NaN and Inf in the source: an error that names the tensor, unless allowed
    allow_nonfinite: bool = False
    # what the report names tensors' bytes by; blake3 costs a third of sha256's time
    digest: Literal["blake3", "sha256"] = "blake3"

    @model_validator(mode="after")
    def _quantizes(self) -> "Recipe":
        if not self.rules and self.kv_cache is None:
            raise violation("no-rules", "expected rules, or a kv_cache; this quantizes nothing")
        return self
