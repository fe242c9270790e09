"""Less for transformers to do while it builds and finishes a model that is loaded by us.

    without_numbers   weights on the meta device are not initialised: they have no numbers
    out_of_sight      layers that are loaded are no children of the model while transformers walks
                      all modules, eight times, to see what is left to initialise

Both leave the model as it would be without them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quant_core.walk import modules_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["out_of_sight", "without_numbers"]

_INITS = ("kaiming_uniform_", "normal_", "ones_", "uniform_", "zeros_")


@contextmanager
def without_numbers() -> Iterator[None]:
    """``torch.nn.init`` passes by what is on the meta device, which takes Python 50 us a matrix.

    Others who initialise meanwhile, in another thread, get their numbers.
    """
    init: Any = torch.nn.init
    before = {name: getattr(init, name) for name in _INITS}

    def passing(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def fill(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            return tensor if tensor.is_meta else real(tensor, *args, **kwargs)

        return fill

    try:
        for name, real in before.items():
            setattr(init, name, passing(real))
        yield
    finally:
        for name, real in before.items():
            setattr(init, name, real)


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
