import pytest

from eplb.strict_json import parse_json


def test_good_json_is_what_the_library_reads():
    assert parse_json('{"a": [1, 2.5, null, {"b": true}], "c": {}}') == {
        "a": [1, 2.5, None, {"b": True}],
        "c": {},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' comes twice"),
        ('[{"x": {"a": 1, "a": 1}}]', "key 'a' comes twice"),
        ("[NaN]", "NaN is no number"),
        ("-Infinity", "-Infinity is no number"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
