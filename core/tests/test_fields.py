"""Typed access to config objects: right values pass, wrong ones are named with file and key."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from quant_core.errors import ConfigError
from quant_core.fields import Fields, thaw


def fields(**raw: Any) -> Fields:
    return Fields(raw, "c.json", plugin="p")


def test_right_values_are_returned() -> None:
    f = fields(
        a=True, b=" AbC ", c=4, group_size=-1, d=["x", ["y"]], e={"k": {"bits": 2}, "m": None}
    )
    assert (f.flag("a"), f.text("b"), f.integer("c", 2, 8), f.group_size()) == (True, "abc", 4, -1)
    assert f.names("d") == ("x", "y")
    entries = f.objects("e")
    assert entries["k"].integer("bits", 2, 8) == 2
    assert entries["m"].raw == {}


def test_absent_and_null_are_the_same() -> None:
    f = fields(a=None)
    for key in ("a", "b"):
        assert f.flag(key) is f.text(key) is f.integer(key, 0, 1) is None
        assert f.names(key) == ()
        assert f.objects(key) == {}


@pytest.mark.parametrize(
    ("method", "value", "code"),
    [
        ("flag", 1, "Q-CFG-VALUE"),
        ("flag", "true", "Q-CFG-VALUE"),
        ("text", 4, "Q-CFG-TYPE"),
        ("text", "", "Q-CFG-TYPE"),
        ("text", "x" * 65, "Q-CFG-TYPE"),
        ("group_size", 0, "Q-CFG-VALUE"),
        ("group_size", -2, "Q-CFG-VALUE"),
        ("group_size", "128", "Q-CFG-VALUE"),
        ("group_size", True, "Q-CFG-VALUE"),
        ("group_size", 10**12, "Q-CFG-VALUE"),
        ("group_size", None, "Q-CFG-VALUE"),
        ("names", "x", "Q-CFG-TYPE"),
        ("names", [1], "Q-CFG-TYPE"),
        ("objects", [], "Q-CFG-TYPE"),
        ("objects", {"a": 1}, "Q-CFG-TYPE"),
    ],
)
def test_wrong_values_raise_and_name_file_and_key(method: str, value: Any, code: str) -> None:
    with pytest.raises(ConfigError, match=r"c\.json: key is ") as err:
        getattr(fields(key=value), method)("key")
    e = err.value
    assert (e.code, e.path, e.tensor, e.actual, e.plugin) == (code, "c.json", "key", value, "p")


@pytest.mark.parametrize("value", [1, 9, 4.0, "4", True])
def test_integer_out_of_range_or_of_another_type_raises(value: Any) -> None:
    with pytest.raises(ConfigError, match="an integer from 2 to 8"):
        fields(bits=value).integer("bits", 2, 8)


def test_nested_errors_carry_the_whole_path() -> None:
    entry = fields(dynamic={"a\nb": {"bits": 1}}).objects("dynamic")["a\nb"]
    with pytest.raises(ConfigError, match="dynamic") as err:
        entry.integer("bits", 2, 8)
    assert err.value.tensor == r"dynamic['a\\nb'].bits"


def test_thaw_gives_plain_lists_and_dicts() -> None:
    assert thaw(MappingProxyType({"a": ({"b": 1}, 2)})) == {"a": [{"b": 1}, 2]}
