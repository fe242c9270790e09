"""The kernels of this package behind core's contract; torch is imported where it is needed.

torch_dequant       any weight in tiles16: dequantize, then F.linear or grouped_mm
torch_scaled_mm     fp8 W8A8, scales per row or tensor
torch_scaled_mm_block  fp8 W8A8 in blocks of 128 x 128
torch_int_mm        int8 W8A8
torch_grouped_fp8   stacks of fp8 experts

All but the first keep the reference kernel's own row-major buffers (layout "rows").
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.storage import Rows, Tiles16
from quant_core.spec import OpSpec
from quant_core.spec_json import to_text
from quant_kernels_torch.accept import (
    at_rows,
    block_fp8_problem,
    common_problem,
    fp8_problem,
    int8_problem,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KERNELS", "BlockFp8", "Dequant", "Fp8", "GroupedFp8", "Int8"]

_SIDE = ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")


def _on(op: OpSpec, devices: tuple[str, ...]) -> Rejected | None:
    if op.device[0] in devices:
        return None
    return Rejected(axis="device", have=op.device[0], need=" or ".join(devices))


def _capability(op: OpSpec, least: tuple[int, int]) -> Rejected | None:
    """A CUDA device must be new enough; "" means that none was looked at."""
    if op.device[0] != "cuda" or not op.device[1]:
        return None
    major, minor = (int(p) for p in op.device[1].split("."))
    if (major, minor) >= least:
        return None
    need = f"capability {least[0]}.{least[1]} or newer"
    return Rejected(axis="device", have=f"capability {op.device[1]}", need=need)


class Dequant(Tiles16):
    """The whole weight dequantized on every call, then a plain product; for many rows."""

    name = "torch_dequant"
    OPS: tuple[str, ...] = ("linear", "grouped_linear", "embedding")
    DEVICES: tuple[str, ...] = ("cuda",)

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        from quant_core.kernels import tiles
        from quant_core.kernels.activations import unsupported_input

        if op.op not in self.OPS:
            return Rejected(axis="op", have=op.op, need=" or ".join(self.OPS))
        if bad := _on(op, self.DEVICES) or tiles.problem(op) or unsupported_input(op):
            return bad
        if op.op == "grouped_linear" and op.act_dtype != "bfloat16":
            return Rejected(axis="act_dtype", have=op.act_dtype, need="bfloat16 (grouped_mm)")
        if op.op == "embedding":
            if any(s.grain[0] > 1 for s in op.weight.scales):
                return Rejected(axis="scales", have=op.weight.label, need="scales of single rows")
            if op.weight.gather:
                return Rejected(axis="gather", have="reordered columns", need="columns in order")
            return Accepted(cost=200.0, note="dequantizes the tiles of the rows asked for")
        weights = op.size("n") * op.size("k_stored", op.size("k"))
        experts = op.size("experts", 0)
        acts = op.operand("input")
        emulated = "" if acts is None else f"; {acts.element.name} activations are emulated"
        return Accepted(
            workspace_bytes=min(2 * weights * max(experts, 1), (1 << 30) + 2 * weights)
            + 12 * min(weights, 16 << 20),
            # about 60 bytes move per weight: codes to bytes, to float32, scaled, rounded
            costs=at_rows(
                60.0 * weights * max(experts, 1),
                2.0 * weights,
                fixed_us=30.0,
                gbs=2500.0,
                tflops=200.0,  # as the packages that share the tiles estimate
                first=True,
            ),
            note=f"dequantizes the whole weight on every call{emulated}",
        )

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        from quant_kernels_torch import dense

        runs: dict[str, Callable[..., Tensor]] = {
            "linear": dense.run_tiles_linear,
            "grouped_linear": dense.run_tiles_grouped,
            "embedding": dense.run_tiles_embedding,
        }
        return functools.partial(runs[op.op], to_text(op))


class _Products(Rows, ABC):
    """One of torch's products on rows of 8-bit codes."""

    name: str
    OPS: tuple[str, ...] = ("linear",)
    DEVICES: tuple[str, ...] = ("cuda", "cpu")
    FEATURES: tuple[str, ...] = ("bias", "input_scale")

    def _problem(self, op: OpSpec) -> Rejected | None:
        bad = common_problem(op, self.OPS, self.FEATURES) or _on(op, self.DEVICES)
        return bad or self._own_problem(op)

    @abstractmethod
    def _own_problem(self, op: OpSpec) -> Rejected | None:
        """What this product in particular cannot run."""

    @abstractmethod
    def _runner(self) -> Callable[..., Tensor]:
        """The function that multiplies."""

    def _rates(self, op: OpSpec) -> dict[str, Any]:
        # 14 bytes an element of x: largest magnitude, division, rounding
        return {
            "fixed_us": 40.0,
            "gbs": 2200.0,
            "tflops": 1100.0,
            "bytes_per_row": 14.0 * op.size("k"),
        }

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if bad := self._problem(op):
            return bad
        weights = op.size("n") * op.size("k")
        costs = at_rows(weights, 2.0 * weights, **self._rates(op))
        note = "activations quantized by separate torch ops"
        return Accepted(cost=costs[0][1], costs=costs, note=note)

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        return functools.partial(self._runner(), to_text(op))


