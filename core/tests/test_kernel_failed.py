"""A kernel that fails is named with its plugin, its layer and the step; the cause stays chained."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

import toy
from quant_core.build import Builder
from quant_core.errors import KernelError, LayoutError
from quant_core.kernels.base import Accepted
from quant_core.kernels.finite import TorchFinite, look_of
from quant_core.kernels.reference import ReferenceKernel
from quant_core.nn import QuantLinear
from quant_core.plan import plan
from quant_core.registry import Registry, _Candidate, load_registry

LAYER = "model.layers.3.mlp.up"


class Fast(ReferenceKernel):
    """The reference under another name, preferred, and broken in one step."""

    name = "fast"

    def __init__(self, step: str = "", fault: object = None) -> None:
        self.step, self.fault = step, fault

    def accepts(self, op):
        return Accepted(cost=1.0)

    def _do(self, step, good):
        if step != self.step:
            return good()
        if isinstance(self.fault, BaseException):
            raise self.fault
        return self.fault

    def allocate(self, op, device="cpu"):
        return self._do("allocate", lambda: super(Fast, self).allocate(op, device))

    def load_(self, buffers, op, part, at):
        self._do("load_", lambda: super(Fast, self).load_(buffers, op, part, at))

    def restore(self, buffers, op):
        return self._do("restore", lambda: super(Fast, self).restore(buffers, op))

    def bind(self, op):
        run = self._do("bind", lambda: super(Fast, self).bind(op))
        return lambda values, *inputs: self._do("a call", lambda: run(values, *inputs))


def _registry(kernel: Fast) -> Registry:
    pack = toy.toy_module("fastpack", apply=lambda op: [kernel] if op.op == "linear" else [])
    return toy.toy_registry(toy.toy_module(), pack)


def _layer(kernel: Fast) -> QuantLinear:
    made = plan(toy.toy_checkpoint({LAYER: toy.toy_layer(4, 8)}), registry=_registry(kernel))
    layer = Builder(plan=made, dtype=torch.float32).linear(LAYER, [made.members[LAYER]])
    assert isinstance(layer, QuantLinear)
    return layer


def _use(kernel: Fast) -> None:
    layer = _layer(kernel)
    layer(torch.ones(2, 8))
    layer.restore()


@pytest.mark.parametrize("step", ["allocate", "load_", "bind", "a call", "restore"])
def test_kernel_that_raises_is_named_with_its_layer_and_the_cause_chained(step):
    cause = ZeroDivisionError("inside")
    with pytest.raises(KernelError) as e:
        _use(Fast(step, cause))
    assert e.value.code == "Q-KERNEL-FAILED"
    assert (e.value.plugin, e.value.tensor) == ("fastpack", LAYER)
    assert e.value.__cause__ is cause
    assert str(e.value).startswith(f"{LAYER}: {step} of kernel 'fast' (plugin 'fastpack') raised ")
    assert "ZeroDivisionError: inside" in str(e.value)
    assert "4 x 8" in str(e.value)
    assert {d.kernel for d in e.value.trace} == {"fast", "torch_ref"}


def test_kernel_that_works_is_left_alone():
    layer = _layer(Fast())
    x = torch.randn(3, 8)
    qt = layer.restore().weight
    dense = qt.codes.view(torch.int8).float() * qt.scales[0].float()
    torch.testing.assert_close(layer(x), x @ dense.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "answer", "said"),
    [
        ("allocate", None, "returned None, expected tensors by name"),
        ("allocate", {"w": 1}, "returned {'w': 1}, expected tensors by name"),
        ("a call", None, "returned NoneType, expected [2, 4] torch.float32 on cpu"),
        ("a call", torch.ones(2, 5), "returned [2, 5] torch.float32 on cpu, expected [2, 4]"),
        ("a call", torch.ones(2, 4).half(), "returned [2, 4] torch.float16 on cpu, expected"),
    ],
)
def test_answer_of_another_form_is_named_too(step, answer, said):
    with pytest.raises(KernelError) as e:
        _use(Fast(step, answer))
    assert e.value.code == "Q-KERNEL-FAILED"
    assert e.value.plugin == "fastpack"
    assert f"{LAYER}: {step} of kernel 'fast'" in str(e.value)
    assert said in str(e.value)


def test_gradients_come_through_the_same_door():
    with pytest.raises(KernelError, match="inside") as e:
        _layer(Fast("a call", ZeroDivisionError("inside")))(torch.ones(2, 8, requires_grad=True))
    assert e.value.code == "Q-KERNEL-FAILED"


@pytest.mark.parametrize("step", ["allocate", "load_", "bind", "a call"])
@pytest.mark.parametrize(
    "error",
    [
        LayoutError("m: said", code="Q-LAYOUT-SHAPE"),
        MemoryError("none left"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_considered_errors_and_lack_of_memory_pass_through(step, error):
    with pytest.raises(type(error)) as e:
        _use(Fast(step, error))
    assert e.value is error


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.ones(2, 7), r"x of shape \(2, 7\), expected 8 features"),
        (torch.ones(2, 8, dtype=torch.int64), "x of int64, expected floats"),
        (torch.ones(2, 8, device="meta"), "x on meta, expected on cpu"),
        (torch.ones(2, 8).to_sparse(), "x of torch.sparse_coo, expected a dense tensor"),
        (None, "x of NoneType, expected a dense tensor"),
        ([1.0], "x of list, expected a dense tensor"),
    ],
)
def test_input_that_is_none_of_the_layer_is_the_callers_mistake(x, found):
    layer = _layer(Fast("a call", RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(LayoutError, match=found) as e:
        layer(x)
    assert (e.value.code, e.value.tensor) == ("Q-LAYOUT-INPUT", LAYER)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_and_odd_devices_are_no_fault(enabled):
    layer = _layer(Fast("a call", torch.ones(2, 4).bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        if enabled:
            assert layer(torch.ones(2, 8)).dtype == torch.bfloat16
        else:
            with pytest.raises(KernelError, match="expected"):
                layer(torch.ones(2, 8))
    meta = _layer(Fast("a call", torch.ones(2, 4, device="meta")))
    assert meta(torch.ones(2, 8, device="meta")).is_meta


def test_plugin_whose_code_ran_last_is_blamed(tmp_path, monkeypatch):
    """Of kernels bound as one, the trace names all; the traceback says which."""
    (tmp_path / "other_pack.py").write_text("def fall():\n    raise KeyError('there')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    other_pack = __import__("other_pack")
    broken = Fast("a call")
    broken._do = lambda step, good: other_pack.fall() if step == "a call" else good()
    module = toy.toy_module("otherpack")
    other = _Candidate("otherpack", "quant-other", "1.0", "other_pack", lambda: module)
    monkeypatch.setattr(sys.modules["quant_core.registry"], "_registry", load_registry([other]))
    with pytest.raises(KernelError, match=r"plugin 'otherpack'\) raised KeyError") as e:
        _use(broken)
    assert e.value.plugin == "otherpack"


@pytest.mark.parametrize("when", ["bind", "a call"])
def test_who_looks_for_nan_is_named_too(when):
    class Look(TorchFinite):
        name = "look"

        def accepts(self, op):
            said = super().accepts(op)
            return replace(said, cost=0.0) if isinstance(said, Accepted) else said

        def bind(self, op):
            return fail([]) if when == "bind" else fail

    def fail(buffers, values=None):
        raise ZeroDivisionError("inside")

    pack = toy.toy_module("lookpack", apply=lambda op: [Look()])
    with pytest.raises(KernelError, match=f"finite: {when} of kernel 'look'") as e:
        look_of(toy.toy_registry(pack))([torch.ones(3)])
    assert e.value.code == "Q-KERNEL-FAILED"


def test_the_first_call_alone_is_checked(monkeypatch):
    layer = _layer(Fast())
    layer(torch.ones(1, 8))
    monkeypatch.setattr("quant_core.nn.check_output", lambda *a: pytest.fail("checked again"))
    layer(torch.ones(1, 8))
