"""Checks of stored values; each error names tensor, count and what is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_core.errors import ConfigError, LayoutError

if TYPE_CHECKING:
    from quant_plugin_quark.scheme import QuarkScheme

__all__ = ["bad_tensor", "byte_codes", "check_finite", "check_null"]


def bad_tensor(code: str, tensor: str, found: str, expected: str, fix: str) -> LayoutError:
    return LayoutError(
        f"{tensor}: {found}, expected {expected}. {fix}",
        code=code,
        tensor=tensor,
        expected=expected,
        actual=found,
        plugin="quark",
    )


def check_finite(tensor: str, scale: Tensor) -> None:
    """No NaN and no infinity; bytes are e8m0 exponents.

    Raises:
        LayoutError: ``Q-VALUE-SCALE`` with the count and the first index.
    """
    bad = scale == 255 if scale.dtype == torch.uint8 else ~torch.isfinite(scale.float())
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        found = f"{int(bad.sum())} of {bad.numel()} scales are not finite (first at {first})"
        fix = "The quantization overflowed; quantize again."
        raise bad_tensor("Q-VALUE-SCALE", tensor, found, "finite scales", fix)


def check_null(scheme: QuarkScheme, tensor: str, values: Tensor) -> None:
    """All zero points are 0.

    Raises:
        ConfigError: ``Q-CFG-CONFLICT``; the config says symmetric.
    """
    count = int(values.count_nonzero())
    if count:
        raise ConfigError(
            f"{tensor}: {count} of {values.numel()} values are not 0, expected zeros only because "
            f"{scheme.source} says symmetric. Set symmetric to false if the zero points count.",
            code="Q-CFG-CONFLICT",
            path=scheme.source,
            tensor=tensor,
            expected=0,
            actual=count,
            plugin="quark",
        )


def byte_codes(values: Tensor, tensor: str, element: str) -> Tensor:
    """Zero points of one value each as raw codes in uint8.

    Raises:
        LayoutError: ``Q-VALUE-CODE`` outside the range of ``element``.
    """
    low, high = (-128, 127) if element == "int8" else (0, 255)
    if values.dtype == torch.int32:
        bad = (values < low) | (values > high)
        if bool(bad.any()):
            found = f"{int(bad.sum())} of {bad.numel()} zero points are out of range"
            fix = "The tensor is damaged; export the checkpoint again."
            raise bad_tensor("Q-VALUE-CODE", tensor, found, f"{low} to {high}", fix)
        values = values.to(torch.int8 if low else torch.uint8)
    return values.view(torch.uint8)
