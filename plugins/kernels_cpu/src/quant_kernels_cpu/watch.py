"""Whether a call must go through torch's dispatcher, because somebody there looks at it.

Compilation, tracing, dispatch modes (fake tensors, counters, debuggers), functorch transforms, the
profiler, tensor subclasses and tensors that are not on the CPU all act inside the dispatcher. Where
none of them is at work, an op whose only implementation is ours gives the same result called
directly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import profiler

__all__ = ["watched"]

_c = torch._C
_modes = _c._len_torch_dispatch_stack
_transform = _c._functorch.peek_interpreter_stack
_traced = _c._get_tracing_state


def watched(x: Tensor, held: Tensor) -> bool:
    """True if a call on ``x`` with weights like ``held`` has to be an op of the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or not (x.is_cpu and held.is_cpu)
        or _modes() != 0
        or profiler._is_profiler_enabled
        or _transform() is not None
        or _traced() is not None
    )
