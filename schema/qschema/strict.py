"""The ground that every document stands on: strict models and a JSON loader that loses nothing.

A model here says what a file may contain and never changes what it did contain: unknown keys are
errors, values are not coerced, nothing is filled in behind the reader's back (derive in a method).
"""

import difflib
import json
import re
from functools import cache
from pathlib import Path
from typing import Literal, Self, TypeAlias

import pydantic
from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import PydanticCustomError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Strict(BaseModel):
    """Base of every document model: immutable, no unknown keys, no coercion between JSON types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    @classmethod
    def parse(cls, document: Json, *, file: str) -> Self:
        """Return the model of a parsed JSON `document`.

        Raises DocumentError, which lists every violation with its `$.json.path`.
        """
        try:
            return cls.model_validate(document)
        except pydantic.ValidationError as error:
            raise DocumentError(findings_of(error, file=file, document=document)) from None


class Numerous(Strict):
    """Base of models that a document holds many of: one for each tensor of a checkpoint, or more.

    Pydantic notes in each object which of its fields were given; that set takes more memory than
    the fields. Here all objects of a class share one, which says that all were.
    """

    def model_post_init(self, context: object, /) -> None:
        """Forget which fields were given."""
        object.__setattr__(self, "__pydantic_fields_set__", _all_fields(type(self)))


@cache
def _all_fields(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields)


class Verbatim(Strict):
    """Base of models of other people's files: dumps back the JSON it was parsed from.

    Keys come out in the order of the file, and keys that the file did not have are not added.
    """

    _keys: tuple[str, ...] | None = PrivateAttr(default=None)

    @model_validator(mode="wrap")
    @classmethod
    def _remember_keys(cls, value: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        model = handler(value)
        if isinstance(value, dict):
            model._keys = tuple(value)
        return model

    @model_serializer(mode="wrap")
    def _in_file_order(self, handler: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        data: dict[str, JsonValue] = handler(self)
        return data if self._keys is None else {key: data[key] for key in self._keys}


class Finding(Strict):
    """One thing that is wrong: where, by which rule, and what was found, what was expected."""

    file: str
    # a JSON path ("$.quantization.quant_algo") or a tensor's name; empty for the file as a whole
    where: str
    rule: str
    message: str
    severity: Literal["error", "warning", "note"] = "error"

    def __str__(self) -> str:
        place = f"{self.file}::{self.where}" if self.where else self.file
        level = "" if self.severity == "error" else f"{self.severity}: "
        return f"{place}: {self.rule}: {level}{self.message}"


class DocumentError(ValueError):
    """A file is not what it should be. `findings` has one entry per violation."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__("\n".join(str(finding) for finding in findings))

    @classmethod
    def of(cls, file: str | Path, where: str, rule: str, message: str) -> Self:
        """Return the error with a single finding."""
        return cls([Finding(file=str(file), where=where, rule=rule, message=message)])


def violation(rule: str, message: str) -> PydanticCustomError:
    """Return the error that a model's validator raises; `rule` becomes the finding's rule id."""
    return PydanticCustomError(rule.replace("-", "_"), "{message}", {"message": message})


def json_path(loc: tuple[int | str, ...]) -> str:
    """Return pydantic's error location as a JSON path: ("a", 0, "b.c") -> `$.a[0]['b.c']`."""
    path = "$"
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.replace("_", "a").replace("-", "a").isalnum():
            path += f".{part}"
        else:
            path += f"[{part!r}]"
    return path


# pydantic's words for Python become words for JSON
_RENAMED = {"model_type": "object_type", "dict_type": "object_type"}
_REWORDED = {
    "model_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "list_type": "Input should be an array",
    "extra_forbidden": "unknown key",
    "missing": "required key is missing",
}


def findings_of(
    error: pydantic.ValidationError, *, file: str, document: Json = None
) -> list[Finding]:
    """Return one finding per violation that pydantic reports; the rule id is pydantic's type of it.

    `document` is what was validated: pydantic's locations also name the members of unions that it
    tried, and only the parts that exist in the document belong in a JSON path.
    """
    found = (
        Finding(
            file=file,
            where=json_path(_real(detail["loc"], document, detail["type"])),
            rule=_RENAMED.get(detail["type"], detail["type"]).replace("_", "-"),
            message=_message(detail["msg"], detail["type"], detail["input"]),
        )
        for detail in error.errors(include_url=False)
    )
    # members of a union that fail alike are one finding
    return list(dict.fromkeys(found))


