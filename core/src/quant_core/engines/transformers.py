"""The transformers engine: ``load_model(path)``, or ``install()`` and plain ``from_pretrained``.

Both end in ``transformers_quantizer``. transformers itself is imported on first use.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.errors import ConfigError, PluginError, printable, summarize
from quant_core.memory import collector_paused, give_back

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from quant_core.checkpoint.base import Checkpoint
    from quant_core.engines.transformers_cache import CacheMode

__all__ = ["SUPPORTED", "as_config", "install", "load_model", "uninstall"]

SUPPORTED = ("5.16", "5.24")
"""transformers versions this engine is tested with: first, and first one too new."""

_lock = threading.Lock()
_replaced: dict[str, Any] = {}  # quant_method -> transformers' own config class, or None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(p) for p in text.split(".")[:2] if p.isdigit())


def _check_version() -> None:
    _check_by(metadata.version)


@functools.lru_cache(maxsize=1)
def _check_by(version: Callable[[str], str]) -> None:
    """Once a process where it is fine: to read a package's metadata takes 2 ms."""
    low, high = SUPPORTED
    try:
        found = version("transformers")
    except metadata.PackageNotFoundError:
        found = ""
    if not found or not _version(low) <= _version(found) < _version(high):
        have = f"version {found} is installed" if found else "it is not installed"
        raise PluginError(
            f"transformers: {have}, expected >={low},<{high}. "
            f"Run `pip install 'transformers>={low},<{high}'`.",
            code="Q-ENGINE-VERSION" if found else "Q-ENGINE-MISSING",
            expected=f">={low},<{high}",
            actual=found or None,
        )


def _register() -> None:
    """Make ``quant_method: "quant_core"`` known to transformers; adds a name, changes none."""
    from transformers.quantizers import auto

    from quant_core.engines.transformers_quantizer import (
        METHOD,
        QuantCoreConfig,
        QuantCoreQuantizer,
    )

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(QuantCoreQuantizer)
        auto.register_quantization_config(METHOD)(QuantCoreConfig)


def install() -> tuple[str, ...]:
    """Let ``from_pretrained`` load the formats of the installed plugins through quant-core.

    From then on a checkpoint whose ``quantization_config`` names one of them goes through this
    engine, in this process. ``uninstall`` undoes it; calling it again is harmless.

    Returns:
        The ``quant_method`` values that are taken over.

    Raises:
        PluginError: ``Q-ENGINE-MISSING`` without transformers, ``Q-ENGINE-VERSION`` if its version
            is outside ``SUPPORTED``.
    """
    _check_version()
    from transformers.quantizers import auto

    from quant_core.engines.transformers_quantizer import QuantCoreConfig
    from quant_core.registry import registry

    with _lock:
        _register()
        mapping = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        for plugin in registry().plugins.values():
            for method in plugin.info.quant_methods:
                if method not in _replaced:
                    _replaced[method] = mapping.get(method)
                    mapping[method] = QuantCoreConfig
        return tuple(sorted(_replaced))


def uninstall() -> None:
    """Give transformers its own loaders back. Models already loaded stay as they are."""
    with _lock:
        if not _replaced:
            return
        from transformers.quantizers import auto

        for method, own in _replaced.items():
            if own is None:
                auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(method, None)
            else:
                auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = own
        _replaced.clear()


def as_config(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    kernels: str | Sequence[str] | None = None,
    strict: bool = False,
    device: str | None = None,
    kv_cache: CacheMode | None = None,
    prepared: str | os.PathLike[str] | None = None,
    mmap: bool | None = None,
    online: str | None = None,
    skip: Sequence[str] = (),
    online_options: Mapping[str, Any] | None = None,
    requantize: bool = False,
    **config_overrides: Any,
) -> PreTrainedConfig:
    """The model's config, made to route through quant-core whatever the checkpoint says of itself.

    For ``from_pretrained(path, config=as_config(path))``; needed for checkpoints that carry no
    ``quantization_config`` of their own. It works without ``install``.

    Raises:
        PluginError: ``Q-ENGINE-MISSING``, ``Q-ENGINE-VERSION``.
        ConfigError: ``Q-CFG-KEY`` for an override that the config class does not have,
            ``Q-CFG-MISSING`` if there is none, ``Q-ENGINE-CONFIG`` if transformers rejects it,
            ``Q-CFG-CONFLICT`` for settings of online quantization without ``online``.
        CheckpointError: the checkpoint cannot be opened.
    """
    _check_version()
    _check_online(online, skip=skip, online_options=online_options, requantize=requantize)
    from quant_core.checkpoint.open import open_checkpoint

    with open_checkpoint(where := Path(os.path.abspath(path))) as checkpoint:
        return _config_of(
            checkpoint,
            config_overrides,
            path=str(where),
            format=format,
            kernels=kernels,
            strict=strict,
            device=device,
            kv_cache=kv_cache,
            prepared=None if prepared is None else os.fspath(prepared),
            mmap=mmap,
            online=online,
            skip=skip,
            online_options=online_options,
            requantize=requantize,
        )


