"""Config blocks as the tool writes them, and small checkpoints on disk."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_core.plan import plan
from quant_core.registry import load_registry

torch.set_num_threads(1)

NAME = "model.layers.0.mlp.up_proj"


def spec(dtype: str, qscheme: str = "per_tensor", **keys: Any) -> dict[str, Any]:
    """One quantization of one operand, all keys spelled out."""
    return {
        "block_size": None, "ch_axis": None, "dtype": dtype, "enable_buffer_reuse": False,
        "group_size": None, "is_dynamic": False, "is_scale_quant": False,
        "max_input_numel": 4194304, "mx_element_dtype": None, "observer_cls": "AnyObserver",
        "qscheme": qscheme, "round_method": "half_even", "scale_calculation_mode": None,
        "scale_format": None, "scale_type": "float", "symmetric": True,
        "zero_point_type": "int32", **keys,
    }  # fmt: skip


def grouped(dtype: str, size: int, **keys: Any) -> dict[str, Any]:
    return spec(dtype, "per_group", group_size=size, ch_axis=-1, **keys)


def mx(dtype: str, **keys: Any) -> dict[str, Any]:
    return grouped(dtype, 32, scale_format="e8m0", symmetric=None, **keys)


def nvfp4(dynamic: bool = False) -> list[dict[str, Any]]:
    codes = grouped("fp4", 16, scale_format="float32", symmetric=None, is_dynamic=dynamic)
    return [codes, spec("fp8_e4m3", is_scale_quant=True)]


INT4_FP8 = [spec("fp8_e4m3"), spec("int4", "per_channel", ch_axis=0)]


def args(weight: Any, inputs: Any = None, **keys: Any) -> dict[str, Any]:
    """One layer's arguments."""
    return {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None,
            "target_device": None, **keys}  # fmt: skip


def block(weight: Any, inputs: Any = None, pack: str = "reorder", **keys: Any) -> dict[str, Any]:
    """A quantization_config with global arguments."""
    export = {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": pack,
              "weight_format": "real_quantized", "weight_merge_groups": None}  # fmt: skip
    return {
        "quant_method": "quark", "version": "0.13", "quant_mode": "eager_mode",
        "global_quant_config": args(weight, inputs), "layer_quant_config": {},
        "layer_type_quant_config": {}, "exclude": ["lm_head"], "algo_config": None,
        "kv_cache_quant_config": {}, "kv_cache_post_rope": False, "softmax_quant_spec": None,
        "export": export, **keys,
    }  # fmt: skip


def named(stored: Mapping[str, Tensor], module: str = NAME) -> dict[str, Tensor]:
    return {f"{module}.{leaf}": t for leaf, t in stored.items()}


def mxfp4_layer(n: int = 16, k: int = 64, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randint(0, 256, (n, k // 2), generator=rng, dtype=torch.uint8),
        "weight_scale": torch.randint(118, 128, (n, k // 32), generator=rng, dtype=torch.uint8),
    }


def int8_layer(n: int = 16, k: int = 64, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randint(-128, 128, (n, k), generator=rng, dtype=torch.int8),
        "weight_scale": torch.rand((), generator=rng) * 0.01 + 0.001,
        "weight_zero_point": torch.zeros((), dtype=torch.int8),
        "input_scale": torch.rand((), generator=rng) * 0.1 + 0.01,
        "input_zero_point": torch.zeros((), dtype=torch.int8),
    }


_registry: list[Any] = []


def plan_of(checkpoint: Any) -> Any:
    """Planned with this plugin alone."""
    if not _registry:
        _registry.append(load_registry(only=["quark"]))
    return plan(checkpoint, registry=_registry[0])


@pytest.fixture(scope="session")
def qk() -> SimpleNamespace:
    """The helpers above."""
    return SimpleNamespace(
        INT4_FP8=INT4_FP8, NAME=NAME, args=args, block=block, grouped=grouped,
        int8_layer=int8_layer, mx=mx, mxfp4_layer=mxfp4_layer, named=named, nvfp4=nvfp4,
        plan=plan_of, spec=spec,
    )  # fmt: skip