class Fp8(_Products):
    """fp8 weights times fp8 activations, scales per row, token or tensor."""

    name = "torch_scaled_mm"
    DEVICES = ("cuda",)

    def _own_problem(self, op: OpSpec) -> Rejected | None:
        return fp8_problem(op) or _capability(op, (8, 9))

    def _runner(self) -> Callable[..., Tensor]:
        from quant_kernels_torch.products import run_fp8

        return run_fp8


class BlockFp8(_Products):
    """fp8 weights in blocks of 128 x 128 times fp8 activations in groups of 128."""

    name = "torch_scaled_mm_block"
    DEVICES = ("cuda",)
    FEATURES = ("bias",)

    def _own_problem(self, op: OpSpec) -> Rejected | None:
        import torch.nn.functional as F

        if not hasattr(F, "ScalingType"):
            have = "a torch without it"
            return Rejected(axis="library", have=have, need="torch.nn.functional.scaled_mm (2.10)")
        if op.act_dtype != "bfloat16":
            return Rejected(axis="act_dtype", have=op.act_dtype, need="bfloat16")
        return block_fp8_problem(op) or _capability(op, (9, 0))

    def _runner(self) -> Callable[..., Tensor]:
        from quant_kernels_torch.products import run_block_fp8

        return run_block_fp8


class Int8(_Products):
    """int8 weights times int8 activations; exact integer sums."""

    name = "torch_int_mm"
    FEATURES = _SIDE

    def _own_problem(self, op: OpSpec) -> Rejected | None:
        return int8_problem(op) or _capability(op, (8, 0))

    def _rates(self, op: OpSpec) -> dict[str, Any]:
        moved = 22.0 * op.size("k") + 24.0 * op.size("n")  # rounding x, scaling the sums
        if op.device[0] == "cuda":
            return {"fixed_us": 50.0, "gbs": 2200.0, "tflops": 800.0, "bytes_per_row": moved}
        return {"fixed_us": 60.0, "gbs": 15.0, "tflops": 0.5, "bytes_per_row": moved}

    def _runner(self) -> Callable[..., Tensor]:
        from quant_kernels_torch.products import run_int8

        return run_int8


class GroupedFp8(_Products):
    """Stacks of fp8 experts with a scale per row, activations per token."""

    name = "torch_grouped_fp8"
    OPS = ("grouped_linear",)
    DEVICES = ("cuda",)
    FEATURES = ("bias",)

    def _own_problem(self, op: OpSpec) -> Rejected | None:
        if op.act_dtype != "bfloat16":
            return Rejected(axis="act_dtype", have=op.act_dtype, need="bfloat16")
        if bad := fp8_problem(op) or _capability(op, (9, 0)):
            return bad
        acts = op.operand("input")
        assert acts is not None, "fp8_problem has seen to it"
        if acts.scales[0].grain != (1, 0):
            return Rejected(axis="input", have=acts.label, need="a run-time scale per token")
        return None

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if bad := self._problem(op):
            return bad
        n, k, experts = op.size("n"), op.size("k"), op.size("experts")
        # rows are picked, rounded and put back by torch's own ops, in passes over x and y
        moved, costs = 16.0 * k + 10.0 * n, []
        for m, _ in at_rows(0.0, 0.0, fixed_us=0.0, gbs=1.0, tflops=1.0):
            rows = min(m, 8192)
            read = min(rows, experts) * n * k / 2.65e6
            us = 60.0 + max(read, rows * 2.0 * n * k / 960e6) + rows * moved / 2.2e6
            costs.append((m, math.ceil(us * 10) / 10))
        note = "activations quantized by separate torch ops"
        return Accepted(cost=costs[0][1], costs=tuple(costs), note=note)

    def _runner(self) -> Callable[..., Tensor]:
        from quant_kernels_torch.products import run_fp8_grouped

        return run_fp8_grouped


KERNELS: tuple[Kernel, ...] = (Dequant(), Fp8(), BlockFp8(), Int8(), GroupedFp8())
