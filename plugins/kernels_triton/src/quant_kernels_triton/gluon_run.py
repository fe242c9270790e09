"""Running the Gluon kernels on a layer's buffers: descriptors, workspace, launches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_core.kernels.base import Rejected
from quant_core.kernels.storage import misused
from quant_kernels_triton.asm import constraints, dequant
from quant_kernels_triton.gluon_counters import counters
from quant_kernels_triton.gluon_plan import Ring, Specialized, config, cut, plan
from quant_kernels_triton.jitted import Descriptor, Jitted
from quant_kernels_triton.launch import Build, aligned, launch
from quant_kernels_triton.recipe import ELEMENTS, GROUP, Recipe

__all__ = ["run_config", "run_gluon"]

ring, specialized = Jitted("gluon_ring", "ring"), Jitted("gluon_ws", "specialized")

_PAIRS = {1: torch.int16, 2: torch.int32, 4: torch.int64}  # two rows of a factor in one word
_SIZES = {code: {"f32": 4, "bf16": 2, "f16": 2}.get(e, 1) for e, code in ELEMENTS.items()}


class _Layer:
    """A recipe with its plan and what is fixed of its launches."""

    __slots__ = ("buffers", "configs", "fixed", "plan", "recipe", "sizes", "views")

    def __init__(self, recipe: Recipe) -> None:
        p = plan(recipe)
        if isinstance(p, Rejected):
            raise misused("gluon_wna16", p)
        self.recipe, self.plan = recipe, p
        self.sizes = (recipe.n, recipe.rows, recipe.k, recipe.groups)
        self.configs: dict[int, Ring | Specialized] = {}
        self.fixed = {
            "BYTES": p.bytes,
            "BF16": recipe.act_dtype == "bfloat16",
            **{f"C{i}": c for i, c in enumerate(p.factors)},
            **{f"R{i}": c for i, c in enumerate(p.rows)},
            "HAS_BIAS": recipe.bias,
            "ZERO": p.zero,
            "MODE": p.mode,
            "SPG": p.spg,
            "REGS": constraints({4: 4, 8: 2}.get(p.bits, 8)),
            "PDL": True,
        }
        names = ["codes", *p.names, *p.row_names, "bias"]
        codes = recipe.buffers.index("codes")
        self.buffers = [recipe.buffers.index(n) if n in recipe.buffers else codes for n in names]
        grouped = [i for i, c in enumerate(p.factors) if c & 7 == GROUP]
        absent = [i for i, at in enumerate(self.buffers) if at == codes]
        sizes = {i: _SIZES[p.factors[i] >> 3 & 7] for i in grouped}
        # by position behind x: the codes, then factors
        self.views = dict.fromkeys(absent, torch.int16)
        self.views |= {1 + i: _PAIRS[size] for i, size in sizes.items()}

    def arguments(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Codes, five factors, two factors of rows, bias; the codes where one is absent."""
        return [tensors[i] for i in self.buffers]

    def config(self, rows: int) -> Ring | Specialized:
        """Block sizes for ``rows`` rows, looked up once."""
        held = self.configs.get(rows)
        if held is None:
            held = self.configs[rows] = config(self.plan, self.recipe, rows)
        return held

    def build(self, x: Tensor, warps: int, mode: int, more: Any, first: int = 1) -> Build:
        """Constants of one kernel; ``more`` adds block sizes, the codes are argument ``first``."""
        p, act = self.plan, "bf16" if x.dtype == torch.bfloat16 else "fp16"
        asm = dequant(p.element, act, mode, p.zero_value)
        options = {"num_warps": warps, "launch_pdl": True}
        constants = self.fixed | {"ASM": asm} | more
        views = {i + first: dtype for i, dtype in self.views.items()}
        return Build(constants=constants, options=options, views=views)


@functools.cache
def _layer(recipe: Recipe) -> _Layer:
    return _Layer(recipe)


