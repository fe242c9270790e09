"""What a kernel is told about the device: its type and its compute capability."""

from __future__ import annotations

import functools

__all__ = ["device_key"]


@functools.lru_cache(maxsize=64)
def device_key(device: str) -> tuple[str, str]:
    """("cuda", "9.0") for "cuda:0", ("cpu", "") for "cpu": the value of ``OpSpec.device``.

    The capability is "" for every device type but cuda, and where no CUDA device is present.
    """
    kind = device.partition(":")[0]
    if kind != "cuda":
        return kind, ""
    import torch

    if not torch.cuda.is_available():
        return kind, ""
    major, minor = torch.cuda.get_device_capability(device)
    return kind, f"{major}.{minor}"
