"""Source checkpoints x target formats: the data of test_convert_table.py and of docs/convert.md.

A row is a real checkpoint, a cell a key of ``CELLS``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CELLS", "LEFT_CACHE", "OPTIONS", "ROWS", "TARGETS", "Cell", "Row", "rows"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What becomes of one conversion.

    Attributes:
        text: for the page.
        refused: part of the reason why it is refused even if losses are allowed; "" = it is not.
        losses: part of each loss that is named; () = exact.
        bound: largest relative error of the weights of one module.
    """

    text: str
    refused: str = ""
    losses: tuple[str, ...] = ()
    bound: float = 0.0

    @property
    def exact(self) -> bool:
        return not self.refused and not self.losses


_DROP, _RULE = "no longer quantized", "rounded by another rule"
LEFT_CACHE = "keys and values are no longer quantized"
_GRID, _DIVISOR = "rounded to 8-bit codes", "nearest divisor"

CELLS: Mapping[str, Cell] = {
    "=": Cell(text="exact"),
    # the weights keep every bit, the activations do not stay what they are
    "drop": Cell(text="weights exact, activations no longer quantized", losses=(_DROP,)),
    "rule": Cell(text="weights exact, activations rounded by the target's rule", losses=(_RULE,)),
    "way": Cell(
        text="weights exact, activations quantized in the target's own way",
        losses=("activations quantized as",),
    ),
    "gets": Cell(text="weights exact, activations become quantized", losses=("become quantized",)),
    "kv": Cell(text="exact, keys and values no longer quantized", losses=(LEFT_CACHE,)),
    "kv+": Cell(
        text="weights exact, keys and values no longer quantized, activations not as they were",
        losses=(LEFT_CACHE, "activations"),
    ),
    "rope": Cell(
        text="exact, keys quantized after the rotary embedding in place of before",
        losses=("keys quantized after",),
    ),
    # the weights change
    "div": Cell(
        text="a factor that no float32 divisor gives; relative error below 1e-6",
        losses=(_DIVISOR,),
        bound=1e-6,  # one ulp of float32 is 1.2e-7
    ),
    "div+": Cell(
        text="as `div`, and activations rounded by the target's rule",
        losses=(_RULE, _DIVISOR),
        bound=1e-6,
    ),
    "quot": Cell(
        text="offsets as float32 zero points, relative error below 1e-6",
        losses=("f32 quotients",),
        bound=1e-6,
    ),
    "mid": Cell(
        text="float32 zero points counted from the middle code, relative error below 1e-8",
        losses=("around the middle code",),
        bound=1e-8,
    ),
    # the best of some ten finer grids: rounding each weight to 1/127 of the largest of its group
    # would be 0.5 % off
    "grid": Cell(
        text="offsets on a grid of 8 bits, relative error below 0.4 %", losses=(_GRID,), bound=0.004
    ),
    "zero": Cell(
        text="zero points rounded to integers, relative error below 12 %",
        losses=("rounded to integers",),
        bound=0.12,
    ),
    "f16": Cell(
        text="scales rounded to float16, relative error below 0.1 %",
        losses=("f16",),
        bound=0.001,
    ),
    # refused
    "kind": Cell(text="refused: codes of another kind", refused="weights are"),
    "fine": Cell(text="refused: scales are finer than the target's", refused="differ inside"),
    "pow2": Cell(text="refused: scales are no powers of two", refused="no powers of two"),
    "bits": Cell(text="refused: more bits than the target has", refused="codes or zero points"),
    "order": Cell(text="refused: activation order", refused="activation order"),
    "maps": Cell(text="refused: transforms of the activations", refused="transforms"),
    "sums": Cell(text="refused: sums before scaling (NPU form)", refused="acc_bias"),
    "model": Cell(text="refused: the container does not know the model", refused="model_type is"),
}

TARGETS = (
    "awq gptq gguf autoround compressed_tensors quark hqq torchao bitsandbytes modelslim_npu "
    "nvfp4 fp8 mxfp8 mxfp4"
).split()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One source: its folder, what it holds, and target -> key of ``CELLS``."""

    source: str
    text: str
    cells: Mapping[str, str]


ROWS = """
gptqmodel-awq-gemm-g128: AWQ int4, zero points
    =     =     =     =     =     =     =     =     fine  =     bits  kind  kind  kind
gptqmodel-4bit-g128-asym-descact: GPTQ int4, activation order
    order =     order order =     order order order order order order kind  kind  kind