def _config_of(
    checkpoint: Checkpoint, config_overrides: Mapping[str, Any], **options: Any
) -> PreTrainedConfig:
    """``as_config`` of an opened checkpoint; ``options`` are those of ``QuantCoreConfig``."""
    from quant_core.checkpoint.base import no_config

    _register()
    where = Path(options["path"])
    with ExitStack() as files:
        named = checkpoint.pretrained_args()["pretrained_model_name_or_path"]
        if "model_type" in checkpoint.config:  # a config.json says more than a container can
            arguments = {"pretrained_model_name_or_path": str(checkpoint.folder)}
            settings = dict(config_overrides)
        else:
            arguments = dict(files.enter_context(checkpoint.config_args()))
            here = (checkpoint.folder / "config.json").exists()
            if len(arguments) < 2 and not here:  # nor does the container hold a config
                raise no_config(checkpoint, "there is no config.json")
            settings = {**checkpoint.config_overrides(), **config_overrides}
        config, unused = _config(where, arguments, settings)
    config.name_or_path = named
    unused = {k: v for k, v in unused.items() if k not in arguments and k in config_overrides}
    if unused:
        raise ConfigError(
            f"load_model: {summarize(unused)} is no setting of {type(config).__name__}, expected "
            "dtype, device, strict, kernels, format, kv_cache, prepared, mmap, online, skip, "
            "online_options, requantize or a key of config.json. Remove it.",
            code="Q-CFG-KEY",
            tensor=next(iter(unused)),
            actual=sorted(unused),
        )
    from quant_core.engines.transformers_quantizer import QuantCoreConfig

    config.quantization_config = QuantCoreConfig(**options).to_dict()
    return config


