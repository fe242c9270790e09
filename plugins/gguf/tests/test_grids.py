"""Blocks of grids as codes under scales: the gguf package's values, and the same bytes back.

And through kernels that read codes: products, parts, stacks of experts, every bit given back.
"""

from __future__ import annotations

from dataclasses import replace

import gguf as oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quant_core.kernels.base import Accepted
from quant_core.kernels.choose import choose
from quant_core.kernels.expanded import Expanded, block_codes, with_codes
from quant_core.registry import registry
from quant_core.spec import OpSpec
from quant_core.tensors import LayerTensors, QuantizedTensor
from quant_plugin_gguf.layouts import spec_of
from quant_plugin_gguf.types import BY_NAME

NAMES = sorted(t.dtype for t in BY_NAME.values() if t.kind == "opaque" and t.dtype != "tq1_0")
D_AT = {"tq2_0": 64}  # where the float16 of a block lies; IQ1_M keeps it in four nibbles


def blocks(name: str, rows: int, per_row: int, seed: int = 0) -> torch.Tensor:
    """Random bytes of every kind, with a finite d."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * per_row, BY_NAME[name].bytes), dtype=np.uint8)
    if name == "iq1_m":
        data[:, 55] &= 0xBF  # the highest bit of the exponent
        data[:, 55] |= 0x20
    else:
        at = D_AT.get(name, 0)
        d = rng.normal(size=len(data)).astype(np.float16)
        data[:, at : at + 2] = d.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(data.reshape(rows, -1))


def values(name: str, stored: torch.Tensor) -> torch.Tensor:
    kind = oracle.GGMLQuantizationType(BY_NAME[name].id)
    return torch.from_numpy(oracle.quants.dequantize(stored.numpy(), kind).astype(np.float32))


def layer(name: str, stored: torch.Tensor) -> LayerTensors:
    k = stored.shape[-1] // BY_NAME[name].bytes * 256
    qt = QuantizedTensor(spec=spec_of(name), shape=(*stored.shape[:-1], k), codes=stored)
    return LayerTensors(operands={"weight": qt})


def asked(lt: LayerTensors, kind: str = "linear", **sizes: int) -> OpSpec:
    n, k = lt.weight.shape[-2:]
    return OpSpec(
        op=kind,
        operands=(("weight", lt.weight.spec),),
        sizes=(("n", n), ("k", k), ("k_stored", k), *sizes.items()),
        act_dtype="float32",
    )


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_same_weights_and_give_the_same_bytes(name):
    stored = blocks(name, 40, 3)
    before = stored.clone()
    codes = block_codes(f"gguf_{name}")
    made = codes.unpack(stored, 768)
    assert made.spec == codes.spec
    assert made.shape == (40, 768)
    assert torch.equal(made.dequantize(), values(name, stored))
    assert torch.equal(codes.pack(made), stored)
    assert torch.equal(stored, before)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_taken_apart_in_steps(name, monkeypatch):
    monkeypatch.setattr("quant_plugin_gguf.grids._ROWS", 1024)  # four rows at a time
    stored, codes = blocks(name, 11, 1), block_codes(f"gguf_{name}")
    made = codes.unpack(stored, 256)
    assert torch.equal(made.dequantize(), values(name, stored))
    assert torch.equal(codes.pack(made), stored)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("iq")])
def test_every_entry_of_a_grid_is_found_again(name):
    """No two entries are alike, or ``pack`` could not tell them apart."""
    kind = getattr(oracle.quants, {"iq1_m": "IQ1_S"}.get(name, name.upper()))
    kind.init_grid()
    grid = kind.grid.reshape(kind.grid_shape)
    assert len(np.unique(grid, axis=0)) == len(grid)


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_of_a_code_is_seen(name):
    """Negative control of both comparisons."""
    stored, codes = blocks(name, 4, 1), block_codes(f"gguf_{name}")
    made = codes.unpack(stored, 256)
    made.codes[2, 5] ^= 1
    assert not torch.equal(made.dequantize(), values(name, stored))
    assert not torch.equal(codes.pack(made), stored)


def test_ternary_blocks_of_one_byte_for_two_keep_their_bytes():
    assert block_codes("gguf_tq1_0") is None
    op = asked(layer("tq1_0", blocks("tq1_0", 32, 1)))
    assert choose(op, registry()).kernel.name == "torch_ref"


def wrapped(lt: LayerTensors, op: OpSpec) -> Expanded:
    """The kernel that is chosen where one reads the codes."""
    kernel = choose(op, registry()).kernel
    if not isinstance(kernel, Expanded):
        pytest.skip("no kernel for such codes on this machine")
    return kernel


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_of_codes_computes_what_the_blocks_say(name):
    stored = blocks(name, 70, 2, seed=1)
    lt = layer(name, stored)
    op = asked(lt)
    kernel = wrapped(lt, op)
    assert isinstance(kernel.accepts(op), Accepted)
    assert "bits a weight) kept as" in kernel.accepts(op).note
    buffers = kernel.allocate(op)
    for start, stop in ((32, 70), (0, 32)):
        part = replace(lt.weight, codes=stored[start:stop], shape=(stop - start, 512))
        kernel.load_(buffers, op, LayerTensors(operands={"weight": part}), {"row": start})
    exact = values(name, stored).double()
    run = kernel.bind(op)
    for m in (1, 9):
        x = torch.randn(m, 512)
        want = F.linear(x.double(), exact)
        got = run(list(buffers.values()), x)
        assert float((got - want).norm() / want.norm()) < 1e-6, m  # float32 sums
    back = kernel.restore(buffers, op).weight
    assert (back.spec, back.shape, back.scales) == (lt.weight.spec, lt.weight.shape, ())
    assert torch.equal(back.codes, stored)


def test_stacks_of_experts_come_back_too():
    stored = torch.stack([blocks("iq3_s", 32, 1, seed=e) for e in range(3)])
    lt = layer("iq3_s", stored)
    op = asked(lt, "grouped_linear", experts=3, top_k=1)
    kernel = wrapped(lt, op)
    buffers = kernel.allocate(op)
    for e in range(3):
        part = LayerTensors(
            operands={"weight": replace(lt.weight, codes=stored[e], shape=(32, 256))}
        )
        kernel.load_(buffers, op, part, {"row": 0, "expert": e})
    assert torch.equal(kernel.restore(buffers, op).weight.codes, stored)
    x, experts = torch.randn(3, 256), torch.tensor([2, 0, 1])
    got = kernel.bind(op)(list(buffers.values()), x, experts)
    for i, e in enumerate(experts.tolist()):
        want = values("iq3_s", stored[e]).double() @ x[i].double()
        assert float((got[i] - want).norm() / want.norm()) < 1e-6


def test_layers_of_one_input_share_a_call():
    layers = [layer(n, blocks(n, 32, 1)) for n in ("iq3_s", "iq2_xs")]
    ops = [asked(lt) for lt in layers]
    kernels = [wrapped(lt, op) for lt, op in zip(layers, ops, strict=True)]
    both = kernels[0].bind_shared(ops)
    assert both is not None
    held = []
    for lt, op, kernel in zip(layers, ops, kernels, strict=True):
        buffers = kernel.allocate(op)
        kernel.load_(buffers, op, lt, {"row": 0})
        held.append(list(buffers.values()))
    x = torch.randn(1, 256)
    alone = [k.bind(op)(h, x) for k, op, h in zip(kernels, ops, held, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(both(held, x), alone, strict=True))


def test_a_gated_mlp_is_one_call():
    layers = [layer(n, blocks(n, 256, 1, i)) for i, n in enumerate(("iq3_s", "iq2_s", "iq3_xxs"))]
    ops = [replace(asked(lt), act_dtype="bfloat16") for lt in layers]
    kernels = [wrapped(lt, op) for lt, op in zip(layers, ops, strict=True)]
    whole = kernels[0].bind_gated(ops, "silu")
    held = []
    for lt, op, kernel in zip(layers, ops, kernels, strict=True):
        buffers = kernel.allocate(op)
        kernel.load_(buffers, op, lt, {"row": 0})
        held.append(list(buffers.values()))
    gate, up, down = (k.bind(op) for k, op in zip(kernels, ops, strict=True))
    x = (torch.randn(1, 256) / 16).bfloat16()
    hidden = F.silu(gate(held[0], x)) * up(held[1], x)
    want, got = down(held[2], hidden), whole(held, x)
    assert float((got - want).float().norm() / want.float().norm()) < 2.0**-7  # one rounding of x


@pytest.mark.parametrize("up_first", [False, True])
def test_a_gated_mlp_of_one_layer_for_both_sides_is_one_call(up_first):
    layers = [layer("iq3_s", blocks("iq3_s", 512, 1)), layer("iq3_s", blocks("iq3_s", 256, 1, 3))]
    ops = [replace(asked(lt), act_dtype="bfloat16") for lt in layers]
    kernels = [wrapped(lt, op) for lt, op in zip(layers, ops, strict=True)]
    whole = kernels[0].bind_gated(ops, "silu", *((True,) if up_first else ()))
    held = []
    for lt, op, kernel in zip(layers, ops, kernels, strict=True):
        buffers = kernel.allocate(op)
        kernel.load_(buffers, op, lt, {"row": 0})
        held.append(list(buffers.values()))
    both, down = (k.bind(op) for k, op in zip(kernels, ops, strict=True))
    x = (torch.randn(1, 256) / 16).bfloat16()
    first, second = both(held[0], x).chunk(2, -1)
    gate, up = (second, first) if up_first else (first, second)
    want, got = down(held[1], F.silu(gate) * up), whole(held, x)
    assert float((got - want).float().norm() / want.float().norm()) < 2.0**-7  # one rounding of x


def test_the_operation_on_codes_says_what_they_mean():
    op = with_codes(asked(layer("iq2_s", blocks("iq2_s", 32, 1))))
    assert op.weight.label == "iq2_s group(16):uint8 group(256):f16"
