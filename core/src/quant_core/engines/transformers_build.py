"""Less for transformers to do while it builds and finishes a model that is loaded by us.

    without_numbers   weights on the meta device are not initialised: they have no numbers. Those
                      of one shape are made once, each layer has a parameter of its own over it
    out_of_sight      layers that are loaded are no children of the model while transformers walks
                      all modules, eight times, to see what is left to initialise

Both leave the model as it would be without them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from quant_core.walk import modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["out_of_sight", "without_numbers"]

_INITS = ("kaiming_uniform_", "normal_", "ones_", "uniform_", "zeros_")


@contextmanager
def without_numbers() -> Iterator[None]:
    """``torch.nn.init`` passes by what is on the meta device, which takes Python 50 us a matrix.

    To make a linear layer there takes another 30, which for all but the first of a shape become 8.
    Others who initialise meanwhile, in another thread, get their layers and numbers as ever.
    """
    init: Any = torch.nn.init
    linear: Any = nn.Linear
    device: Any = DeviceContext
    made, asked = linear.__init__, device.__torch_function__
    before = {name: getattr(init, name) for name in _INITS}

    def passing(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def fill(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            return tensor if tensor.is_meta else real(tensor, *args, **kwargs)

        return fill

    try:
        for name, real in before.items():
            setattr(init, name, passing(real))
        linear.__init__ = _bare_linear(made)
        device.__torch_function__ = _without_fill(asked)
        yield
    finally:
        linear.__init__ = made
        device.__torch_function__ = asked
        for name, real in before.items():
            setattr(init, name, real)


def _without_fill(asked: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.ones`` and ``zeros`` on the meta device as ``empty``: 8 us a norm instead of 60."""

    @functools.wraps(asked)
    def ask(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and func in (torch.ones, torch.zeros) and self.device.type == "meta":
            func = torch.empty
        return asked(self, func, types, args, kwargs)

    return ask


def _bare_linear(made: Callable[..., None]) -> Callable[..., None]:
    """``Linear.__init__`` for this thread's layers on the meta device; else it is ``made``."""
    here, known = threading.get_ident(), dict[Any, Tensor]()

    def on_meta() -> bool:
        if not torch._C._is_torch_function_mode_enabled():  # the device is said by such a mode
            return False
        mode: Any = torch.overrides._get_current_function_mode()
        return (
            type(mode) is DeviceContext
            and mode.device.type == "meta"
            and not nn.modules.module._global_parameter_registration_hooks
        )

    def weight(*shape: int) -> nn.Parameter:
        key = shape, torch.get_default_dtype()
        if key not in known:
            known[key] = torch.empty(shape)
        return torch.Tensor._make_subclass(nn.Parameter, known[key], True)  # type: ignore[return-value]

    @functools.wraps(made)
    def bare(
        self: Any, in_features: int, out_features: int, bias: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        plain = type(self) is nn.Linear and in_features and out_features
        if not plain or args or kwargs or threading.get_ident() != here or not on_meta():
            made(self, in_features, out_features, bias, *args, **kwargs)
            return
        nn.Module.__init__(self)
        self.__dict__.update(in_features=in_features, out_features=out_features)
        held = self._parameters  # as ``register_parameter`` does after its checks
        held["weight"] = weight(out_features, in_features)
        held["bias"] = weight(out_features) if bias else None

    return bare


def out_of_sight(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], left: Iterable[str]
) -> Callable[[], None]:
    """Take lists of layers that are done out of ``model``; gives what puts them back.

    Done is what has no buffers that the model computes itself, no parameters that are ``left`` to
    transformers, and no ties. It is marked as transformers marks what it comes by.

    Args:
        modules: the model's lists, among others, by name.
        left: names of parameters that transformers is to initialise.
    """
    pending = {name for tie in model.all_tied_weights_keys.items() for name in tie} | {*left}
    lists = {n: m for n, m in modules.items() if type(m) is nn.ModuleList}
    hidden: dict[str, tuple[nn.ModuleList, dict[str, Any]]] = {}
    for name, module in lists.items():
        if name.startswith(tuple(hidden)) or any(n.startswith(f"{name}.") for n in pending):
            continue
        held = [m for m in modules_of(module) if m is not module]
        if any(m._non_persistent_buffers_set for m in held):
            continue
        for m in held:
            m.__dict__["_is_hf_initialized"] = True
            if type(m).train is nn.Module.train:
                m.__dict__["training"] = False
            else:
                m.eval()
        hidden[f"{name}."] = module, module._modules
        module._modules = {}

    def back() -> None:
        for module, children in hidden.values():
            module._modules = children

    return back
