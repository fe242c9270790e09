"""The one path of all loads: an ``HfQuantizer`` that loads everything before transformers can.

    from_pretrained -> skeleton on meta -> before-hook: plan, check, swap modules, load everything
                    -> transformers finds no key left to load, ties and computes rotary tables
                    -> after-hook: device, saving, undo what kept transformers from loading

Only base classes of transformers are subclassed. What keeps transformers from loading again is
torch's own ``register_state_dict_post_hook`` on this one model, removed afterwards: transformers
loads what ``model.state_dict()`` names, and during the load it names nothing of ours.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant_core.checkpoint.open import open_checkpoint
from quant_core.detect import quantization_config
from quant_core.engines.transformers_build import out_of_sight
from quant_core.engines.transformers_cache import CacheMode, check_mode
from quant_core.engines.transformers_fill import Filled, fill_model
from quant_core.engines.transformers_online import online_provenance, replaceable_in, stacks_in
from quant_core.engines.transformers_save import Provenance, attach_save
from quant_core.errors import CheckpointError, ConfigError, summarize
from quant_core.online import OnlineRequest
from quant_core.online_plan import quantize_plan
from quant_core.plan import Plan
from quant_core.plan import plan as make_plan
from quant_core.prepared.build import builder_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant_core.checkpoint.base import Checkpoint

__all__ = ["METHOD", "QuantCoreConfig", "QuantCoreQuantizer", "opened_for", "single_device"]

log = logging.getLogger("quant_core")

METHOD = "quant_core"
_ONLINE = ("online", "skip", "online_options", "requantize")
_OPTIONS = (
    *("path", "format", "kernels", "strict", "device", "kv_cache", "prepared", "mmap"),
    *_ONLINE,
)


class QuantCoreConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What the quantizer is told: its own options, or the block of a tagged checkpoint.

    Attributes:
        path: the checkpoint; None: where transformers found the weights.
        format, kernels, strict, device, kv_cache, prepared, mmap, online, skip, online_options,
            requantize: as in ``load_model``.
        original: the checkpoint's own block, which saving and ``to_dict`` give back.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        format: str | None = None,
        kernels: str | Sequence[str] | None = None,
        strict: bool = False,
        device: str | None = None,
        kv_cache: CacheMode | None = None,
        prepared: str | None = None,
        mmap: bool | None = None,
        online: str | None = None,
        skip: Sequence[str] = (),
        online_options: Mapping[str, Any] | None = None,
        requantize: bool = False,
        original: Mapping[str, Any] | None = None,
    ) -> None:
        self.quant_method = METHOD
        self.path, self.format, self.kernels = path, format, kernels
        self.strict, self.device = strict, device
        self.kv_cache, self.prepared, self.mmap = check_mode(kv_cache), prepared, mmap
        self.online, self.skip, self.requantize = online, list(skip), requantize
        self.online_options = dict(online_options or {})
        self.original = None if original is None else dict(original)

    @property
    def request(self) -> OnlineRequest | None:
        """The online quantization that is asked for."""
        if self.online is None:
            return None
        return OnlineRequest(
            name=self.online,
            skip=tuple(self.skip),
            options=self.online_options,
            requantize=self.requantize,
        )

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From a config's block; one that is not ours is kept as ``original``."""
        block = dict(config_dict)
        if block.get("quant_method") == METHOD:
            unknown = sorted(set(block) - {"quant_method", *_OPTIONS})
            if unknown:
                raise ConfigError(
                    f"quantization_config: keys {summarize(unknown)} of quant_method {METHOD!r} "
                    f"are unknown, expected {', '.join(_OPTIONS)}. Remove them.",
                    code="Q-CFG-KEY",
                    tensor=f"quantization_config.{unknown[0]}",
                    expected=_OPTIONS,
                    actual=unknown,
                )
            config = cls(**{k: v for k, v in block.items() if k in _OPTIONS})
        else:
            config = cls(original=block)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        if self.original is not None:
            return copy.deepcopy(self.original)
        values = {name: getattr(self, name) for name in _OPTIONS}
        said = {k: v for k, v in values.items() if v or (k == "mmap" and v is not None)}
        return {"quant_method": METHOD} | said

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def single_device(device_map: object) -> str | None:
    """The one device that ``device_map`` names; None if it names none.

    Raises:
        ConfigError: ``Q-ENGINE-DEVICE`` for a map over several devices, or one to be computed.
    """
    value = device_map
    if isinstance(value, Mapping):
        value = value[""] if set(value) == {""} else tuple(value)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"cuda:{value}"
    if isinstance(value, torch.device):
        return str(value)
    try:
        if isinstance(value, str) and value != "meta":
            return str(torch.device(value))
    except RuntimeError:
        pass  # "auto", "balanced", "disk", ...: refused below with everything else
    raise ConfigError(
        f"device_map: is {device_map!r}, expected one device: 'cpu', 'cuda:0' or {{'': device}}. "
        "Packed layers are not spread over devices; use a serving engine for several.",
        code="Q-ENGINE-DEVICE",
        tensor="device_map",
        expected="one device",
        actual=device_map,
    )


_open = threading.local()  # .found: the _Loading of the load_model that runs here


