"""Storage orders as bases: a kernel derived from one holds what it was given, and names itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from made_layers import SPECS, make_layer, make_op
from quant_core.errors import KernelError
from quant_core.kernels.base import Rejected
from quant_core.kernels.family import layout_of
from quant_core.kernels.storage import Rows, Tiles16, misused


@pytest.mark.parametrize(("base", "layout"), [(Tiles16, "tiles16"), (Rows, "rows")])
def test_buffers_give_back_what_was_loaded(base, layout):
    lt = make_layer(next(iter(SPECS.values())))
    op = make_op("linear", lt)
    kernel = base()
    buffers = kernel.allocate(op)
    kernel.load_(buffers, op, lt, {"row": 0})
    back = kernel.restore(buffers, op)
    assert layout_of(kernel) == layout
    assert torch.equal(back.weight.dequantize(), lt.weight.dequantize())
    buffers["codes"].add_(1)
    assert not torch.equal(kernel.restore(buffers, op).weight.dequantize(), lt.weight.dequantize())


def test_misused_kernel_is_named_with_its_reason():
    err = misused("mine", Rejected(axis="device", have="cpu", need="cuda"))
    assert isinstance(err, KernelError)
    assert (err.code, err.expected, err.actual) == ("Q-KERNEL-NONE", "cuda", "cpu")
    assert "mine was asked to run what it rejects: device: needs cuda, found cpu" in str(err)


def test_module_is_imported_without_torch():
    probe = "import sys, quant_core.kernels.storage; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
