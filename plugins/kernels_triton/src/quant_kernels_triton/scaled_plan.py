"""Which operations with 8-bit activations the scaled kernels run; plain data, no torch.

fp8     fp8_e4m3 by fp8_e4m3, a scale per token (or a stored one) and per output or matrix
int8    int8 by int8, the same scales
block   fp8_e4m3 in rectangles of 128 x 128 by fp8_e4m3 in groups of 128
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

from quant_core.kernels.base import Rejected
from quant_core.spec import CANONICAL, CHANNEL, TENSOR, OpSpec, QuantSpec

__all__ = [
    "ScaledPlan",
    "codes_us",
    "describe_scaled",
    "few_rows",
    "product_us",
    "scaled_from_text",
    "scaled_us",
]

_WIDE = ("f32", "bf16", "f16")
_ACTS = ("bfloat16", "float16", "float32")
_PEAKS = {"fp8_e4m3": 448.0, "int8": 127.0}
MOST_K = 32768  # a token is held in registers while it is quantized


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScaledPlan:
    """All that the kernels depend on; equal to itself only (one text gives one object)."""

    kind: str
    n: int
    k: int
    single: bool  # one weight scale for the whole matrix
    static: bool  # a stored activation scale
    peak: float
    least: float
    most: float
    bias: bool
    act_dtype: str
    buffers: tuple[str, ...]
    types: tuple[str, ...]  # of the stored scales, and of the bias

    def text(self) -> str:
        """Compact JSON. Inverse of ``scaled_from_text``."""
        return json.dumps(asdict(self), separators=(",", ":"))


def few_rows(kind: str, n: int) -> int:
    """Rows up to which one kernel multiplies, before torch's matmuls do; measured on an H100."""
    if kind == "int8":
        return 64 if n >= 16384 else 128
    return 16 if n >= 16384 or kind == "block" else 64


def codes_us(rows: int, k: int) -> float:
    """Microseconds of quantizing ``rows`` tokens, fitted to an H100."""
    return 1.2 + rows * k / 0.9e6 + (1.2 if k > 8192 else 0.0)


SMS = 132  # multiprocessors of an H100: only costs and block counts depend on it


