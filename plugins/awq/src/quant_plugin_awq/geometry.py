"""Shapes of the stored tensors of one layer, for each layout; plain integers, no torch.

              qweight            zeros                  scales
    gemm      [K, N*b/32] i32    [K/g, N*b/32] i32      [K/g, N]
    gemv      [N, K/8] i32       [N, GP/8] i32          [N, GP]
    gemv_fast [N/4, K] i16       [GP, N] float          [GP, N]
    llm-awq   as gemv_fast; its zeros are named scaled_zeros

GP is the number of groups K/g padded for the kernels' loads, see ``padded_groups``.
Source: AutoAWQ 0.2.9 ``awq/modules/linear/{gemm,gemv,gemv_fast}.py``.
"""

from __future__ import annotations

__all__ = ["TILED", "padded_groups", "stored_shapes"]

TILED = ("gemv_fast", "llm-awq")  # int16 tiles, float zeros


def padded_groups(in_features: int, group_size: int) -> int:
    """Width of padded zeros and scales: a multiple of 8 (g >= 128), 16 (g = 64) or 32 (g = 32).

    0 if the layout is not defined for ``group_size``.
    """
    multiple = 8 if group_size >= 128 else {64: 16, 32: 32}.get(group_size, 0)
    groups = in_features // group_size
    return -(-groups // multiple) * multiple if multiple else 0


def stored_shapes(layout: str, bits: int, n: int, k: int, g: int) -> dict[str, tuple[int, int]]:
    """Expected shapes of "qweight", "zeros" and "scales" for a layer of N x K with groups of g."""
    if layout == "gemm":
        words = -(-n * bits // 32)
        return {"qweight": (k, words), "zeros": (k // g, words), "scales": (k // g, n)}
    width = padded_groups(k, g)
    if layout == "gemv":
        return {"qweight": (n, k // 8), "zeros": (n, width // 8), "scales": (n, width)}
    return {"qweight": (n // 4, k), "zeros": (width, n), "scales": (width, n)}
