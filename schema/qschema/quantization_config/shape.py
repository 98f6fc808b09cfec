"""Unions that are told apart by the JSON type of the value, so that an error names one member."""

from pydantic import BaseModel, Discriminator

OBJECT = "(object)"
ARRAY = "(array)"
SCALAR = "(scalar)"


def _json_type(value: object) -> str:
    if isinstance(value, dict | BaseModel):
        return OBJECT
    return ARRAY if isinstance(value, list) else SCALAR


# members are tagged OBJECT, ARRAY or SCALAR; a type without a member is an error of this rule
BY_JSON_TYPE = Discriminator(
    _json_type,
    custom_error_type="wrong_type",
    custom_error_message="Input has a JSON type that is not allowed here",
)