def product_us(
    n: int, k: int, rows: int, tile: tuple[int, int], alone: float, full: float
) -> float:
    """Microseconds of a product in tiles of ``tile`` outputs and tokens, fitted to an H100.

    Args:
        alone: of 128 columns of a tile while the card is almost idle.
        full: the same on a full card.
    """
    tiles, groups = -(-n // tile[0]) * -(-rows // tile[1]), -(-k // 128)
    turns, rest = divmod(tiles - 1, SMS)
    work = groups * (turns * full + alone + (full - alone) * (rest + 1) / SMS)
    return (work**2.2 + (n * k / 2.95e6) ** 2.2) ** (1 / 2.2)


_TORCH = {"fp8": (4.4, 0.218, 0.431), "block": (4.1, 0.271, 0.394)}  # start; alone, full
_SCALES_US = 4.0  # of making float32 scales for torch of stored ones


def scaled_us(p: ScaledPlan, rows: int) -> float:
    """Microseconds of ``rows`` tokens in ``triton_scaled``, fitted to an H100."""
    size, few = p.n * p.k, few_rows(p.kind, p.n)
    work = 2.0 * rows * size / 1e6  # over TFLOP/s
    long = max(0, p.k - 4096) / 10240  # a token is quantized in one program
    if rows <= few:
        start = 10.0 if p.kind == "block" else 7.0
        start += long * (14.0 if p.kind == "block" else 4.0)
        return start + max(size / 2.4e6, work / (350.0 if p.kind == "int8" else 1150.0))
    if p.kind == "int8":
        return 12.0 + codes_us(rows, p.k) + max(size / 2.4e6, work / 700.0)
    start, alone, full = _TORCH[p.kind]
    start += codes_us(rows, p.k) + (p.types[0] != "f32") * _SCALES_US
    return start + product_us(p.n, p.k, rows, (128, 128), alone, full)


@functools.cache
def scaled_from_text(text: str) -> ScaledPlan:
    """The plan of a text."""
    fields = json.loads(text)
    fields |= {name: tuple(fields[name]) for name in ("buffers", "types")}
    return ScaledPlan(**fields)


def _input_problem(op: OpSpec, acts: QuantSpec) -> Rejected | None:
    if acts.element.name not in _PEAKS or acts.ties != "even":
        return Rejected(axis="input", have=acts.label, need="fp8_e4m3 or int8, ties to even")
    if len(acts.scales) != 1 or acts.zero is not None or acts.gather or acts.blocks:
        return Rejected(axis="input", have=acts.label, need="one scale and no zero")
    s = acts.scales[0]
    if s.inverse or s.add or s.rule or s.element not in _WIDE:
        return Rejected(axis="input", have=acts.label, need=f"a multiplier in {', '.join(_WIDE)}")
    if s.static != ("input_scale" in op.features):
        have = "no stored input scale" if s.static else "a stored input scale"
        return Rejected(axis="features", have=have, need="one exactly where the scale is stored")
    if s.grain not in (((0, 0),) if s.static else (CHANNEL, (1, 128))):
        need = "a stored scale, or a run-time scale of a token or of 128 columns"
        return Rejected(axis="input", have=acts.label, need=need)
    return None


def describe_scaled(op: OpSpec) -> ScaledPlan | Rejected:
    """The plan of ``op``, or the first reason why there is none."""
    if op.op != "linear":
        return Rejected(axis="op", have=op.op, need="linear")
    acts, w = op.operand("input"), op.weight
    if acts is None:
        return Rejected(axis="operands", have="weight", need="input and weight")
    if op.act_dtype not in _ACTS:
        return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_ACTS))
    known = ("bias", "input_scale", "tied")
    if extra := sorted(f for f in op.features if f.partition(":")[0] not in known):
        return Rejected(axis="features", have=", ".join(extra), need="bias or input_scale")
    if op.packing != CANONICAL:
        return Rejected(axis="packing", have=str(op.packing), need="the canonical packing")
    if problem := _input_problem(op, acts):
        return problem
    name = w.element.name
    if name != acts.element.name or w.zero is not None or w.gather or w.blocks:
        need = f"{acts.element.name} without zero or gather, as the activations are"
        return Rejected(axis="element", have=w.label, need=need)
    k = op.size("k")
    if not 0 < k <= MOST_K or k % 16 or not op.size("n"):
        have = f"{op.size('n')} x {k}"
        return Rejected(axis="sizes", have=have, need=f"K a multiple of 16 up to {MOST_K}")
    if len(w.scales) != 1 or w.scales[0].element not in _WIDE or w.scales[0].inverse:
        return Rejected(axis="scales", have=w.label, need=f"one factor in {', '.join(_WIDE)}")
    grain, blocked = w.scales[0].grain, acts.scales[0].grain == (1, 128)
    row = grain == CHANNEL or (grain[0] == 1 and grain[1] >= k)
    if blocked != (grain == (128, 128)) or not (blocked or row or grain == TENSOR):
        need = "per row or matrix, or both sides in groups of 128"
        return Rejected(axis="scales", have=f"{w.label}, {acts.label}", need=need)
    if blocked and name != "fp8_e4m3":
        return Rejected(axis="element", have=name, need="fp8_e4m3 in groups of 128")
    s, bias = acts.scales[0], "bias" in op.features
    buffers = ("codes", "scales_0", *(("bias",) if bias else ()))
    return ScaledPlan(
        kind="block" if blocked else "fp8" if name == "fp8_e4m3" else "int8",
        n=op.size("n"),
        k=k,
        single=grain == TENSOR,
        static=s.static,
        peak=s.peak or _PEAKS[name],
        least=s.least,
        most=s.most,
        bias=bias,
        act_dtype=op.act_dtype,
        buffers=(*buffers, *(("input_scale",) if s.static else ())),
        types=(w.scales[0].element, s.element, *sorted(f for f in op.features if f[:5] == "bias:")),
    )
