"""MXFP8 from float weights while they are loaded: nothing has to be measured. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_core.online import OnlineScheme
from quant_core.spec import LayerDesc
from quant_plugin_mxfp8.scheme import Mxfp8Scheme

__all__ = ["ONLINE"]


def _make(layer: LayerDesc, options: Mapping[str, Any]) -> Mxfp8Scheme:
    assert layer.out_features is not None
    assert layer.in_features is not None
    return Mxfp8Scheme.of((layer.out_features, layer.in_features))


ONLINE: Mapping[str, OnlineScheme] = {
    "mxfp8": OnlineScheme(summary="MXFP8 weights and activations", make=_make),
}
