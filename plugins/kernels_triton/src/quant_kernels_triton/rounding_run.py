"""Running the rounding kernels: tables, tile sizes, launches, and the torch op.

    quant_triton::round_input(x, scale, zero, experts, spec) -> x^

A tile has about ``_TILE`` elements, fewer where x is small, so that many programs share it. Few
tokens before a product that starts early are shared out further, since it waits for them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_core.errors import LayoutError
from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.calls import check_input, unobserved
from quant_core.numerics import element_table, mx_scale
from quant_core.spec import Element
from quant_kernels_triton.arguments import dependent, options
from quant_kernels_triton.jitted import Jits
from quant_kernels_triton.launch import Build, aligned, launch
from quant_kernels_triton.replay import kind_of, replayed
from quant_kernels_triton.rounding_plan import MOST, RoundPlan, round_from_text

__all__ = ["bound_round", "own_columns", "round_input", "rounded", "steps"]

rounding = Jits("rounding")

_TILE = 2048
_OWN, _OWN_WARPS = 512, 8  # columns of a program where several share a token
_FEW = 16  # tokens before a product that starts early
_PARTS = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NEVER = 0x7FFFFFFF  # above the bits of every float that is looked up


def steps(element: Element, rule: str, peak: float, device: torch.device) -> Tensor:
    """int32 [512]: byte of every power of two, and the bits from which on it is one more.

    Found by asking ``mx_scale`` itself: within one binade its byte rises by at most one.
    """
    first = (torch.arange(256, dtype=torch.int32, device=device)) << 23
    last = first + 0x7FFFFF

    def byte(bits: Tensor) -> Tensor:
        return mx_scale(bits.view(torch.float32), element, rule, peak).to(torch.int32)

    base = byte(first)
    low, high = first.clone(), last.clone()  # byte(low) is the base, byte(high) is not
    for _ in range(23):
        middle = low + ((high - low) >> 1)
        rises = byte(middle) > base
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return torch.cat([base, torch.where(byte(last) > base, high, _NEVER)])


_tables: dict[tuple[str, torch.device], Tensor] = {}


def _table(text: str, device: torch.device) -> Tensor:
    """The table of ``RoundPlan.table``, kept per device."""
    if device.type == "meta":  # planned
        return torch.empty(512, dtype=torch.int32, device=device)
    held = _tables.get((text, device))
    if held is not None:
        return held
    kind, name, *rest = text.split()
    if kind == "values":
        made = element_table(name).view(torch.int32).to(device)
    else:
        bits = int(name[2])
        element = Element(name=name, bits=bits, kind="float")
        made = steps(element, rest[0], float(rest[1]), device)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        _tables[text, device] = made  # a graph's own memory holds nothing before it is replayed
    return made


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


@functools.cache
def _tile(p: RoundPlan, k: int, small: bool) -> tuple[int, int, int, dict[str, Any], int]:
    """(columns of a group, groups of a token, groups of a tile, constants, warps)."""
    columns = p.columns(k)
    groups, bg = -(-k // columns), _power(columns)
    bn = _power(groups) if p.whole else max(1, (_TILE >> 2 if small else _TILE) // bg)
    warps = min(32, max(4, bn * bg // (512 if bn * bg <= 8192 else 1024)))
    fixed = p.constants | {"RAGGED": k % columns != 0, "WHOLE": p.whole, "BN": bn, "BG": bg}
    return columns, groups, bn, fixed, warps


def own_columns(p: RoundPlan, k: int, tokens: int) -> int:
    """Columns that a program rounds where several share a token; 0: one has all of it."""
    shared = p.early and p.whole_token and tokens <= _FEW and k > 2 * _OWN
    return (_OWN if k <= 16384 else 2 * _OWN) if shared else 0


def _extremes(x: Tensor, half: bool) -> tuple[Tensor, int]:
    """Bits of the largest magnitudes below and above zero of every part of x."""
    size = x.numel()
    parts = min(_PARTS, _power(-(-size // 4096)))
    chunk = -(-size // parts)
    out = torch.empty(2, parts, dtype=torch.int32, device=x.device)
    pdl = dependent(x.device.index)

    def build() -> Build:
        fixed = {"HALF": half, "PARTS": parts, "BLOCK": 1024, "PDL": pdl}
        words = {0: torch.int16} if half else {}
        return Build(constants=fixed, options=options(pdl, 4, 1), views=words)

    key = ("extremes", parts, x.dtype)
    launch(rounding.extremes, key, (parts, 1), (x, out, size, chunk), x.device.index, build)
    return out, parts


def round_input(
    p: RoundPlan, x: Tensor, scale: Tensor | None, zero: Tensor | None, experts: Tensor | None
) -> Tensor:
    """x [..., K] rounded to the codes of ``p.spec`` and back."""
    x = aligned(x)
    if p.stored and scale is None:
        raise LayoutError(
            "activations: input_scale is absent, expected a stored value because the scale is "
            "static. Give the tensor, or describe the scale as computed at run time.",
            code="Q-LAYOUT-SHAPE",
            tensor="input_scale",
        )
    y, k, device = x.new_empty(x.shape), x.shape[-1], x.device.index
    if not x.numel():
        return y
    tokens, half = x.numel() // k, x.dtype == torch.bfloat16
    columns, groups, bn, constants, warps = _tile(p, k, x.numel() <= 1 << 17)
    part, parts = _extremes(x, half) if p.first else (y, 1)
    table = _table(p.table, x.device) if p.table else y
    kinds = tuple(None if t is None else t.dtype for t in (scale, zero, experts))
    pdl = dependent(device)
    own, early = own_columns(p, k, tokens), p.early and tokens <= _FEW
    key = ("round", p, k, bn, own, early, x.dtype, parts, kinds)

    def build() -> Build:
        words = {0: torch.int16, 1: torch.int16} if half else {}
        more = {"HALF": half, "PARTS": parts, "PDL": pdl, "BO": own, "EARLY": early}
        how = options(pdl, _OWN_WARPS if own else warps, 1) | {"enable_fp_fusion": False}
        return Build(constants=constants | more, options=how, views=words)

    count = 0 if experts is None or scale is None else scale.shape[0]
    fixed = (tokens, k, groups, columns, count)
    stored = (y if t is None else t for t in (scale, zero))
    args = (x, y, *stored, table, part, y if experts is None else experts, *fixed)
    grid = (tokens if p.whole else -(-tokens * groups // bn), -(-k // own) if own else 1)
    launch(rounding.round_groups, key, grid, args, device, build)
    return y


def rounded(text: str, x: Tensor) -> Tensor:
    """x rounded to a run-time spec, given as text; by the reference where no tile holds it."""
    p = round_from_text(text, False)
    if x.dtype in _DTYPES and p.held(x.shape[-1]) <= MOST:
        return round_input(p, x, None, None, None)
    return fake_quantize(x, p.spec)


# ------------------------------------------------------------------------------------- the torch op

_lib = torch.library.Library("quant_triton", "FRAGMENT")
_lib.define(
    "round_input(Tensor x, Tensor? scale, Tensor? zero, Tensor? experts, str spec) -> Tensor"
)


def _op(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, experts: Tensor | None, spec: str
) -> Tensor:
    return round_input(round_from_text(spec, experts is not None), x, scale, zero, experts)


def _fake(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, experts: Tensor | None, spec: str
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_lib.impl("round_input", _op, "CompositeExplicitAutograd")
torch.library.register_fake("quant_triton::round_input", _fake, lib=_lib)


def _again(x: Tensor, given: Sequence[Tensor | None], text: str, kinds: Any) -> Tensor:
    """What ``replay`` runs; ``kinds`` are of the stored values, None if there is none of them."""
    scale, zero, experts = given
    return round_input(round_from_text(text, experts is not None), x, scale, zero, experts)


def bound_round(
    text: str, k: int, buffers: list[Tensor], x: Tensor, scale: Tensor | None = None,
    zero: Tensor | None = None, experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What ``bind`` gives for a "quantize" operation, with the first two arguments fixed."""
    if x.dtype in _DTYPES and unobserved(x):
        given = (scale, zero, experts)
        none = scale is None and zero is None and experts is None
        kinds = None if none else tuple(None if t is None else kind_of(t) for t in given)
        return replayed(_again, (text, kinds), given, x, k)
    check_input(x, k)
    if x.dtype not in _DTYPES:  # float64, which no layer has, but a test may
        flat = x.reshape(-1, k)
        return fake_quantize(flat, round_from_text(text, False).spec, scale, zero).view(x.shape)
    return torch.ops.quant_triton.round_input(x, scale, zero, experts, text)  # type: ignore[no-any-return]
