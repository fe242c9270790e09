"""Kernels that fail between and around the packed layers of a model are named like the others.

The kernels are those of ``kernels_cpu``, of which one method at a time is broken: when it is asked,
or in the call that it gave.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig

from quant_core import load_model
from quant_core.errors import KernelError
from quant_core.registry import registry
from tiny_models import LLAMA_SIZES, make_tiny

pytestmark = pytest.mark.skipif(
    "kernels_cpu" not in registry().plugins, reason="needs quant-kernels-cpu"
)
CAUSE = ZeroDivisionError("inside")


def _fail(*args: object, **kwargs: object) -> None:
    raise CAUSE


def _break(monkeypatch, place: str, method: str, when: str) -> None:
    """``method`` of a class of the package raises, or gives a run that does."""
    module, cls = place.split(":")
    kernel = getattr(__import__(f"quant_kernels_cpu.{module}", fromlist=[cls]), cls)
    own = getattr(kernel, method)

    def given(self: object, *args: object) -> Callable[..., object] | None:
        if when == "bound":
            raise CAUSE
        return _fail if own(self, *args) is not None else None

    monkeypatch.setattr(kernel, method, given)


def _steps(folder) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    ids = torch.arange(3, 10)[None]
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=out.past_key_values)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("llama") / "m", LlamaConfig(**LLAMA_SIZES)).folder


@pytest.mark.parametrize("when", ["bound", "called"])
@pytest.mark.parametrize(
    ("place", "method", "layer"),
    [
        ("between:RmsNorm", "bind", "model.layers.0.input_layernorm"),
        ("between:Gated", "bind", "model.layers.0.mlp"),
        ("attention:AttentionStep", "bind", "attention"),
        ("kernel:WnA16", "bind_gated", "model.layers.0.mlp"),
        ("kernel:WnA16", "bind_block", "model.layers.0"),
        ("kernel:WnA16", "bind_shared", "model.layers.0."),
    ],
    ids=lambda v: v.split(":")[-1],
)
def test_kernel_around_packed_layers_is_named(llama, monkeypatch, place, method, layer, when):
    if place.startswith("attention"):
        monkeypatch.setattr("quant_core.engines.transformers_attention._runs", {})
    if place.startswith("attention") or method == "bind_shared":  # layers would be one call
        monkeypatch.setenv("QUANT_KERNELS", "rms_norm=none,gated=none,rotary=none")
    if place == "between:Gated":  # the whole MLP would run in its place
        monkeypatch.setattr("quant_kernels_cpu.kernel.WnA16.bind_gated", lambda *a: None)
    _break(monkeypatch, place, method, when)
    with pytest.raises(KernelError) as e:
        _steps(llama)
    assert (e.value.code, e.value.plugin) == ("Q-KERNEL-FAILED", "kernels_cpu")
    assert e.value.__cause__ is CAUSE
    of = "" if method == "bind" else f" of {method}"
    step = method if when == "bound" else f"a call{'' if method == 'bind_shared' else of}"
    assert str(e.value).startswith(layer), str(e.value)
    assert f": {step} of kernel 'cpu_" in str(e.value)
    assert "ZeroDivisionError: inside" in str(e.value)


def test_kernels_that_work_run(llama):
    _steps(llama)
