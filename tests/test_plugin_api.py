"""Every hook says since which API it exists, and every plugin states one that has its hooks."""

from __future__ import annotations

import re

import pytest

from quant_core import hookspecs
from quant_core.registry import registry
from quant_core.spec import PLUGIN_API

SINCE = {
    name: tuple(map(int, m.groups()))
    for name in hookspecs.hook_names()
    for m in re.finditer(r"Since API (\d+)\.(\d+)\.", getattr(hookspecs, name).__doc__ or "")
}


def test_every_hook_says_since_when_it_exists():
    assert SINCE.keys() == set(hookspecs.hook_names())
    assert max(SINCE.values()) <= PLUGIN_API


def test_the_newest_hook_moved_the_version():
    """A hook that is added without a new number would load into a core that never calls it."""
    assert max(SINCE.values()) == PLUGIN_API


@pytest.mark.parametrize("plugin", sorted(registry().plugins))
def test_plugin_states_an_api_that_has_its_hooks(plugin):
    stated = registry().plugins[plugin].info.api
    used = [hook for hook in SINCE if registry().implements(plugin, hook)]
    assert used
    assert {hook for hook in used if SINCE[hook] > stated} == set()
