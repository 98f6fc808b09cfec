"""The ground of all documents: paths, messages, and models that keep what the file said."""

import pytest

from qschema.hf_quant_config import Producer
from qschema.plan import Output
from qschema.quantization_config import ModelConfig
from qschema.strict import DocumentError, json_path, parse_json


@pytest.mark.parametrize(
    ("loc", "path"),
    [
        ((), "$"),
        (("a", "b_c", "d-e"), "$.a.b_c.d-e"),
        (("a", 0, 12), "$.a[0][12]"),
        (("a.b", "c d", ""), "$['a.b']['c d']['']"),
        (("it's",), '$["it\'s"]'),
    ],
)
def test_json_path_quotes_what_is_no_word(loc, path):
    assert json_path(loc) == path


def test_path_has_no_member_of_a_union_in_it():
    document = {"quantization_config": {"quant_method": "fp8", "activation_scheme": 1}}

    with pytest.raises(DocumentError) as caught:
        ModelConfig.parse(document, file="config.json")

    (finding,) = caught.value.findings
    assert finding.where == "$.quantization_config.activation_scheme"


def test_missing_key_is_in_the_path_although_it_is_not_in_the_document():
    with pytest.raises(DocumentError) as caught:
        ModelConfig.parse({"quantization_config": {"quant_method": "fp8"}}, file="config.json")

    assert [finding.where for finding in caught.value.findings] == [
        "$.quantization_config.activation_scheme"
    ]


def test_long_list_of_choices_is_cut_and_names_the_nearest():
    document = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVPF4"}}

    with pytest.raises(DocumentError) as caught:
        ModelConfig.parse(document, file="config.json")

    message = caught.value.findings[0].message
    assert message.startswith("did you mean 'NVFP4'? expected one of ")
    assert message.endswith("..., found 'NVPF4'")
    assert len(message) < 200


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b"\xff", "json-utf8"),
        (b"{", "json-syntax"),
        (b"[" * 200_000, "json-syntax"),
        (b'{"a": 1, "b": 2, "a": 3}', "json-duplicate-key"),
        (b"[Infinity]", "json-constant"),
        (b"1" * 5000, "json-number"),
        (b"\xef\xbb\xbf{}", "json-syntax"),
    ],
)
def test_text_that_is_not_json_is_one_finding(text, rule):
    with pytest.raises(DocumentError) as caught:
        parse_json(text, file="x.json")

    assert [finding.rule for finding in caught.value.findings] == [rule]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b'{"a": [0, {"b": "x\\uD800"}], "c": "\\udfff"}', "$.a[1].b"),
        (b'["\\udc00\\ud83d"]', "$[0]"),
        (b'{"a": {"\\uDEAD": 1}}', "$.a"),
        (b'"\\ud83d"', "$"),
    ],
)
def test_half_a_character_is_one_finding_with_its_path(text, place):
    with pytest.raises(DocumentError) as caught:
        parse_json(text, file="x.json")

    (finding,) = caught.value.findings
    assert (finding.rule, finding.where) == ("json-surrogate", place)


def test_both_halves_make_a_character():
    assert parse_json(b'["\\ud83d\\ude00", "\\\\ud800"]', file="x.json") == [
        "\U0001f600",
        "\\ud800",
    ]


def test_verbatim_model_made_in_python_keeps_the_order_of_its_arguments():
    made = Producer(version="1", name="modelopt")

    assert list(made.model_dump()) == ["version", "name"]
    assert made.model_dump_json() == '{"version":"1","name":"modelopt"}'


def test_objects_of_a_numerous_model_are_as_others_but_share_what_was_given():
    values = {"name": "w", "file": "a", "dtype": "BF16", "shape": [2], "offset": 8, "nbytes": 4}

    plain, given = Output(**values), Output(**values, suffix="")

    assert plain == given == Output.model_validate(plain.model_dump())
    assert plain.model_dump_json() == given.model_dump_json(exclude_unset=True)
    assert plain.model_fields_set is given.model_fields_set
    assert plain.model_copy(update={"nbytes": 5}) == Output(**{**values, "nbytes": 5})
