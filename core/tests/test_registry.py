from __future__ import annotations

import itertools
import subprocess
import sys
import threading

import pytest

import toy
from quant_core.errors import PluginError
from quant_core.hookspecs import hookimpl
from quant_core.registry import load_registry
from quant_core.spec import PLUGIN_API, BlockType, PluginInfo

registry_module = sys.modules["quant_core.registry"]  # the name in the package is the function


@pytest.mark.parametrize(
    "broken",
    [ImportError("no such thing"), SyntaxError("bad"), SystemExit(3), ValueError("boom")],
    ids=lambda e: type(e).__name__,
)
def test_plugin_that_raises_at_import_is_set_aside_and_others_work(broken):
    reg = load_registry([toy.candidate(broken, "bad"), toy.candidate(toy.toy_module())])
    assert list(reg.plugins) == ["toy"]
    (aside,) = reg.set_aside
    assert (aside.id, aside.dist, aside.version, aside.code) == (
        "bad",
        "quant-plugin-bad",
        "1.0",
        "Q-PLUGIN-IMPORT",
    )
    assert type(broken).__name__ in aside.cause


@pytest.mark.parametrize("api", [(PLUGIN_API[0] + 1, 0), (PLUGIN_API[0], PLUGIN_API[1] + 1)])
def test_plugin_of_newer_api_is_set_aside_with_both_versions_and_a_fix(api):
    module = toy.toy_module(plugin_info=lambda: PluginInfo(id="toy", api=api))
    reg = load_registry([toy.candidate(module)])
    (aside,) = reg.set_aside
    assert aside.code == "Q-PLUGIN-API"
    assert ".".join(map(str, api)) in aside.cause
    assert ".".join(map(str, PLUGIN_API)) in aside.cause
    assert "pip install -U" in aside.cause


def _misspelt():
    def detect_fromat(checkpoint):
        return None

    return toy.toy_module(detect_fromat=detect_fromat)


def _unknown_argument():
    def apply(op, device):
        return []

    return toy.toy_module(apply=apply)


def _wrapper():
    module = toy.toy_module()

    def apply(op):
        yield

    module.apply = hookimpl(wrapper=True)(apply)
    return module


def _wrong_id():
    return toy.toy_module(plugin_info=lambda: PluginInfo(id="other", api=PLUGIN_API))


def _no_info():
    module = toy.toy_module()
    del module.plugin_info
    return module


@pytest.mark.parametrize("make", [_misspelt, _unknown_argument, _wrapper, _wrong_id, _no_info])
def test_malformed_plugin_is_rejected_whole_and_others_load(make):
    good = toy.toy_module("good")
    reg = load_registry([toy.candidate(make()), toy.candidate(good, "good")])
    assert list(reg.plugins) == ["good"]
    assert [a.id for a in reg.set_aside] == ["toy"]
    assert [i for i, _ in reg.implementations("detect_format")] == ["good"]


def test_two_dists_with_one_id_neither_wins():
    reg = load_registry(
        [
            toy.candidate(toy.toy_module(), dist="dist-a"),
            toy.candidate(toy.toy_module(), dist="dist-b"),
        ]
    )
    assert not reg.plugins
    assert {a.code for a in reg.set_aside} == {"Q-PLUGIN-CONFLICT"}
    assert all("dist-a" in a.cause and "dist-b" in a.cause for a in reg.set_aside)


def test_order_of_discovery_does_not_matter():
    names = ["a", "b", "c", "d"]
    orders = set()
    for perm in itertools.permutations(names):
        reg = load_registry([toy.candidate(toy.toy_module(n), n) for n in perm])
        orders.add(tuple(i for i, _ in reg.implementations("detect_format")))
    assert orders == {("a", "b", "c", "d")}


def test_quant_plugins_names_absent_plugin_raises(monkeypatch):
    monkeypatch.setenv("QUANT_PLUGINS", "toy, nowhere")
    with pytest.raises(PluginError) as e:
        load_registry([toy.candidate(toy.toy_module())])
    assert e.value.code == "Q-PLUGIN-MISSING"
    assert "nowhere" in str(e.value)


def test_quant_plugins_restricts_what_is_loaded(monkeypatch):
    monkeypatch.setenv("QUANT_PLUGINS", "a")
    reg = load_registry([toy.candidate(toy.toy_module(n), n) for n in "ab"])
    assert list(reg.plugins) == ["a"]


def test_hook_that_raises_is_named_and_does_not_hide_others():
    def boom(checkpoint):
        raise KeyError("inside")

    reg = load_registry(
        [toy.candidate(toy.toy_module("bad", detect_format=boom), "bad"),
         toy.candidate(toy.toy_module())]
    )  # fmt: skip
    ckpt = toy.toy_checkpoint({"a": toy.toy_layer(4, 8)})
    answers = reg.call_all("detect_format", checkpoint=ckpt)
    assert [i for i, _ in answers] == ["toy"]
    alone = load_registry([toy.candidate(toy.toy_module("bad", detect_format=boom), "bad")])
    with pytest.raises(PluginError) as e:
        alone.call_all("detect_format", checkpoint=ckpt)
    assert e.value.code == "Q-PLUGIN-RESULT"
    assert e.value.plugin == "bad"
    assert isinstance(e.value.__cause__, KeyError)


def test_block_type_of_two_plugins_conflicts():
    def types():
        return {"x": BlockType(name="x", weights=32, bytes=18, target="m:f")}

    with pytest.raises(PluginError) as e:
        load_registry([toy.candidate(toy.toy_module(n, block_types=types), n) for n in ("a", "b")])
    assert e.value.code == "Q-PLUGIN-CONFLICT"
    one = load_registry([toy.candidate(toy.toy_module(block_types=types))])
    assert one.block_type("x").bytes == 18
    with pytest.raises(PluginError, match="not known"):
        one.block_type("y")


def test_registry_is_loaded_once_under_threads(monkeypatch):
    calls = []

    def slow_load():
        calls.append(1)
        return load_registry([toy.candidate(toy.toy_module())])

    monkeypatch.setattr(registry_module, "_registry", None)
    monkeypatch.setattr(registry_module, "load_registry", slow_load)
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(registry_module.registry())) for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1
    assert len({id(r) for r in seen}) == 1


def test_core_without_plugins_works_and_lists_none():
    code = (
        "from importlib import metadata; metadata.entry_points = lambda **kw: ();"
        "from quant_core.registry import registry; print(dict(registry().plugins))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "{}"
