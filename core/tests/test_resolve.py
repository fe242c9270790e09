from __future__ import annotations

import pytest

from quant_core.errors import ConfigError
from quant_core.resolve import MAX_REGEX_PATTERNS, NamePattern, check_count, first_match, unmatched

NAME = "model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize(
    ("kind", "text", "hit"),
    [
        ("exact", NAME, True),
        ("exact", "gate_proj", False),
        ("prefix", "model.layers.1", True),
        ("prefix", "model.layers.1.mlp.gate", False),
        ("suffix", "gate_proj", True),
        ("suffix", "proj", False),
        ("substring", "layers.1.mlp.gate", True),
        ("glob", "*.mlp.*", True),
        ("glob", "*.mlp", False),
        ("regex", r".*\.layers\.1\.", True),
        ("regex", r"layers\.1", False),
        ("search", r"layers\.1", True),
    ],
)
def test_pattern_dialects(kind, text, hit):
    assert NamePattern(kind=kind, text=text).matches(NAME) is hit


def test_invalid_regex_is_an_error_naming_it():
    with pytest.raises(ConfigError) as e:
        NamePattern(kind="regex", text="layers.(")
    assert e.value.code == "Q-CFG-REGEX"
    assert "layers.(" in str(e.value)


@pytest.mark.parametrize("text", [r"(a+)+$", r"(a|aa)+$", r"(.*a){25}x$"])
def test_catastrophic_regex_ends_in_bounded_time(text):
    """Either it matches quickly or it is refused; it never hangs."""
    pattern = NamePattern(kind="regex", text=text)
    outcome: object
    try:
        outcome = pattern.matches("a" * 400 + "!")
    except ConfigError as err:
        outcome = err.code
    assert outcome in (False, "Q-CFG-REGEX")


def test_too_many_wildcards_are_refused_but_exact_names_are_not():
    exact = [NamePattern(kind="exact", text=f"m.{i}") for i in range(100_000)]
    check_count(exact, "config.json")
    many = [NamePattern(kind="glob", text=f"m.{i}*") for i in range(MAX_REGEX_PATTERNS + 1)]
    with pytest.raises(ConfigError) as e:
        check_count(many, "config.json")
    assert e.value.code == "Q-CFG-REGEX"


def test_first_match_and_unmatched():
    patterns = [
        NamePattern(kind="exact", text="lm_head"),
        NamePattern(kind="substring", text="mlp"),
        NamePattern(kind="regex", text=".*gate"),
    ]
    assert first_match(patterns, NAME) is patterns[1]
    assert unmatched(patterns, [NAME]) == [patterns[0]]


def test_long_substring_lists_are_reported_in_bounded_time():
    names = [f"model.layers.{i}.proj" for i in range(2000)]
    absent = [NamePattern(kind="substring", text=f"nowhere.{i}") for i in range(20_000)]
    left = unmatched(absent, names)
    assert len(left) == MAX_REGEX_PATTERNS
    whole = [NamePattern(kind="substring", text=n) for n in names]
    assert unmatched(whole, names) == []
