"""What a user asks for: which weights get which format, what stays, and how to treat oddities.

`--algo X` is the recipe with the one rule `{match: "*", algo: X}`. Patterns are shell wildcards
(fnmatch, case sensitive) over module names such as `model.layers.0.self_attn.q_proj`.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field

from qschema.formats import UnknownFormatError, find
from qschema.strict import Strict, violation


def _known(algo: str) -> str:
    try:
        find(algo)
    except UnknownFormatError as error:
        raise violation("unknown-algo", str(error)) from None
    return algo


# the name of a declared format, its spelling or an alias
AlgoName: TypeAlias = Annotated[str, AfterValidator(_known)]


class Rule(Strict):
    """Modules that match `match` get the format `algo`; the first matching rule decides."""

    match: str = Field(min_length=1)
    algo: AlgoName


class Recipe(Strict):
    """An ordered list of rules and what is exempt from them. Strict: an unknown key is an error."""

    version: Literal[1] = 1
    rules: list[Rule] = Field(min_length=1)
    # modules that stay as they are, beside the default ones (embeddings, lm_head, routers, ...)
    exclude: list[str] = Field(default_factory=list)
    # modules that are quantized although a default exclusion names them
    include: list[str] = Field(default_factory=list)
    # files of the source to leave behind, beside known second copies of the weights
    leave: list[str] = Field(default_factory=list)
    # files to copy although they look like a second copy, or belong to no index
    copy_files: list[str] = Field(default_factory=list)
    # NaN and Inf in the source: an error that names the tensor, unless allowed
    allow_nonfinite: bool = False