def _real(loc: tuple[int | str, ...], document: Json, kind: str) -> tuple[int | str, ...]:
    if not isinstance(document, dict | list):
        return loc
    node: Json = document
    kept: list[int | str] = []
    for index, part in enumerate(loc):
        inside, node = _step(node, part)
        if inside or (kind == "missing" and index == len(loc) - 1):
            kept.append(part)
    return tuple(kept)


def _step(node: Json, part: int | str) -> tuple[bool, Json]:
    if isinstance(node, dict) and isinstance(part, str) and part in node:
        return True, node[part]
    if isinstance(node, list) and isinstance(part, int) and part < len(node):
        return True, node[part]
    return False, node


def _message(text: str, kind: str, found: object) -> str:
    text = _REWORDED.get(kind, text.removeprefix("Value error, "))
    if kind == "literal_error":
        text = _shorten(text, found)
    if kind == "value_error" or isinstance(found, dict | list):
        return text
    shown = json.dumps(found) if found is None or isinstance(found, bool) else repr(found)
    return f"{text}, found {shown}" if len(shown) <= 120 else text


def _shorten(text: str, found: object) -> str:
    """Return pydantic's list of choices; of a long one the first 5 and the nearest to `found`."""
    values = re.findall(r"'([^']*)'", text)
    if len(values) <= 8:
        return text
    near = difflib.get_close_matches(str(found).upper(), values, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}expected one of {len(values)}: {', '.join(map(repr, values[:5]))}, ..."


_HALF = re.compile("[\ud800-\udfff]")
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def load_json(path: Path, *, constants: bool = False) -> Json:
    """Return the JSON document at `path`.

    `constants` allows NaN and Infinity, which Python writes into some models' config.json.
    Raises DocumentError for text that is not UTF-8, not JSON, has a key twice, or has NaN/Infinity
    (none of them JSON), with line and column, and for half a character in a string, with its path;
    OSError if the file can't be read.
    """
    return parse_json(path.read_bytes(), file=str(path), constants=constants)


def parse_json(data: bytes, *, file: str, constants: bool = False) -> Json:
    """Return the JSON document in `data`; errors as in `load_json`, naming `file`."""
    try:
        document: Json = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=None if constants else _no_constants,
        )
    except UnicodeDecodeError as error:
        raise DocumentError.of(
            file, "$", "json-utf8", f"expected UTF-8 text, byte {error.start} is not"
        ) from None
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        raise DocumentError.of(file, "$", "json-syntax", message) from None
    except RecursionError:
        raise DocumentError.of(file, "$", "json-syntax", "nested too deeply") from None
    except _Rejected as error:
        raise DocumentError.of(file, "$", error.rule, str(error)) from None
    except ValueError as error:
        # Python's own limit on the digits of an integer
        raise DocumentError.of(file, "$", "json-number", str(error).split(";")[0]) from None
    # raw text that is UTF-8 has no halves: only an escape can stand for one
    if _ESCAPED_HALF.search(data):
        check_characters(document, file=file)
    return document


def check_characters(document: Json, *, file: str) -> None:
    """Raise DocumentError for the first key or value that holds half a character, a surrogate.

    No UTF-8 can stand for one: neither a file nor a terminal could be told of it.
    """
    waiting: list[tuple[tuple[int | str, ...], Json]] = [((), document)]
    while waiting:
        place, node = waiting.pop()
        kind = "value"
        text = node if isinstance(node, str) else ""
        if isinstance(node, dict):
            kind, text = "key", "".join(node)
            waiting += [((*place, key), value) for key, value in reversed(node.items())]
        elif isinstance(node, list):
            inside = [((*place, number), value) for number, value in enumerate(node)]
            waiting += reversed(inside)
        if _HALF.search(text):
            message = f"a {kind} holds half a character (a surrogate)"
            raise DocumentError.of(file, json_path(place), "json-surrogate", message)


class _Rejected(Exception):
    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        super().__init__(message)


def _no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Rejected("json-duplicate-key", f"key {key!r} appears more than once")
            seen.add(key)
    return result


def _no_constants(name: str) -> Json:
    raise _Rejected("json-constant", f"{name} is not JSON")