@dataclass(slots=True)
class _Loading:
    """What ``load_model`` has opened; ``asked`` once there is a skeleton that wants its tensors."""

    path: Path
    checkpoint: Checkpoint
    asked: bool = False


@contextmanager
def opened_for(path: Path, checkpoint: Checkpoint) -> Iterator[_Loading]:
    """Inside, and in this thread, a model of ``path`` is loaded from ``checkpoint``."""
    before: _Loading | None = getattr(_open, "found", None)
    _open.found = found = _Loading(path, checkpoint)
    try:
        yield found
    finally:
        _open.found = before


@contextmanager
def _opened(path: Path) -> Iterator[Checkpoint]:
    found: _Loading | None = getattr(_open, "found", None)
    if found is not None and found.path == path:
        found.asked = True
        yield found.checkpoint
        return
    with open_checkpoint(path) as mine:
        yield mine


def _plain_torch() -> AbstractContextManager[object]:
    """Tensors are made on the CPU again: transformers builds under ``torch.device("meta")``.

    A context of another device would send every call through Python twice, 15 % of a load of many
    small layers.
    """
    return torch._C.DisableTorchFunction()


class QuantCoreQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads a checkpoint of any format that an installed plugin reads."""

    requires_calibration = True  # transformers' word for: cannot quantize on the fly

    def __init__(self, quantization_config: QuantCoreConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.device = quantization_config.device
        self.provenance: Provenance | None = None
        self._undo: list[Any] = []

    # ------------------------------------------------------------------------- before the model

    def validate_environment(self, *args: Any, device_map: object = None, **kwargs: Any) -> None:
        self.device = single_device(device_map) or self.device

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    # ------------------------------------------------------------------------------ the loading

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ConfigError(
                "distributed_config: asks for several processes, expected one. "
                "Packed layers are not spread over devices; use a serving engine for that.",
                code="Q-ENGINE-DEVICE",
                tensor="distributed_config",
            )
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # what a plugin creates without a dtype
        try:
            with _plain_torch(), _opened(self._path(checkpoint_files)) as checkpoint:
                plan = make_plan(checkpoint, format=self.quantization_config.format)
                block, request = quantization_config(checkpoint), self.quantization_config.request
                online = None
                if request is not None:
                    fits, stacks = replaceable_in(model, plan), stacks_in(model, plan)
                    online = quantize_plan(plan, request, fits, stacks)
                    plan, block = online.plan, online.config
                self._report(plan)
                if online is not None or self.quantization_config.original is None:
                    self.quantization_config.original = None if block is None else _plain(block)
                options = self.quantization_config
                with builder_for(
                    options.prepared,
                    target=f"transformers {type(model).__name__}",
                    mmap=options.mmap if request is None else bool(options.mmap),
                    plan=plan,
                    device=self.device or "cpu",
                    dtype=dtype,
                    kernels=options.kernels,
                ) as builder:
                    dtypes = model._get_dtype_plan(dtype)
                    filled = fill_model(model, plan, builder, dtypes, kv_cache=options.kv_cache)
                self.provenance = Provenance.of(plan, filled)
                if online is not None:
                    self.provenance = online_provenance(online, self.provenance)
        finally:
            torch.set_default_dtype(dtype)
        if not kwargs.get("use_kernels"):  # which replaces forwards of all modules
            self._undo.append(out_of_sight(model, filled.modules, filled.left))
        self._hide(model, filled)

    def _path(self, files: Sequence[str] | None) -> Path:
        if self.quantization_config.path is not None:
            return Path(self.quantization_config.path)
        if files:
            return Path(files[0]).parent
        raise CheckpointError(
            "from_pretrained: got a state_dict and no checkpoint, expected a path. "
            "Use quant_core.load_model(path).",
            code="Q-CKPT-PATH",
        )

    def _report(self, plan: Plan) -> None:
        for warning in plan.warnings:
            log.warning("%s", warning)
        if plan.warnings and self.quantization_config.strict:
            raise CheckpointError(
                f"{plan.checkpoint.path}: {len(plan.warnings)} warning(s): "
                f"{summarize(plan.warnings, 3)}; expected none with strict=True. "
                "Correct the checkpoint, or load without strict.",
                code="Q-STRICT",
                path=plan.checkpoint.path,
                actual=tuple(plan.warnings),
            )

    def _hide(self, model: PreTrainedModel, filled: Filled) -> None:
        """Let transformers see only what it is to initialise itself."""

        def hide(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            for name in [n for n in state if n.removeprefix(prefix) not in filled.left]:
                del state[name]

        handle = model.register_state_dict_post_hook(hide)
        if not filled.left:  # transformers asks twice, which would visit every module
            model.__dict__["state_dict"] = lambda *args, **kwargs: {}
        ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {""}  # every key of the files

        def undo() -> None:
            handle.remove()
            model.__dict__.pop("state_dict", None)
            model._keys_to_ignore_on_load_unexpected = ignored

        self._undo.append(undo)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        while self._undo:
            self._undo.pop()()
        if self.device not in (None, "cpu"):
            model.to(self.device)  # what transformers computed on the CPU
        assert self.provenance is not None
        attach_save(model, self.provenance)
        return model


def _plain(value: Any) -> Any:
    """Read-only JSON as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
