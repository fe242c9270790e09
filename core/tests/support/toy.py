"""A small format of its own for core's tests: int8 rows with one float16 scale each.

Stored per layer: ``q`` int8 [N, K], ``s`` float16 [N], optionally ``b`` float16 [N] (a cohort).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from quant_core.checkpoint.base import Checkpoint
from quant_core.hookspecs import hookimpl
from quant_core.registry import Registry, _Candidate, load_registry
from quant_core.scheme import Scheme
from quant_core.spec import (
    CHANNEL,
    PLUGIN_API,
    Element,
    FormatMatch,
    LayerDesc,
    ParamSpec,
    PluginInfo,
    QuantSpec,
    Scale,
    TensorInfo,
    Unquantized,
)
from quant_core.tensors import LayerTensors, QuantizedTensor

SPEC = QuantSpec(element=Element.int(8), scales=(Scale(element="f16", grain=CHANNEL),))


class MemoryCheckpoint(Checkpoint):
    """Tensors held in a dict."""

    container = "memory"

    def __init__(self, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
        self.path = self.folder = Path("memory")
        self.data = dict(tensors)
        self.config, self.metadata, self.warnings = config, {}, []
        self.tensors = {
            name: TensorInfo(
                name=name,
                dtype=str(t.dtype).removeprefix("torch."),
                shape=tuple(t.shape),
                file="memory",
                offset=0,
                nbytes=t.numel() * t.element_size(),
            )
            for name, t in self.data.items()
        }

    def read(self, name: str, index: tuple[Any, ...] = ()) -> torch.Tensor:
        t = self.data[name]
        for axis_index in reversed(index):
            t = t[axis_index if isinstance(axis_index, int) else slice(*axis_index)]
        return t.clone()


@dataclass(frozen=True, kw_only=True)
class ToyScheme(Scheme):
    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        n, k = self.shape
        return (
            ParamSpec(name="q", shape=(n, k), dtypes=("int8",)),
            ParamSpec(name="s", shape=(n,), dtypes=("float16",)),
            ParamSpec(name="b", shape=(n,), dtypes=("float16",), need="cohort"),
        )

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, torch.Tensor]) -> LayerTensors:
        qt = QuantizedTensor(
            spec=SPEC,
            shape=self.shape,
            codes=tensors["q"].view(torch.uint8),
            scales=(tensors["s"].view(-1, 1),),
        )
        return LayerTensors(operands={"weight": qt}, bias=tensors.get("b"))

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, torch.Tensor]:
        out = {
            "q": tensors.weight.codes.view(torch.int8),
            "s": tensors.weight.scales[0].view(-1),
        }
        return out if tensors.bias is None else out | {"b": tensors.bias}


def toy_module(name: str = "toy", **hooks: Any) -> ModuleType:
    """The toy plugin as a module; ``hooks`` replace or add functions."""
    module = ModuleType(f"plugin_{name}")

    def plugin_info() -> PluginInfo:
        return PluginInfo(id=name, api=PLUGIN_API, quant_methods=(name,))

    def detect_format(checkpoint: Checkpoint) -> FormatMatch | None:
        block = checkpoint.config.get("quantization_config", {})
        if block.get("quant_method") != name:
            return None
        return FormatMatch(plugin=name, level="declared", evidence=f"quant_method={name}")

    def make_scheme(
        match: FormatMatch, layer: LayerDesc, checkpoint: Checkpoint
    ) -> Scheme | Unquantized:
        stored = layer.stored
        if layer.experts:
            stored = stored.format(expert=layer.experts[0])
        leaves = checkpoint.modules[stored]
        if not {"q", "s"} & set(leaves):
            return Unquantized(rule="no packed tensor stored", evidence=stored)
        n, k = leaves["q"].shape if "q" in leaves else (leaves["s"].shape[0], 0)
        return ToyScheme(name="w8a16", shape=(n, k), operands={"weight": SPEC})

    for hook in (plugin_info, detect_format, make_scheme):
        setattr(module, hook.__name__, hookimpl(hook))
    for hook_name, fn in hooks.items():
        setattr(module, hook_name, hookimpl(fn) if callable(fn) else fn)
    return module


def candidate(module: ModuleType | Exception | type, name: str = "toy", dist: str = "") -> Any:
    def load() -> ModuleType:
        if isinstance(module, ModuleType):
            return module
        raise module

    return _Candidate(name, dist or f"quant-plugin-{name}", "1.0", f"plugin_{name}", load)


def toy_registry(*modules: ModuleType) -> Registry:
    return load_registry([candidate(m, m.plugin_info().id) for m in modules or (toy_module(),)])


def toy_layer(n: int, k: int, *, bias: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {
        "q": torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g),
        "s": torch.rand(n, generator=g).add(0.01).half(),
    }
    return out | {"b": torch.randn(n, generator=g).half()} if bias else out


def toy_checkpoint(
    layers: Mapping[str, Mapping[str, torch.Tensor]],
    dense: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> MemoryCheckpoint:
    tensors = {f"{m}.{leaf}": t for m, leaves in layers.items() for leaf, t in leaves.items()}
    return MemoryCheckpoint(tensors | dict(dense), {"quantization_config": {"quant_method": "toy"}})
