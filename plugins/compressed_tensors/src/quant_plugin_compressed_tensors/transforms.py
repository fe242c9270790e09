"""Rotations that run with the model: what ``transform_config`` asks for, and where each matrix is.

    {"config_groups": {"R4": {"type": "hadamard", "head_dim": null, "randomize": false, "apply": [
        {"location": "input", "inverse": false, "targets": ["re:.*down_proj$"], "ignore": []},
        {"location": "weight_input", ...}]}}}

    weight_input, weight_output   part of the stored weights; nothing to do
    input, output                 x V before the layer, y V after it;  V = H / sqrt(n), or its
                                  transpose if inverse; one block of n = head_dim after another
    q_attn, k_cache               inside the attention: refused

H (entries +-1) is stored as ``<module>.<group>_<location>.weight`` [n, n], float; a file holds the
matrix of one group and size once, with the first module that has it.

Source: compressed-tensors 0.19.0 ``transform/factory/{base,hadamard}.py``, ``transform/utils/
matrix.py``, ``transform/transform_args.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from quant_core.checkpoint.base import Checkpoint
from quant_core.detect import FLOAT_DTYPES
from quant_core.errors import ConfigError, printable
from quant_core.fields import Fields, thaw
from quant_core.spec import Axis, ParamSpec, Source, Transform
from quant_plugin_compressed_tensors.args import bad_value
from quant_plugin_compressed_tensors.matching import Matcher, check_names

__all__ = ["TRANSFORM_RULE", "OnlineTransform", "Rotation", "parse_transforms", "rotations_of"]

TRANSFORM_RULE = "matrix of a transform, read with the layers it belongs to"
_OFFLINE = ("weight_input", "weight_output")
_ONLINE = ("input", "output")
_TYPES = ("hadamard", "random-hadamard")
_KEYS = frozenset("type apply randomize requires_grad head_dim precision block_size".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineTransform:
    """One use of a group's matrix while the model runs."""

    group: str
    location: Literal["input", "output"]
    inverse: bool
    block: int  # head_dim; 0 = the whole axis
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    _matcher: list[Matcher] = field(default_factory=list, repr=False, compare=False)

    @property
    def leaf(self) -> str:
        """Name of the submodule that holds the matrix."""
        return f"{self.group}_{self.location}"

    def applies(self, path: str, kind: str) -> bool:
        """Whether a module is a target."""
        if not self._matcher:
            self._matcher.append(Matcher({self.group: self.targets}, self.ignore, "config.json"))
        matcher = self._matcher[0]
        return not matcher.ignored(path, kind) and matcher.group(path, kind) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """The matrix of one use, as one layer reads it.

    Attributes:
        name: param name, ``R4_input.weight``.
        stored: stored tensor that holds it; "" = the layer's own.
    """

    name: str
    site: Literal["input", "output"]
    group: str
    inverse: bool
    size: int
    block: int
    stored: str = ""
    dtype: str = "float64"

    @property
    def transforms(self) -> tuple[Transform, Transform]:
        """The entries +-1 as a matrix, then the division by sqrt(n)."""
        key = f"{self.group}{'/transposed' if self.inverse else ''}"
        tp: Literal["block", "refuse"] = "block" if self.block else "refuse"
        matrix = Transform(site=self.site, kind="matrix", key=key, block=self.block, tp=tp)
        root = Transform(
            site=self.site, kind="scale", key=f"{key}/norm", inverse=True, tp="replicate"
        )
        return (matrix, root)

    @property
    def param(self) -> ParamSpec:
        fixed = Axis(tag="fixed", cut="replicate")
        return ParamSpec(
            name=self.name,
            shape=(self.size, self.size),
            dtypes=(self.dtype,),
            axes=(fixed, fixed),
            role="transform",
            sources=(Source(name=self.stored),) if self.stored else (),
            shared=True,
        )


# ---------------------------------------------------------------------------------- the config


def _refused(file: str, key: str, found: Any, expected: str) -> ConfigError:
    fix = "This transform runs with the model and is not supported; export it fused into weights."
    return bad_value(file, key, found, expected, fix, "Q-CFG-TRANSFORM")


def _uses(group: Any, file: str, key: str) -> list[Mapping[str, Any]]:
    uses = group.get("apply") if isinstance(group, Mapping) else None
    if not isinstance(uses, list | tuple) or not all(isinstance(u, Mapping) for u in uses):
        fix = "Restore the config the tool wrote."
        raise bad_value(file, key, thaw(group), "'apply' objects", fix, "Q-CFG-TYPE")
    return list(uses)


