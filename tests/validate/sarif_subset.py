"""The part of SARIF 2.1.0 that qvalidate writes, as a JSON Schema that allows nothing else.

Written from the standard's text; the numbers are its sections.
"""

from typing import Any

_TEXT = {"type": "string", "minLength": 1}
_LEVEL = {"enum": ["none", "note", "warning", "error"]}
# 3.11.8, 3.12.3
_MESSAGE = {
    "type": "object",
    "properties": {"text": _TEXT, "markdown": _TEXT},
    "required": ["text"],
    "additionalProperties": False,
}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _list(items: dict[str, Any], **limits: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


# 3.49
_RULE = _object(
    ["id"],
    id=_TEXT,
    shortDescription=_MESSAGE,
    fullDescription=_MESSAGE,
    help=_MESSAGE,
    defaultConfiguration=_object([], level=_LEVEL),
    properties=_object([], tags=_list(_TEXT, uniqueItems=True)),
)
# 3.4; a URI has no spaces, and no backslash
_ARTIFACT = _object(
    ["uri"], uri={"type": "string", "pattern": r"^[^\s\\]+$"}, uriBaseId={"enum": ["CHECKPOINT"]}
)
# 3.28
_LOCATION = _object(
    ["physicalLocation"],
    physicalLocation=_object(
        ["artifactLocation"],
        artifactLocation=_ARTIFACT,
        region=_object(["startLine"], startLine={"type": "integer", "minimum": 1}),
    ),
    logicalLocations=_list(
        _object(
            ["fullyQualifiedName"],
            name=_TEXT,
            fullyQualifiedName=_TEXT,
            kind={"enum": ["property"]},
        ),
        minItems=1,
        uniqueItems=True,
    ),
)
# 3.27
_RESULT = _object(
    ["ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"],
    ruleId=_TEXT,
    ruleIndex={"type": "integer", "minimum": 0},
    level=_LEVEL,
    message=_MESSAGE,
    locations=_list(_LOCATION, minItems=1),
    partialFingerprints={"type": "object", "additionalProperties": _TEXT},
)
# 3.20
_INVOCATION = _object(
    ["executionSuccessful"],
    executionSuccessful={"type": "boolean"},
    exitCode={"type": "integer"},
    toolExecutionNotifications=_list(_object(["message"], level=_LEVEL, message=_MESSAGE)),
)
# 3.14
_RUN = _object(
    ["tool", "results"],
    tool=_object(
        ["driver"],
        driver=_object(["name", "rules"], name=_TEXT, version=_TEXT, rules=_list(_RULE)),
    ),
    automationDetails=_object(["id"], id={"type": "string", "pattern": "^[^/]+/[^/]+/$"}),
    originalUriBaseIds=_object(
        ["CHECKPOINT"],
        # 3.14.14: a base ends with a slash
        CHECKPOINT=_object(
            ["uri"],
            uri={"type": "string", "pattern": r"^file:///[^\s\\]*/$"},
            description=_MESSAGE,
        ),
    ),
    invocations=_list(_INVOCATION, minItems=1),
    results=_list(_RESULT),
    properties={"type": "object"},
)
# 3.13
SCHEMA = _object(
    ["version", "runs"],
    **{
        "$schema": {"type": "string", "pattern": "^https://.*sarif-schema-2.1.0.json$"},
        "version": {"const": "2.1.0"},
        "runs": _list(_RUN, minItems=1),
    },
)
