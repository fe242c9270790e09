"""The config block of a plan and the entries of the header, as TorchAO writes them.

A plan that was read from a file keeps its block, and saving keeps its header. Any other is
described anew: one recipe for all layers, one entry in the header for every parameter.

Source: torchao 0.18.0 ``core/config.py`` (config_to_dict), ``prototype/safetensors/
safetensors_support.py`` (flatten_tensor_state_dict): what they write for each recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quant_core.describe import Extras, float_matrices, one_value, schemes_of
from quant_core.spec import CHANNEL, QuantSpec
from quant_plugin_torchao.config import TorchaoConfig
from quant_plugin_torchao.scheme import TorchaoScheme

__all__ = ["config_for", "extras_for"]


def _tagged(kind: str, data: Any, version: int = 0) -> dict[str, Any]:
    return {"_type": kind, **({"_version": version} if version else {}), "_data": data}


def _dtype(name: str) -> dict[str, Any]:
    return _tagged("torch.dtype", name)


_PER_ROW = _tagged("PerRow", {"dim": -1})
_KERNEL = _tagged("KernelPreference", "AUTO")


# ---------------------------------------------------------------------------------- the recipe


def _rows(dim: Mapping[str, Any] = _PER_ROW) -> dict[str, Any]:
    return {"_type": dim["_type"], "_version": 1, "_data": dim["_data"]}


def _recipe(scheme: TorchaoScheme) -> dict[str, Any]:
    """The recipe that makes such weights."""
    entry, dynamic = scheme.entry, scheme.entry.inputs is not None
    if entry.kind == "Int8Tensor":
        data: dict[str, Any] = {"granularity": _rows(), "set_inductor_config": True}
        if not dynamic:
            return _tagged("Int8WeightOnlyConfig", {"group_size": None, **data}, 2)
        data["act_mapping_type"] = _mapping(entry.inputs)
        data |= {"weight_only_decode": False, "reduce_range": False}
        return _tagged("Int8DynamicActivationInt8WeightConfig", data, 2)
    if entry.kind == "Float8Tensor":
        data = {"weight_dtype": _dtype(scheme.code_dtype), "set_inductor_config": True}
        if not dynamic:
            data["granularity"] = _rows()
            return _tagged("Float8WeightOnlyConfig", data, 2)
        data |= {
            "activation_dtype": _dtype(scheme.code_dtype),
            "granularity": [_rows(), _rows()],
            "packing_format": _tagged("Float8PackingFormat", "PLAIN"),
            "activation_value_lb": None,
            "activation_value_ub": None,
            "kernel_preference": _KERNEL,
        }
        return _tagged("Float8DynamicActivationFloat8WeightConfig", data, 2)
    return _intx(scheme, dynamic)


def _mapping(inputs: QuantSpec | None) -> dict[str, Any]:
    asymmetric = inputs is not None and inputs.zero is not None
    return _tagged("MappingType", "ASYMMETRIC" if asymmetric else "SYMMETRIC")


def _intx(scheme: TorchaoScheme, dynamic: bool) -> dict[str, Any]:
    grain = scheme.weight.scales[0].grain
    group = _tagged("PerGroup", {"group_size": grain[1]}, 1)
    prefix = "weight_" if dynamic else ""
    zero = scheme.weight.zero
    asymmetric = zero is not None and zero.kind == "code"
    data: dict[str, Any] = {
        "weight_dtype": _dtype(f"int{scheme.entry.bits}"),
        f"{prefix}granularity": _tagged("PerAxis", {"axis": 0}, 1) if grain == CHANNEL else group,
        f"{prefix}mapping_type": _tagged(
            "MappingType", "ASYMMETRIC" if asymmetric else "SYMMETRIC"
        ),
        f"{prefix}scale_dtype": None,
        "intx_packing_format": _tagged("IntxPackingFormat", "UNPACKED_TO_INT8"),
        "intx_choose_qparams_algorithm": _tagged("IntxChooseQParamsAlgorithm", "AFFINE"),
    }
    if not dynamic:
        return _tagged("IntxWeightOnlyConfig", data, 2)
    data["act_mapping_type"] = _mapping(scheme.entry.inputs)
    return _tagged("Int8DynamicActivationIntxWeightConfig", data, 2)


def config_for(plan: Any) -> dict[str, Any]:
    """``quantization_config`` for ``plan``; the block it was read from, if there is one.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for layers of several recipes, or none.
    """
    config = plan.match.config if plan.match is not None else None
    if isinstance(config, TorchaoConfig) and config.stored:
        stored: dict[str, Any] = json.loads(config.stored)
        return stored
    schemes = schemes_of(plan, TorchaoScheme)
    recipes = {n: _recipe(s) for n, s in schemes.items()}
    one_value({_kind(r) for r in recipes.values()}, "recipe", plugin="torchao")
    return {
        "quant_method": "torchao",
        "quant_type": {"default": next(iter(recipes.values()))},
        "modules_to_not_convert": float_matrices(plan) or None,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _kind(recipe: Mapping[str, Any]) -> tuple[str, str]:
    """What the reader compares with every weight."""
    dtype = recipe["_data"].get("weight_dtype") or {}
    return recipe["_type"], str(dtype.get("_data", ""))


# ---------------------------------------------------------------------------------- the header


def _entry(scheme: TorchaoScheme, dtype: str) -> dict[str, Any]:
    """What the header says of one weight."""
    entry, inputs = scheme.entry, scheme.entry.inputs
    data: dict[str, Any] = {"block_size": list(entry.block), "dtype": _dtype(dtype)}
    if entry.kind == "IntxUnpackedToInt8Tensor":
        data["target_dtype"] = _dtype(f"int{entry.bits}")
        data["activation_quantization"] = None if inputs is None else "int8_asym_per_token"
    elif entry.kind == "Int8Tensor":
        kwargs = {
            "granularity": _PER_ROW,
            "mapping_type": _mapping(inputs),
            "reduce_range": False,
        }
        acts = None if inputs is None else _tagged("QuantizeTensorToInt8Kwargs", kwargs)
        data |= {"act_quant_kwargs": acts, "reduce_range": False}
    else:
        kwargs = {
            "float8_dtype": _dtype(scheme.code_dtype),
            "granularity": _PER_ROW,
            "mm_config": None,
            "hp_value_lb": None,
            "hp_value_ub": None,
            "kernel_preference": _KERNEL,
        }
        acts = None if inputs is None else _tagged("QuantizeTensorToFloat8Kwargs", kwargs)
        data |= {"act_quant_kwargs": acts, "mm_config": None, "kernel_preference": _KERNEL}
    return {"_type": entry.kind, "_data": data, "_tensor_data_names": list(entry.parts)}


def extras_for(plan: Any) -> Extras:
    """The header's entries: each parameter's class, and the names of all."""
    dtype = plan.checkpoint.config.get("dtype") or plan.checkpoint.config.get("torch_dtype")
    dtype = dtype if dtype in ("float16", "bfloat16", "float32") else "bfloat16"
    schemes = schemes_of(plan, TorchaoScheme)
    weights = {f"{n}.weight": json.dumps(_entry(s, dtype)) for n, s in schemes.items()}
    floats = dict.fromkeys(
        (*plan.dense, *(f"{n}.bias" for n in schemes if f"{n}.bias" in plan.checkpoint.tensors)),
        json.dumps({"_type": "Tensor"}),
    )
    names = json.dumps([*weights, *floats])
    return Extras(metadata={**weights, **floats, "tensor_names": names})
