"""Stand-ins for two modules that SGLang imports and its CPU machine lacks.

    torchvision   its wheels are built for torch with CUDA. Three names, for configs of image
                  models: srt/configs/deepseek_ocr.py
    sgl_kernel    SGLang's own kernels. Eight names, for its cache and its speculative decoding:
                  srt/mem_cache/, srt/speculative/

Recorded from what SGLang 0.5.23 imports for its models; a call of any is an error.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any, NoReturn

__all__ = ["install"]

_KERNELS = (
    "assign_draft_cache_locs_contiguous_cpu", "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu", "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu", "fill_accept_out_cache_loc_cpu", "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)  # fmt: skip


def _refuse(*args: Any, **kw: Any) -> NoReturn:
    raise RuntimeError("a stub for imports was called: this test needs SGLang's kernels")


def _module(name: str, **values: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    for key, value in values.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module


def install() -> None:
    """After transformers has looked for the real torchvision, so that it does not use this one."""
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        mode = type("InterpolationMode", (), {})
        functional = _module("torchvision.transforms.functional", InterpolationMode=mode)
        transforms = _module(
            "torchvision.transforms", InterpolationMode=mode, functional=functional
        )
        _module("torchvision", transforms=transforms)
    if find_spec("sgl_kernel") is None:
        _module("sgl_kernel", **dict.fromkeys(_KERNELS, _refuse))
