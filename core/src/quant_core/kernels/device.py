"""What a kernel is told about the device: its type and its compute capability."""

from __future__ import annotations

import functools

from quant_core.errors import ConfigError, printable

__all__ = ["check_device", "device_key"]


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


def check_device(device: str, *, here: bool = True) -> None:
    """Refuse what is no device that could hold a model.

    Args:
        here: it has to be one of this machine.

    Raises:
        ConfigError: ``Q-ENGINE-DEVICE``.
    """
    import torch

    try:
        known = torch.device(device).type != "meta"
        why = "" if known else "holds no values"
        if known and here and device != "cpu":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:  # torch raises either where there is no driver
        why = str(err).partition("\n")[0]
    if why:
        where = " of this machine" if here else ""
        raise ConfigError(
            f"device: {printable(device)!r} cannot be used ({printable(why)}), expected a device"
            f"{where} such as 'cpu' or 'cuda:0'. Name another one.",
            code="Q-ENGINE-DEVICE",
            tensor="device",
            actual=device,
        )