gptqmodel-dynamic-4-8bit-skip: GPTQ 4 and 8 bits
    bits  =     =     =     =     =     =     =     fine  =     bits  kind  kind  kind
gptqmodel-2bit-g32-asym: GPTQ 2 bits, zero points
    =     =     =     =     =     =     =     =     fine  =     =     kind  kind  kind
gguf-llama-q4_k_m: GGUF K-quants
    bits  grid  =     grid  grid  grid  quot  grid  fine  grid  bits  kind  kind  kind
gguf-moe-q4_k_m: GGUF K-quants, experts
    bits  grid  =     grid  grid  grid  quot  grid  fine  grid  fine  kind  kind  kind
gguf-llama-q8_0: GGUF Q8_0
    bits  =     =     =     =     =     =     =     fine  =     fine  kind  kind  kind
gguf-llama-iq3_s: GGUF IQ3_S blocks
    kind  kind  =     kind  kind  kind  kind  kind  kind  kind  kind  kind  kind  kind
ar-mixed-bits: AutoRound 2, 4, 8 bits
    bits  =     =     =     =     =     =     =     fine  =     bits  kind  kind  kind
ar-moe-w4g64: AutoRound int4, experts
    =     =     =     =     =     =     =     =     fine  =     =     kind  kind  kind
ct-w4a16-awq-asym: compressed-tensors W4A16, zero points
    =     =     =     =     =     =     =     =     fine  =     bits  kind  kind  kind
ct-w8a16-g128: compressed-tensors W8A16
    bits  =     =     =     =     =     =     =     fine  =     bits  kind  kind  kind
ct-w8a8-int8-dynamic-gptq: compressed-tensors W8A8, run-time scales
    bits  drop  drop  drop  =     =     drop  rule  drop  rule  drop  kind  kind  kind
ct-w8a8-int8-static-asym-act: compressed-tensors W8A8, stored scales
    bits  drop  drop  drop  =     =     drop  drop  drop  drop  drop  kind  kind  kind
ct-w4afp8: compressed-tensors W4A8 (fp8)
    drop  drop  drop  drop  =     =     drop  drop  fine  drop  drop  kind  kind  kind
hqq-4bit-g64: HQQ int4, float zeros
    zero  grid  f16   grid  grid  grid  =     grid  fine  grid  bits  kind  kind  kind
torchao-int8wo: TorchAO int8 per row
    bits  =     =     =     =     =     =     =     =     =     =     kind  kind  kind
torchao-intx4-g32: TorchAO int4 in groups
    =     =     =     =     =     =     =     =     fine  =     =     kind  kind  kind
bnb-int8: bitsandbytes int8
    bits  f16   f16   f16   f16   =     =     =     =     =     =     kind  kind  kind
bnb-nf4-dq: bitsandbytes nf4, double quantization
    kind  kind  kind  kind  kind  kind  kind  kind  =     kind  kind  kind  kind  kind
quark-uint4-g128-awq: Quark uint4
    =     =     =     =     =     =     =     =     fine  =     bits  kind  kind  kind
quark-int8: Quark W8A8, one scale a tensor
    bits  drop  drop  drop  =     =     drop  drop  drop  drop  =     kind  kind  kind
msmodelslim-w8a16: ModelSlim W8A16
    bits  =     =     =     =     =     =     =     =     =     =     kind  kind  kind
msmodelslim-w8a8: ModelSlim W8A8, integer sums
    sums  sums  sums  sums  sums  sums  sums  sums  sums  =     sums  kind  sums  kind
msmodelslim-w4a8-dynamic: ModelSlim W4A8
    drop  drop  drop  drop  rule  rule  drop  rule  drop  =     drop  kind  kind  kind
modelopt-int4-awq: ModelOpt int4, input scales
    maps  maps  maps  maps  maps  maps  maps  maps  maps  maps  =     kind  maps  kind
ct-fp8-dynamic: compressed-tensors fp8 per row
    kind  kind  kind  =     =     =     kind  =     kind  =     =     rule  pow2  kind
ct-fp8-static-tensor: compressed-tensors fp8 per tensor, stored scales
    kind  kind  kind  =     =     =     kind  drop  kind  way   =     =     pow2  kind
modelopt-fp8-pc-pt: ModelOpt fp8 per row
    kind  kind  kind  =     =     =     kind  =     kind  =     =     rule  pow2  kind
modelopt-fp8-pb-wo: ModelOpt fp8 in blocks, weights only
    kind  kind  kind  =     =     =     kind  fine  kind  gets  =     gets  pow2  kind
