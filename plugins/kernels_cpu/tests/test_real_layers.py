"""Layers of real checkpoints: the CPU kernels beside the reference, and every bit given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from checkpoint_sets import checkpoint_dirs
from quant_core import open_checkpoint, plan
from quant_core.build import Builder
from quant_core.errors import FormatError
from quant_kernels_cpu.library import unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=f"no CPU kernels: {unavailable()}")
BITS = tuple(f"gptqmodel-{b}bit" for b in (2, 3, 4))
DIRS = checkpoint_dirs((*BITS, "gptqmodel-awq", "gptqmodel-dynamic", "gguf-", "ct-w", "ar-w"))
NAMES = ("cpu_wna16", "cpu_wna16@codes")
MUST_RUN = ("gptqmodel-4bit", "gptqmodel-awq", "gguf-llama-q4_k_m", "gguf-llama-q8_0")


def source(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.gguf"))), folder)


@pytest.mark.parametrize("folder", DIRS, ids=lambda d: d.name)
def test_layers_of_a_real_checkpoint_compute_what_the_reference_computes(folder):
    try:
        planned = plan(open_checkpoint(source(folder)))
    except FormatError as err:  # its plugin is not installed: nothing to compare
        pytest.skip(str(err))
    builder = Builder(plan=planned, dtype=torch.float32)
    ran = set()
    for name, member in planned.quantized.items():
        if member.layer.kind != "linear" or member.scheme.shape[0] > 4096:
            continue
        module = builder.linear(name, [member])
        if not hasattr(module, "kernel") or module.kernel.name not in NAMES:
            continue
        ran.add(name)
        lt = module.restore()
        exact = lt.dequantize().double()
        if exact.shape[1] < module.in_features:  # trailing inputs without a stored column
            exact = F.pad(exact, (0, module.in_features - exact.shape[1]))
        bias = None if lt.bias is None else lt.bias.double()
        reference = Builder(plan=planned, dtype=torch.float32, kernels="torch_ref")
        stored = reference.linear(name, [member]).restore()
        assert torch.equal(stored.dequantize(), lt.dequantize())
        for m in (1, 9):
            x = torch.randn(m, module.in_features, generator=torch.Generator().manual_seed(m))
            want = F.linear(x.double(), exact, bias)
            error = (module(x).double() - want).norm() / want.norm()
            assert error < 1e-6, name  # float32 sums
        if len(ran) >= 12:
            break
    if folder.name.startswith(MUST_RUN):
        assert ran, builder.choices[0][1].table
