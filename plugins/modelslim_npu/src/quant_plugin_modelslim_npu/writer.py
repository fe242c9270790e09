"""The description of a plan: the type of every stored tensor, in a file of its own.

config.json says nothing of the quantization, as the producer leaves it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from quant_core.describe import Extras, module_names
from quant_core.errors import LayoutError
from quant_plugin_modelslim_npu.kinds import KINDS
from quant_plugin_modelslim_npu.scheme import MsScheme

__all__ = ["extras_for"]

_FILE = "quant_model_description.json"
_CACHE = "C8"  # int8 keys and values
_VERSION = "1.0.0"  # of the description, as ModelSlim 26.1.0 writes it


def extras_for(plan: Any) -> Extras:
    """The description of a ``quant_core.plan.Plan`` whose quantized members are of this format.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if there is no layer.
    """
    texts = {id(kind): text for text, kind in KINDS.items()}
    types: dict[str, str] = {}
    sizes: set[int] = set()
    for member in plan.members.values():
        if not isinstance(member.scheme, MsScheme):
            continue
        if member.scheme.group and not member.scheme.kind.mx:
            sizes.add(member.scheme.group)
        for name in module_names(member.layer):
            types[name] = texts[id(member.scheme.kind)]
    if not types:
        raise LayoutError(
            "the plan holds no layer of this format, expected at least one. Quantize a layer, or "
            "save the model without a quantization config.",
            code="Q-LAYOUT-REPRESENT",
            expected=1,
            actual=0,
            plugin="modelslim_npu",
        )
    tensors = [*plan.checkpoint.tensors]
    entries = {n: types.get(n.rpartition(".")[0], "FLOAT") for n in tensors}
    caches = [t.stored for m in plan.attention.values() for t in m.scheme.tensors]
    entries |= dict.fromkeys(caches, _CACHE)
    kinds = {"kv_cache_type": _CACHE, "kv_quant_type": _CACHE} if caches else {}
    content = {
        **entries,
        **kinds,
        "version": _VERSION,
        "model_quant_type": Counter(types.values()).most_common(1)[0][0],
        "metadata": {},
        "group_size": sizes.pop() if len(sizes) == 1 else 0,
        "optional": {},
    }
    return Extras(files={_FILE: content})
