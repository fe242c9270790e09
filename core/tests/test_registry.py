from __future__ import annotations

import functools
import inspect
import itertools
import subprocess
import sys
import threading

import pytest

import toy
from quant_core import hookspecs
from quant_core.errors import PluginError
from quant_core.hookspecs import hookimpl
from quant_core.kernels.reference import ReferenceKernel
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


def _types():
    return {"x": BlockType(name="x", weights=32, bytes=18, target="m:f")}


def test_block_type_of_two_plugins_is_used_of_neither_and_others_load():
    reg = load_registry(
        [toy.candidate(toy.toy_module(n, block_types=_types), n) for n in ("a", "b")]
        + [toy.candidate(toy.toy_module("c"), "c")]
    )
    assert list(reg.plugins) == ["c"]
    assert {(p.id, p.code) for p in reg.set_aside} == {
        ("a", "Q-PLUGIN-CONFLICT"),
        ("b", "Q-PLUGIN-CONFLICT"),
    }
    assert all("a and b" in p.cause for p in reg.set_aside)
    with pytest.raises(PluginError, match="not known"):
        reg.block_type("x")
    one = load_registry([toy.candidate(toy.toy_module(block_types=_types))])
    assert one.block_type("x").bytes == 18
    with pytest.raises(PluginError, match="not known"):
        one.block_type("y")


def _raise():
    raise KeyError("inside")


def _exit():
    raise SystemExit(3)


@pytest.mark.parametrize("types", [_raise, _exit, lambda: ["x"], lambda: {"x": 3}])
def test_plugin_whose_block_types_fail_is_set_aside_and_others_load(types):
    good = toy.toy_module("good", block_types=_types)
    bad = toy.toy_module("bad", block_types=types)
    reg = load_registry([toy.candidate(bad, "bad"), toy.candidate(good, "good")])
    assert list(reg.plugins) == ["good"]
    assert [(p.id, p.code) for p in reg.set_aside] == [("bad", "Q-PLUGIN-RESULT")]
    assert "block_types" in reg.set_aside[0].cause
    assert reg.block_type("x").bytes == 18
    assert [i for i, _ in reg.implementations("detect_format")] == ["good"]


def _midway():
    yield ReferenceKernel()
    raise KeyError("midway")


_WRONG = {
    "open_checkpoint": [3, "x"],
    "detect_format": [3, {"a": 1}],
    "split_modules": [3, "x", {"a": 3}, {"a": [3]}],
    "attention_schemes": [3, {"a": 3}],
    "create_weights": [3, "x", [3], {"a": 3}],
    "apply": [3, "x", [3], {"a": 3}, [ReferenceKernel]],
    "make_config": [3, "x", [("a", 3)], {1: 2}],
    "make_extras": [3, {"a": 1}],
    "cache_form": [3],
    "settle_options": [3, {1: 2}],
    "write_checkpoint": [3, "x", ["a"]],
    "online_schemes": [3, ["a"], {"a": 3}],
}


def _ask(hook, answer):
    """(a registry of one plugin that answers so, arguments of the hook)."""
    names = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    made = eval(f"lambda {names}: answer()", {"answer": answer})
    args = {n.strip(): None for n in names.split(",") if n}
    return load_registry([toy.candidate(toy.toy_module("bad", **{hook: made}), "bad")]), args


@pytest.mark.parametrize("hook", sorted(_WRONG))
def test_answer_of_another_type_names_plugin_hook_and_what_was_expected(hook):
    for answer in _WRONG[hook]:
        reg, args = _ask(hook, lambda answer=answer: answer)
        for ask in (functools.partial(reg.call_one, "bad"), reg.call_all):
            with pytest.raises(PluginError, match=f"'bad' .*hook {hook} returned") as e:
                ask(hook, **args)
            assert (e.value.code, e.value.plugin) == ("Q-PLUGIN-RESULT", "bad")
            assert ", expected " in str(e.value)


def test_generator_that_fails_midway_is_its_plugins_failure():
    reg, args = _ask("apply", _midway)
    with pytest.raises(PluginError, match="hook apply raised KeyError") as e:
        reg.call_all("apply", **args)
    assert e.value.plugin == "bad"


def test_every_hook_with_an_answer_is_checked():
    """``plugin_info`` is checked when plugins are loaded; the other two with their layer's name."""
    elsewhere = {"plugin_info", "make_scheme", "fit_scheme"}
    hooks = {n for n, f in vars(hookspecs).items() if hasattr(f, "quant_core_spec")}
    assert hooks - elsewhere == {*_WRONG, "block_types"}


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
