"""Layers that torchao stored, and small checkpoints made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from quant_core.plan import plan
from quant_core.registry import load_registry

torch.set_num_threads(1)
DATA = Path(__file__).parent / "data"
CASES = sorted(p.stem for p in DATA.glob("*.safetensors"))
NAME = "model.layers.0.mlp.up_proj"


def case(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Stored tensors by leaf, the header's entry, and what torchao computed."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        entry = json.loads(file.metadata()["up_proj.weight"])
    stored = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("up_proj.")}
    expected = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("expected.")}
    return stored, entry, expected


def header(entries: Mapping[str, Any]) -> dict[str, str]:
    """Header metadata of weights stored at these module paths."""
    out = {f"{path}.weight": json.dumps(entry) for path, entry in entries.items()}
    return out | {"tensor_names": json.dumps(list(out)), "format": "pt"}


def block(recipe: str = "", **keys: Any) -> dict[str, Any]:
    """A quantization_config."""
    kind = {"_type": recipe, "_version": 2, "_data": {}} if recipe else None
    return {
        "quant_method": "torchao",
        "quant_type": {"default": kind} if kind else None,
        "modules_to_not_convert": None,
        **keys,
    }


def named(stored: Mapping[str, Tensor], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": t for leaf, t in stored.items()}


_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["torchao"]))
    return plan(checkpoint, registry=_registry[0])


@pytest.fixture(scope="session")
def ao() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        NAME=NAME, case=case, header=header, block=block, named=named, plan=plan_of
    )


@pytest.fixture(params=CASES)
def stored_case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """One layer of ``data`` after the other."""
    stored, entry, expected = case(request.param)
    return SimpleNamespace(name=request.param, stored=stored, entry=entry, expected=expected)


@pytest.fixture
def write(write: Callable[..., Any]) -> Callable[..., Any]:
    """``write(tensors, metadata, config)``: ``metadata`` is that of the safetensors header."""

    def make(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Any) -> Any:
        return write(tensors, config, metadata=metadata)

    return make
