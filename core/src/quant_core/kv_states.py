"""Keys and values rounded as a quantized cache would hold them: plain torch, once for all formats.

The stored scales go to a ``QuantCache``, which an engine hangs below each attention module. Nothing
is kept in few bits: states are rounded to codes and back in float32, to the values that attention
would read from a quantized cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_core.errors import LayoutError
from quant_core.kernels.activations import fake_quantize
from quant_core.kernels.device import device_key
from quant_core.kernels.failed import Whose
from quant_core.kernels.quantizer import cheapest
from quant_core.nn import moved
from quant_core.registry import registry
from quant_core.spec import TENSOR, LayerDesc, OpSpec, QuantSpec
from quant_core.spec_json import from_text, to_text
from quant_core.tensors import LayerTensors, QuantizedTensor

if TYPE_CHECKING:
    from quant_core.kv_cache import CacheScheme

__all__ = ["QuantCache", "canonicalize", "serialize"]

_lib = torch.library.Library("quant_core", "FRAGMENT")
_lib.define("round_states(Tensor x, Tensor scale, Tensor? zero, str spec) -> Tensor")


@functools.cache
def _spec(text: str) -> QuantSpec:
    spec: QuantSpec = from_text(text)
    return spec


@functools.cache
def _rounds(
    text: str, features: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[..., Tensor], Whose]:
    """The kernel that rounds states on ``device``, bound; an operation "quantize"."""
    spec = _spec(text)
    stored = {"input_scale"} | ({"input_zero"} if spec.zero is not None else set())
    asked = OpSpec(
        op="quantize",
        operands=(("input", spec),),
        sizes=(("k", features),),
        act_dtype=str(dtype).removeprefix("torch."),
        device=device_key(str(device)),
        features=frozenset(stored),
    )
    kernel, op, _ = cheapest(asked, registry())
    whose = Whose(kernel=kernel, op=op)
    with whose.bound():
        return kernel.bind(op), whose


def _round_states(x: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Tensor:
    """x [T, features] rounded to the codes of ``spec`` and back; an op, so that graphs stay one."""
    if not x.numel():
        return x.clone()
    if x.is_cpu:
        return fake_quantize(x, _spec(spec), scale, zero)
    run, whose = _rounds(spec, x.shape[-1], x.dtype, x.device)
    try:
        return run([], x, scale, zero)
    except Exception as err:
        whose.failed(err, x)
        raise


_lib.impl("round_states", _round_states, "CompositeExplicitAutograd")
torch.library.register_fake(
    "quant_core::round_states", lambda x, scale, zero, spec: torch.empty_like(x), lib=_lib
)


def _check_positive(scheme: CacheScheme, stored: str, scale: Tensor) -> None:
    bad = ~(torch.isfinite(scale.float()) & (scale.float() > 0))
    if bool(bad.any()):
        found = scale.flatten()[int(bad.flatten().nonzero()[0])].item()
        raise LayoutError(
            f"{stored}: {int(bad.sum())} of {bad.numel()} scales are not positive (first: {found}),"
            " expected finite numbers above 0. Calibrate the cache and export again, or load with "
            "kv_cache='float'.",
            code="Q-VALUE-SCALE",
            tensor=stored,
            expected="finite, > 0",
            actual=found,
            plugin=scheme.plugin,
        )


def canonicalize(scheme: CacheScheme, tensors: Mapping[str, Tensor]) -> LayerTensors:
    """Stored scales to operands of no rows: scales and zero points are [1, 1] or [1, features].

    Raises:
        LayoutError: ``Q-VALUE-SCALE`` for a scale that is zero, negative, infinite or NaN.
    """
    operands = {}
    for role, spec in scheme.operands.items():
        stored = {t.what: t.stored for t in scheme.tensors if t.role == role}
        scale, zero = tensors[f"{role}_scale"].reshape(1, -1), tensors.get(f"{role}_zero")
        _check_positive(scheme, stored["scale"], scale)
        if zero is not None and not zero.is_floating_point():
            zero = zero.view(torch.uint8)
        operands[role] = QuantizedTensor(
            spec=spec,
            shape=(0, scale.shape[1]),
            codes=torch.empty((0, scale.shape[1]), dtype=torch.uint8),
            scales=(scale,),
            zeros=None if zero is None else zero.reshape(1, -1),
        )
    return LayerTensors(operands=operands)


def serialize(scheme: CacheScheme, tensors: LayerTensors) -> dict[str, Tensor]:
    """Exact inverse of ``canonicalize``."""
    out = {}
    for t in scheme.tensors:
        operand = tensors.operands[t.role]
        value = operand.scales[0] if t.what == "scale" else operand.zeros
        assert value is not None, "canonicalize keeps what is stored"
        out[t.name] = value.view(getattr(torch, t.dtype)).reshape(t.shape)
    return out


class QuantCache(nn.Module):
    """The scales of one attention module, and the rounding by them.

    Attributes:
        layer, scheme: the member of the checkpoint.
        attention: name of an attention implementation -> its function, for engines that need it.
    """

    def __init__(self, layer: LayerDesc, scheme: CacheScheme, tensors: LayerTensors) -> None:
        super().__init__()
        self.layer, self.scheme = layer, scheme
        self.attention: dict[str, Callable[..., Any]] = {}
        self._specs = dict(scheme.operands)
        self._texts = {role: to_text(spec) for role, spec in scheme.operands.items()}
        for role, operand in tensors.operands.items():
            self.register_buffer(f"{role}_scale", operand.scales[0])
            self.register_buffer(f"{role}_zero", operand.zeros)

    def rounded(self, role: str, x: Tensor) -> Tensor:
        """``x`` [..., features] as a quantized cache would give it back; others pass unchanged.

        Gradients pass as if nothing were rounded.
        """
        text = self._texts.get(role)
        if text is None:
            return x
        scale, zero = getattr(self, f"{role}_scale"), getattr(self, f"{role}_zero")
        flat = x.detach().reshape(-1, x.shape[-1])
        y: Tensor = torch.ops.quant_core.round_states(flat, scale, zero, text).view(x.shape)
        if x.requires_grad and torch.is_grad_enabled():
            return x + (y - x).detach()
        return y

    def rounded_heads(self, role: str, x: Tensor) -> Tensor:
        """The same for ``x`` [batch, heads, tokens, head_dim]."""
        spec = self._specs.get(role)
        if spec is None or spec.scales[0].grain == TENSOR:
            return self.rounded(role, x)
        rows = x.transpose(1, 2)
        return self.rounded(role, rows.flatten(2)).view(rows.shape).transpose(1, 2)

    def restore(self) -> LayerTensors:
        """Canonical tensors, bit for bit."""
        operands = {
            role: QuantizedTensor(
                spec=spec,
                shape=(0, getattr(self, f"{role}_scale").shape[1]),
                codes=torch.empty((0, getattr(self, f"{role}_scale").shape[1]), dtype=torch.uint8),
                scales=(getattr(self, f"{role}_scale"),),
                zeros=getattr(self, f"{role}_zero"),
            )
            for role, spec in self._specs.items()
        }
        return LayerTensors(operands=operands)

    def stored(self) -> dict[str, Tensor]:
        """Stored name -> tensor, on the CPU."""
        values = self.scheme.serialize(replace(self.layer), self.restore())
        return {t.stored: values[t.name].cpu() for t in self.scheme.tensors}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantCache:
        """Move, never cast."""
        for name, value in self._buffers.items():
            if value is not None:
                self._buffers[name] = moved(fn, value)
        return self

    def extra_repr(self) -> str:
        specs = ", ".join(f"{role}: {spec.label}" for role, spec in self._specs.items())
        return f"{specs}, site={self.scheme.site}"
