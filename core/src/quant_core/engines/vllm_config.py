"""The method ``quant_core`` in vLLM: which checkpoint, which options, how each layer is computed.

The object is made in the front end and pickled to the processes that load: it carries plain data,
and each process plans the checkpoint's header itself.

    front end   from_config -> maybe_update_config (plans once: a broken checkpoint fails here)
    worker      apply_vllm_mapper -> get_quant_method per layer -> loading -> post-loading

Source: vLLM 0.32.0, model_executor/layers/quantization/base_config.py.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from quant_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper

    from quant_core.build import Builder
    from quant_core.engines.sharing import Account, Names, Options
    from quant_core.engines.vllm_loader import PackedNames
    from quant_core.engines.vllm_refit import Refit
    from quant_core.plan import Plan

__all__ = ["METHOD", "TAKE_OVER", "QuantCoreConfig", "local_path"]

METHOD = "quant_core"
TAKE_OVER = "QUANT_CORE_TAKE_OVER"
"""Environment variable: methods that vLLM has itself and quant_core takes, comma separated."""

_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class QuantCoreConfig(QuantizationConfig):  # type: ignore[misc]
    """Everything that vLLM asks about quantization, answered from the checkpoint's plan."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        from quant_core.engines.sharing import Options

        self.options = options or Options()
        self.model = ""
        self.num_layers: int | None = None
        self._forget()

    def _forget(self) -> None:
        self._plan: Plan | None = None
        self._names: Names | None = None
        self._mapper: WeightsMapper | None = None
        self._packed_names: PackedNames | None = None
        self.account: Account | None = None
        self.held: set[str] = set()  # float parameters that packed layers read themselves
        self.checked = False  # the model is built and every member has a layer
        self.feeding = False  # a stream of ours is being read
        self._refit: Refit | None = None

    def __getstate__(self) -> dict[str, Any]:
        gone = (
            "_plan",
            "_names",
            "_mapper",
            "_packed_names",
            "account",
            "held",
            "checked",
            "feeding",
            "_refit",
        )
        return {k: v for k, v in self.__dict__.items() if k not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        _register_loader()

    # ------------------------------------------------------------------- what vLLM asks the class

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # kernels say for themselves what they need

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantCoreConfig:
        from quant_core.engines.sharing import Options

        return cls(Options.parse(config) if config.get("quant_method") == METHOD else None)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Ours if the user says so: ``--quantization quant_core``, or by name in ``TAKE_OVER``."""
        wanted = {name.strip() for name in os.environ.get(TAKE_OVER, "").split(",")}
        taken = user_quant is None and hf_quant_cfg.get("quant_method") in wanted - {""}
        return METHOD if user_quant == METHOD or taken else None

    # ---------------------------------------------------------------------------- the checkpoint

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        _register_loader()
        self.model = local_path(model_name, revision)
        text = getattr(hf_config, "get_text_config", lambda: hf_config)()
        self.num_layers = getattr(text, "num_hidden_layers", None)
        self.plan  # noqa: B018 - a checkpoint that cannot be loaded is an error now

    @property
    def plan(self) -> Plan:
        """The checkpoint's plan, made on first use in each process."""
        if self._plan is None:
            from quant_core.engines.packed import neutral
            from quant_core.engines.sharing import Account, open_plan

            with neutral():
                self._plan = open_plan(self.model, self.options)
            self.account = Account(self._plan)
        return self._plan

    def reopen(self, model: str) -> None:
        """Plan another checkpoint in place of this one; layers look their members up by name."""
        account = self.account
        self.model, self._plan, self._refit = local_path(model), None, None
        assert self.plan is not None
        if account is not None and self.account is not None:
            self.account.taken = account.taken

    def read_from(self, plan: Plan) -> None:
        """From now on packed layers read from another plan of the same checkpoint."""
        self._plan = plan

    @property
    def names(self) -> Names:
        if self._names is None:
            from quant_core.engines.sharing import Names

            rename = None if self._mapper is None else self._mapper.map_name
            self._names = Names(self.plan, rename)
        return self._names

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self._mapper, self._names = hf_to_vllm_mapper, None

    def builder(self, dtype: torch.dtype) -> Builder:
        from vllm.platforms import current_platform

        from quant_core.build import Builder

        device = current_platform.device_type
        if device != "cpu":
            device = f"{device}:{torch.accelerator.current_device_index()}"
        return Builder(plan=self.plan, device=device, dtype=dtype, kernels=self.options.kernels)

    # --------------------------------------------------------------------------------- the layers

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from quant_core.engines.vllm_layers import method_for

        if self.checked and self._of_draft(prefix):
            _check_draft(self.model)
        return method_for(self, layer, prefix)

    def check_taken(self) -> None:
        """Once, when the model is built: every quantized member has a layer.

        Raises:
            CheckpointError: ``Q-TENSOR-UNEXPECTED``.
        """
        if self.checked:
            return
        self.checked = True
        assert self.plan is not None
        assert self.account is not None
        self.account.check(self._absent)

    def _absent(self, name: str) -> str:
        """Why this rank has no layer for a member; "" if there is no reason."""
        from vllm.distributed import get_pp_group

        if self._of_draft(name):
            return "layers of a draft model"
        return "held by another pipeline stage" if get_pp_group().world_size > 1 else ""

    def _of_draft(self, name: str) -> bool:
        number = _LAYER_NUMBER.search(name)
        if number is None or self.num_layers is None:
            return False
        return int(number[1]) >= self.num_layers

    # ------------------------------------------------------------------ names in vLLM's own stream

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Leave out of vLLM's own stream what packed layers read themselves.

        A second stream that is not our loader's brings new weights from memory.

        Raises:
            LayoutError: ``Q-ENGINE-RELOAD`` if this model takes none.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        if self.feeding:
            return WeightsMapper()
        if self.checked:
            from quant_core.engines.vllm_refit import Refit, RefitMapper

            if self._refit is None:
                self._refit = Refit(self)
            return RefitMapper.of(self, self._refit)
        from vllm.config import get_current_vllm_config

        from quant_core.engines.complete import check_floats
        from quant_core.engines.vllm_loader import PackedNames

        if self._packed_names is None:
            model = get_current_vllm_config().model_config
            check_floats(self.plan, model.hf_config, who=f"load_format={METHOD!r}")
            self._packed_names = PackedNames(self)
        return WeightsMapper(orig_to_new_regex={self._packed_names: None})

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """None: the scales of a cache come from the plan."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper()


def _check_draft(model: str) -> None:
    """Draft layers are made after the model is loaded.

    Raises:
        ConfigError: ``Q-ENGINE-DRAFT`` if a loader of vLLM is to load them.
    """
    from vllm.config import get_current_vllm_config_or_none

    current = get_current_vllm_config_or_none()  # none: they run, and take new weights
    found = METHOD if current is None else current.load_config.load_format
    if found == METHOD:
        return
    raise ConfigError(
        f"{model}: its draft layers are to be loaded by load_format={found!r}, expected "
        f"{METHOD!r}: vLLM's drafts look every stored tensor up among their parameters. Pass "
        f"--load-format {METHOD}.",
        code="Q-ENGINE-DRAFT",
        tensor="load_format",
        expected=METHOD,
        actual=found,
    )


def _register_loader() -> None:
    from quant_core.engines.vllm_loader import register_loader

    register_loader()


def local_path(model: str, revision: str | None = None) -> str:
    """Folder or file of a model; one that is a repository's id is looked up where vLLM put it."""
    if os.path.exists(model):
        return model
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model, revision=revision))