def _group(name: str, group: Any, file: str, unknown: list[str]) -> list[OnlineTransform]:
    key = f"transform_config.config_groups.{name}"
    uses = _uses(group, file, key)
    online = [u for u in uses if u.get("location") not in _OFFLINE]
    if not online:
        return []
    unknown += [f"{key}.{k}" for k in group if k not in _KEYS]
    read = Fields(group, file, f"{key}.", "compressed_tensors")
    if (kind := read.text("type")) not in _TYPES:
        raise _refused(file, f"{key}.type", kind, " or ".join(_TYPES))
    if read.flag("randomize"):
        raise _refused(file, f"{key}.randomize", True, "false")
    head_dim = read.integer("head_dim", 1, 1 << 20) or 0
    out = []
    for use in online:
        if use.get("location") not in _ONLINE:
            expected = " or ".join((*_OFFLINE, *_ONLINE))
            raise _refused(file, f"{key}.apply.location", use.get("location"), expected)
        ignore = use.get("ignore") or ()
        out.append(
            OnlineTransform(
                group=name,
                location=use["location"],
                inverse=bool(Fields(use, file, f"{key}.apply.").flag("inverse")),
                block=head_dim,
                targets=check_names(use.get("targets", ()), file, f"{key}.apply.targets"),
                ignore=check_names(
                    (ignore,) if isinstance(ignore, str) else ignore, file, f"{key}.apply.ignore"
                ),
            )
        )
    return out


def parse_transforms(raw: Any, file: str, unknown: list[str]) -> tuple[OnlineTransform, ...]:
    """The transforms that run with the model.

    Args:
        raw: ``transform_config``, parsed JSON.
        unknown: gets the keys that are not known.

    Raises:
        ConfigError: ``Q-CFG-TYPE``; ``Q-CFG-TRANSFORM`` for one that cannot be applied.
    """
    config = raw or {}
    groups = config.get("config_groups") or {} if isinstance(config, Mapping) else None
    if not isinstance(groups, Mapping):
        fix = "Restore the config the tool wrote."
        raise bad_value(file, "transform_config", thaw(config), "an object", fix, "Q-CFG-TYPE")
    return tuple(t for name, group in groups.items() for t in _group(name, group, file, unknown))


# ---------------------------------------------------------------------------------- the layers


def _holder(path: str, leaf: str, size: int, checkpoint: Checkpoint) -> str:
    """Stored matrix of a module: its own, else the one of its size that another module holds."""
    own = f"{path}.{leaf}.weight"
    if own in checkpoint.tensors:
        return own
    for module, leaves in checkpoint.modules.items():
        weight = leaves.get("weight")
        if module.endswith(f".{leaf}") and weight is not None and weight.shape == (size, size):
            return weight.name
    return ""


def rotations_of(
    online: Iterable[OnlineTransform],
    path: str,
    kind: str,
    shape: tuple[int, int],
    checkpoint: Checkpoint,
    file: str,
) -> tuple[Rotation, ...]:
    """The rotations of one quantized layer, in the order they are applied.

    Args:
        path: module path as stored.
        shape: (N, K) of the layer.

    Raises:
        ConfigError: ``Q-CFG-TRANSFORM`` for experts, or sizes that are no whole blocks.
    """
    out = []
    for use in online:
        if not use.applies(path, kind):
            continue
        axis = shape[1] if use.location == "input" else shape[0]
        size = use.block or axis
        if kind == "experts" or axis % size:
            expected = "linear layers only" if kind == "experts" else f"a divisor of {axis}"
            found = f"{use.leaf} of {printable(path)}, blocks of {size}"
            raise _refused(file, f"transform_config.config_groups.{use.group}", found, expected)
        stored = _holder(path, use.leaf, size, checkpoint)
        info = checkpoint.tensors.get(stored)
        out.append(
            Rotation(
                name=f"{use.leaf}.weight",
                site=use.location,
                group=use.group,
                inverse=use.inverse,
                size=size,
                block=use.block,
                stored="" if stored == f"{path}.{use.leaf}.weight" else stored,
                dtype=info.dtype if info is not None and info.dtype in FLOAT_DTYPES else "float64",
            )
        )
    return tuple(out)