def _run_ring(held: _Layer, x: Tensor, tensors: Sequence[Tensor], y: Tensor, c: Ring) -> None:
    r, device, m = held.recipe, x.device.index, x.shape[0]
    blocks = -(-m // c.bm) * -(-held.sizes[1] // (16 * c.warps))
    split, count, part = c.split, y, y
    if split > 1:
        counter = counters(device, blocks)
        if counter is None:
            split = 1
        else:
            count = counter
            part = torch.empty(split, m, r.n, dtype=torch.float32, device=x.device)
    key = ("ring", r, c.bm, c.warps, c.stages, split, c.acc)

    def build() -> Build:
        more = {"BM": c.bm, "NW": c.warps, "ST": c.stages, "SPLIT": split, "GN": 8, "ACC": c.acc}
        return held.build(x, c.warps, 0 if c.acc else held.plan.mode, more)

    desc = Descriptor(x, (c.bm, 128))
    sizes = (m, *held.sizes)
    args = (desc, *held.arguments(tensors), y, part, count, *sizes)
    grid = (blocks * split, 1)
    launch(ring, key, grid, args, device, build)


def _run_specialized(
    held: _Layer, x: Tensor, tensors: Sequence[Tensor], y: Tensor, c: Specialized
) -> None:
    r, device = held.recipe, x.device.index
    m, shares = x.shape[0], r.groups // c.unroll
    tiles = c.tiles(m, held.sizes[1])
    programs = min(c.programs, tiles * shares) or tiles
    part = count = tensors[held.buffers[0]]  # not read where no tile is cut
    if cut(tiles, shares, programs):
        counter = counters(device, programs * c.consumers)
        if counter is None:
            programs = tiles
        else:
            count = counter
            sums = programs * c.consumers * 64 * c.wide * c.bm
            part = torch.empty(sums, dtype=torch.float32, device=x.device)
    key = ("ws", r, c.b1, c.b2, c.consumers, c.wide, c.stages, c.unroll, c.acc)

    def build() -> Build:
        more = {"B1": c.b1, "B2": c.b2, "NC": c.consumers, "R": c.wide, "ST": c.stages}
        more |= {"PER": c.per, "GN": 32, "ACC": c.acc, "BITS": held.plan.bits}
        more |= {"U": c.unroll, "EARLY": held.plan.early and c.wide == 1}
        b = held.build(x, 4, 0 if c.acc else held.plan.mode, more, first=2)
        at = 3 + len(held.buffers)
        return replace(b, views=b.views | {at: torch.float32, at + 1: torch.int32})

    desc = Descriptor(x, (c.b1, 64))
    rest = Descriptor(x, (c.b2, 64)) if c.b2 else desc
    high = tensors[r.buffers.index("codes_high" if held.plan.bits == 3 else "codes")]
    sizes = (m, *held.sizes)
    args = (desc, rest, *held.arguments(tensors), y, part, count, high, *sizes)
    launch(specialized, key, (programs, 1), args, device, build)


def _gathered(r: Recipe, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    if not r.gather:
        return x
    if x.device.type == "meta":  # planned
        return x.new_empty(x.shape[0], r.k)
    held = tensors[r.buffers.index("gather")]  # -1 picks the appended zero column
    return F.pad(x, (0, 1)).index_select(1, torch.where(held < 0, r.k_in, held)[: r.k])


def run_config(r: Recipe, x: Tensor, tensors: Sequence[Tensor], c: Ring | Specialized) -> Tensor:
    """y [M, N] = x [M, K] W^T (+ bias) with the given block sizes."""
    x = aligned(_gathered(r, x, tensors))
    y = x.new_empty(x.shape[0], r.n)
    if x.shape[0]:
        if isinstance(c, Ring):
            _run_ring(_layer(r), x, tensors, y, c)
        else:
            _run_specialized(_layer(r), x, tensors, y, c)
    return y


def run_gluon(r: Recipe, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """y [M, N] = x [M, K] W^T (+ bias) with the block sizes of ``gluon_plan.config``.

    An input of another type than the layer's is taken in the layer's and the result given back in
    its own: the kernels know 16-bit floats only.
    """
    own = getattr(torch, r.act_dtype)
    if x.dtype != own:
        return run_gluon(r, x.to(own), tensors).to(x.dtype)
    return run_config(r, x, tensors, _layer(r).config(x.shape[0]))
