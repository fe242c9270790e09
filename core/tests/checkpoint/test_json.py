from __future__ import annotations

from types import MappingProxyType

import pytest

from quant_core.checkpoint.json import MAX_DEPTH, parse_json_object, read_json_object
from quant_core.errors import CheckpointError, ConfigError, LimitError


def test_parse_returns_read_only_mappings_and_tuples():
    parsed = parse_json_object('{"a": {"b": [1, {"c": null}]}, "t": true, "x": 1.5}', "config.json")
    assert isinstance(parsed, MappingProxyType)
    assert parsed == {"a": {"b": (1, {"c": None})}, "t": True, "x": 1.5}
    with pytest.raises(TypeError):
        parsed["a"]["b"] = 0
    assert type(parsed["t"]) is bool
    assert type(parsed["a"]["b"][0]) is int


def test_parse_bytes_with_and_without_bom_are_equal():
    text = '{"name": "größe"}'
    assert parse_json_object(text.encode("utf-8-sig"), "x") == parse_json_object(text, "x")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"bits":4,"bits":8}', "Q-CFG-DUPLICATE"),
        ('{"q":{"bits":4,"bits":4}}', "Q-CFG-DUPLICATE"),
        ('{"a":NaN}', "Q-CFG-VALUE"),
        ('{"a":[-Infinity]}', "Q-CFG-VALUE"),
        ('{"a":1e999}', "Q-CFG-VALUE"),
        ('{"a":' + "9" * 5000 + "}", "Q-CFG-VALUE"),
        ('{"a":-' + "9" * 64 + "}", "Q-CFG-VALUE"),
        ("", "Q-CFG-PARSE"),
        (" \n", "Q-CFG-PARSE"),
        ("{", "Q-CFG-PARSE"),
        ("{} x", "Q-CFG-PARSE"),
        ("{'a': 1}", "Q-CFG-PARSE"),
        ('{"a": 1,}', "Q-CFG-PARSE"),
        ('{"a": "\n"}', "Q-CFG-PARSE"),
        ("[1]", "Q-CFG-TYPE"),
        ('"text"', "Q-CFG-TYPE"),
        ("null", "Q-CFG-TYPE"),
        ("7", "Q-CFG-TYPE"),
        ("true", "Q-CFG-TYPE"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "Q-CFG-PARSE"),
        ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "Q-CFG-PARSE"),
    ],
)
def test_parse_faulty_text_raises_config_error(text: str, code: str):
    with pytest.raises(ConfigError) as caught:
        parse_json_object(text, "some/config.json")
    assert caught.value.code == code
    assert caught.value.path == "some/config.json"
    assert str(caught.value).startswith("some/config.json: ")
    assert "expected" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_parse_deepest_allowed_nesting_is_accepted():
    text = '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    value = parse_json_object(text, "x")
    for _ in range(MAX_DEPTH):
        value = value["a"]
    assert value == 1


def test_parse_integer_that_transformers_writes_is_accepted():
    # tokenizer_config.json of many models: model_max_length = int(1e30)
    text = '{"model_max_length": 1000000000000000019884624838656}'
    assert parse_json_object(text, "x")["model_max_length"] == int(1e30)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_parse_other_encoding_raises_config_error(encoding: str):
    with pytest.raises(ConfigError, match="UTF-8") as caught:
        parse_json_object('{"ä": 1}'.encode(encoding), "x")
    assert caught.value.code == "Q-CFG-PARSE"


def test_duplicate_key_error_names_key_and_both_values():
    with pytest.raises(ConfigError) as caught:
        parse_json_object('{"group_size": 128, "bits": 4, "bits": 8}', "x")
    assert caught.value.tensor == "bits"
    assert "'bits'" in str(caught.value)
    assert "(4, 8)" in str(caught.value)


def test_read_file_over_limit_raises_limit_error(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    assert read_json_object(path)["a"] == "x" * 100
    with pytest.raises(LimitError) as caught:
        read_json_object(path, limit_bytes=100)
    assert (caught.value.code, caught.value.expected) == ("Q-LIMIT-CONFIG", 100)
    assert isinstance(caught.value, MemoryError)


def test_read_missing_file_and_folder_raise(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_json_object(tmp_path / "config.json")
    assert caught.value.code == "Q-CFG-PARSE"
    with pytest.raises(CheckpointError) as io:
        read_json_object(tmp_path)
    assert io.value.code == "Q-CKPT-IO"