def _config(
    where: Path, arguments: Mapping[str, str], settings: Mapping[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config, and the settings that it does not have."""
    from transformers import AutoConfig

    try:
        made: tuple[PreTrainedConfig, dict[str, Any]] = AutoConfig.from_pretrained(
            **arguments, trust_remote_code=False, return_unused_kwargs=True, **settings
        )
    except Exception as err:  # transformers raises a dozen types here
        raise ConfigError(
            f"{where}: transformers rejects the model's config ({printable(err, 300)}), expected "
            "one it can build. Restore config.json, or correct the settings passed.",
            code="Q-ENGINE-CONFIG",
            path=where,
        ) from err
    return made


def config_and_class(checkpoint: Checkpoint) -> tuple[PreTrainedConfig, Any]:
    """The model's config and class, for comparing them with what is stored.

    Raises:
        PluginError: ``Q-ENGINE-MISSING``, ``Q-ENGINE-VERSION``.
        ConfigError: as ``as_config``, and ``Q-ENGINE-MODEL``.
    """
    from quant_core.engines.transformers_skeleton import check_layers

    _check_version()
    config = _config_of(checkpoint, {}, path=str(checkpoint.path))
    check_layers(checkpoint, config)
    return config, _model_class(config, checkpoint.path)


def _check_online(online: str | None, *, skip: object, **others: object) -> None:
    """Settings of online quantization mean nothing without it; patterns are a list of texts."""
    if isinstance(skip, str):
        raise ConfigError(
            f"skip: is the text {printable(skip)!r}, expected a list of name patterns. "
            "Write skip=[...].",
            code="Q-CFG-TYPE",
            tensor="skip",
            actual=skip,
        )
    given = [name for name, value in {"skip": skip, **others}.items() if value]
    if given and online is None:
        raise ConfigError(
            f"load_model: {summarize(given)} given without online, expected both or neither. "
            "Say what to quantize to, e.g. online='plugin:name'.",
            code="Q-CFG-CONFLICT",
            tensor=given[0],
            expected="online",
        )


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    strict: bool = False,
    kernels: str | Sequence[str] | None = None,
    format: str | None = None,
    kv_cache: CacheMode | None = None,
    prepared: str | os.PathLike[str] | None = None,
    mmap: bool | None = None,
    online: str | None = None,
    skip: Sequence[str] = (),
    online_options: Mapping[str, Any] | None = None,
    requantize: bool = False,
    **config_overrides: Any,
) -> PreTrainedModel:
    """A transformers model of the checkpoint at ``path``, its quantized layers packed.

    Args:
        path: folder or file of a checkpoint in any format that an installed plugin reads.
        device: where everything is placed.
        dtype: of float parameters and activations; default that of the model's config. Scales
            keep the dtype they are stored in.
        strict: treat warnings (unknown config keys, patterns that match nothing) as errors.
        kernels: names of kernels to allow; default from ``QUANT_KERNELS``, else all.
        format: plugin id to insist on.
        kv_cache: "checkpoint" rounds keys and values by the scales of the file, "float" does not;
            default: what the producer's own forward does.
        prepared: "auto" or a folder keeps the kernels' final buffers on disk, so that the next
            load only reads them; "off" does not; default from ``QUANT_PREPARED``, else "off".
        mmap: True uses weights where the files have them, on the cpu: nothing is copied or
            repacked, and the file must not be cut or overwritten in place meanwhile. Layers that
            no kernel runs so are loaded as ever. False copies all. Default: of local files of
            256 MiB and more whatever a kernel runs so at 1.1 times the cost of repacked weights
            at most; with ``online``, whose weights are made, False.
        online: quantize a float checkpoint while loading it: a scheme that an installed plugin
            offers, by its bare name or as "plugin:name".
        skip: patterns of modules that stay floats, see ``online.SkipRules``.
        online_options: settings of the online scheme.
        requantize: allow ``online`` for a checkpoint that is quantized already.
        config_overrides: settings of the model's config, e.g. ``attn_implementation="eager"``.

    Raises:
        PluginError: ``Q-ENGINE-MISSING``, ``Q-ENGINE-VERSION``.
        ConfigError: ``Q-ENGINE-CONFIG``, ``-DEVICE``, ``-DTYPE``, ``-MODEL``, ``-CACHE``,
            ``Q-CFG-KEY``, or the checkpoint's own quantization config is wrong;
            ``Q-CFG-CONFLICT`` for ``online`` on a quantized checkpoint.
        CheckpointError, LayoutError, FormatError, KernelError: see their codes; nothing half
            loaded stays.
    """
    _check_version()
    with collector_paused():  # its imports too, where it is the first of a process
        from quant_core.checkpoint.open import open_checkpoint
        from quant_core.engines.transformers_build import without_numbers
        from quant_core.engines.transformers_quantizer import opened_for, single_device
        from quant_core.engines.transformers_skeleton import check_layers, rejected
    from quant_core.kernels.device import check_device

    device = single_device(device if not isinstance(device, str) else {"": device}) or "cpu"
    check_device(device)
    prepared = None if prepared is None else os.fspath(prepared)
    _check_online(online, skip=skip, online_options=online_options, requantize=requantize)
    with (
        collector_paused(),
        open_checkpoint(where := Path(os.path.abspath(path))) as checkpoint,
        opened_for(where, checkpoint) as found,
    ):
        try:
            config = _config_of(
                checkpoint,
                config_overrides,
                path=str(where),
                format=format,
                kernels=kernels,
                strict=strict,
                device=device,
                kv_cache=kv_cache,
                prepared=prepared,
                mmap=mmap,
                online=online,
                skip=skip,
                online_options=online_options,
                requantize=requantize,
            )
            check_layers(checkpoint, config)
            cls, dtype = _model_class(config, path), _dtype(dtype, config, path)
            with _ONE_AT_A_TIME, _quiet(), without_numbers():
                model = cls.from_pretrained(
                    None,
                    config=config,
                    state_dict={},
                    dtype=dtype,
                    generation_config=_generation_config(path),
                )
        except Exception as err:
            if found.asked:  # there was a skeleton: not the config's fault
                raise
            rejected(checkpoint, err, format=format)
    give_back()
    model.name_or_path = model.config.name_or_path = str(path)
    return model


# transformers replaces ``PreTrainedModel.tie_weights`` and torch's default dtype while it builds a
# model, and puts back what it found: of two threads, the later one would put back the first one's
# replacement, and no model after that would be tied (transformers 5.23, initialization.py).
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar over the nothing that transformers itself loads."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _model_class(config: PreTrainedConfig, path: object) -> Any:
    """The class that ``architectures`` names, else the causal language model of this config."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    names = config.architectures
    if names is not None and not isinstance(names, list | tuple):
        raise ConfigError(
            f"{path}: architectures is {printable(names)}, expected a list of class names. "
            "Restore config.json.",
            code="Q-CFG-TYPE",
            tensor="architectures",
            actual=names,
        )
    for name in names or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and getattr(found, "config_class", None) is type(config):
            return found
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as err:
        raise ConfigError(
            f"{path}: transformers has no language model for {type(config).__name__} and "
            f"architectures={config.architectures!r}, expected one it knows. "
            "Check config.json, or update transformers within the supported range.",
            code="Q-ENGINE-MODEL",
            tensor="architectures",
            actual=config.architectures,
        ) from err


def _dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig, path: object) -> torch.dtype:
    import torch

    value: Any = dtype
    if value is None:
        value = config.dtype or config.get_text_config().dtype or torch.float32
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
        raise ConfigError(
            f"{path}: dtype is {dtype if dtype is not None else value!r}, expected float32, "
            "float16, bfloat16 or float64. Pass dtype=torch.bfloat16, for example.",
            code="Q-ENGINE-DTYPE",
            tensor="dtype",
            actual=str(value),
        )
    return value


def _generation_config(path: str | os.PathLike[str]) -> Any:
    from transformers import GenerationConfig

    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return None