hf-fp8-block128: fp8 in blocks of 128 x 128
    kind  kind  kind  rule  rule  rule  kind  fine  kind  way   drop  =     pow2  kind
hf-fp8-block128-moe: fp8 in blocks, experts
    kind  kind  kind  rule  rule  rule  kind  fine  kind  way   drop  =     pow2  kind
ct-nvfp4: compressed-tensors NVFP4
    kind  kind  kind  =     =     rule  kind  fine  kind  fine  rule  fine  fine  kind
ct-nvfp4a16: compressed-tensors NVFP4, weights only
    kind  kind  kind  =     =     =     kind  fine  kind  fine  =     fine  fine  kind
ar-nvfp4: AutoRound NVFP4
    kind  kind  kind  =     =     rule  kind  fine  kind  fine  rule  fine  fine  kind
modelopt-nvfp4: ModelOpt NVFP4
    kind  kind  drop  div+  div+  rule  kind  fine  kind  fine  =     fine  fine  kind
modelopt-w4a16-nvfp4: ModelOpt NVFP4, weights only
    kind  kind  =     div   div   =     kind  fine  kind  fine  =     fine  fine  kind
quark-nvfp4: Quark NVFP4
    kind  kind  drop  div+  div+  =     kind  fine  kind  fine  rule  fine  fine  kind
ct-mxfp4: compressed-tensors MXFP4
    kind  kind  drop  rule  =     rule  kind  fine  kind  rule  drop  fine  way   kind
quark-mxfp4: Quark MXFP4
    kind  kind  drop  rule  rule  =     kind  fine  kind  rule  drop  fine  way   kind
hf-gptoss-mxfp4: MXFP4 experts (gpt-oss)
    kind  kind  model =     =     =     kind  fine  kind  gets  =     fine  gets  =
quark-mxfp6-e2m3: Quark MXFP6
    kind  kind  kind  drop  rule  =     kind  fine  kind  way   way   fine  way   kind
ct-mxfp8: compressed-tensors MXFP8
    kind  kind  kind  rule  =     rule  kind  fine  kind  rule  rule  fine  rule  kind
modelopt-mxfp8: ModelOpt MXFP8
    kind  kind  kind  rule  rule  rule  kind  fine  kind  rule  =     fine  rule  kind
msmodelslim-mxfp8: ModelSlim MXFP8
    kind  kind  kind  rule  rule  rule  kind  fine  kind  =     rule  fine  rule  kind
ct-kvfp8-w4a16: compressed-tensors W4A16, fp8 keys and values
    kv    kv    kv    kv    =     =     kv    kv    fine  kv    =     kind  kind  kind
modelopt-fp8-kvfp8: ModelOpt fp8, fp8 keys and values
    kind  kind  kind  kv    =     =     kind  kv+   kind  kv+   =     =     pow2  kind
quark-fp8-kvfp8: Quark fp8, fp8 keys before the rotary embedding, and values
    kind  kind  kind  kv    rope  =     kind  kv+   kind  kv+   rope  rope  pow2  kind
msmodelslim-w8a8-kvc8: ModelSlim W8A8, int8 keys and values
    bits  kv+   kv+   kv+   kv+   kv+   kv+   kv+   kv+   =     kv+   kind  kind  kind
ct-spinquant-r1r2r4-w4a16: compressed-tensors, rotations at run time
    maps  maps  maps  maps  maps  maps  maps  maps  maps  maps  maps  kind  maps  kind
"""
"""Two lines a row: source and what it holds; cells in the order of TARGETS."""

OPTIONS = (
    ("gguf-llama-q4_k_m", "compressed_tensors", {"zero_points": "float"}, "quot"),
    ("gguf-moe-q4_k_m", "compressed_tensors", {"zero_points": "float"}, "quot"),
    ("hqq-4bit-g64", "compressed_tensors", {"zero_points": "float"}, "mid"),
    ("gptqmodel-awq-gemm-g128", "compressed_tensors", {"zero_points": "float"}, "="),
    ("gptqmodel-awq-gemm-g128", "gguf", {"type": "q8_0"}, "="),
)
"""Cells that an option of the target changes: source, target, options, key of ``CELLS``."""


def rows() -> tuple[Row, ...]:
    """``ROWS``, read."""
    lines = ROWS.strip().splitlines()
    out = []
    for head, cells in zip(lines[::2], lines[1::2], strict=True):
        source, _, text = head.partition(": ")
        keys = dict(zip(TARGETS, cells.split(), strict=True))
        out.append(Row(source=source, text=text, cells=keys))
    return tuple(out)
