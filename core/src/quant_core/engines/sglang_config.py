"""The method ``quant_core`` in SGLang: which checkpoint, which options, how a layer is computed.

    from_config -> get_quant_method per layer -> load_weights -> process_weights_after_loading

Each process makes the object itself and plans the checkpoint's header on first use.

Source: SGLang 0.5.23, srt/layers/quantization/base_config.py, srt/model_loader/weight_utils.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
    from sglang.srt.models.utils import WeightsMapper

    from quant_core.build import Builder
    from quant_core.engines.sglang_slots import Round
    from quant_core.engines.sharing import Account, Names, Options
    from quant_core.plan import Member, Plan

__all__ = ["FED", "LOAD_FORMAT", "METHOD", "TAKE_OVER", "QuantCoreConfig", "local_path"]

METHOD = "quant_core"
LOAD_FORMAT = "private"
"""SGLang's name of the load format that it leaves to others: ``sglang_loader``."""
FED: ContextVar[bool] = ContextVar("FED", default=False)
"""Is the model that is being loaded fed by ``sglang_loader``?"""
TAKE_OVER = "QUANT_CORE_TAKE_OVER"
"""Environment variable: methods that SGLang has itself and quant_core takes, comma separated."""

_INJECTED = ("packed_modules_mapping", "hf_config")  # by SGLang, into the checkpoint's block
_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

# Fused modules of SGLang's models; few of its model classes declare theirs.
_FUSED: dict[str, list[str]] = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"],
}


class QuantCoreConfig(QuantizationConfig):  # type: ignore[misc]
    """Everything that SGLang asks about quantization, answered from the checkpoint's plan."""

    def __init__(self, options: Options | None = None, model: str = "") -> None:
        super().__init__()
        from quant_core.engines.sharing import Options

        self.options = options or Options()
        self.model = model
        self._forget()

    def _forget(self) -> None:
        self._plan: Plan | None = None
        self._names: Names | None = None
        self._mapper: WeightsMapper | None = None
        self.account: Account | None = None
        self.absorbed: frozenset[str] = frozenset()  # members that are given to SGLang as floats
        self.checked = False  # the model is built and every member has a layer
        self.table: torch.nn.Module | None = None  # a packed embedding, for a tied output layer
        self._round: Round | None = None

    def __getstate__(self) -> dict[str, Any]:
        gone = (
            "_plan", "_names", "_mapper", "account", "absorbed", "checked", "table", "_round"
        )  # fmt: skip
        return {k: v for k, v in self.__dict__.items() if k not in gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # ----------------------------------------------------------------- what SGLang asks the class

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

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantCoreConfig:
        from quant_core.engines.sharing import Options

        block = {k: v for k, v in config.items() if k not in _INJECTED}
        options = Options.parse(block) if block.get("quant_method") == METHOD else None
        path = getattr(config.get("hf_config"), "_name_or_path", "")
        out = cls(options, str(path or ""))
        out.update_packed_modules_mapping(config.get("packed_modules_mapping") or {})
        return out

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None
    ) -> str | None:
        """Ours if the user says so: ``--quantization quant_core``, or by name in ``TAKE_OVER``."""
        wanted = {name.strip() for name in os.environ.get(TAKE_OVER, "").split(",")}
        taken = user_quant is None and hf_quant_cfg.get("quant_method") in wanted - {""}
        return METHOD if user_quant == METHOD or taken else None

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: WeightsMapper) -> None:
        self._mapper, self._names = hf_to_sglang_mapper, None

    # ---------------------------------------------------------------------------- the checkpoint

    @property
    def plan(self) -> Plan:
        """The checkpoint's plan, made on first use in each process.

        Raises:
            CheckpointError: ``Q-TENSOR-MISSING`` for a float parameter that is not stored.
            ConfigError: ``Q-ENGINE-DRAFT`` for a draft model.
            LayoutError: ``Q-ENGINE-MODULE`` for latent attention that SGLang would absorb.
        """
        if self._plan is None:
            from quant_core.engines.packed import neutral
            from quant_core.engines.sharing import Account, open_plan

            _check_draft()
            with neutral():
                self._plan = open_plan(local_path(self.model or _model_path()), self.options)
            _check_container(self._plan)
            self.absorbed = _absorbed(self._plan)
            self.account = Account(self._plan)
        return self._plan

    def reopen(self, model: str) -> None:
        """Plan another checkpoint in place of this one; layers look their members up by name.

        Raises:
            CheckpointError: the new one cannot be opened; the old one stays.
            LayoutError: ``Q-ENGINE-RELOAD`` if other members are quantized.
        """
        from quant_core.engines.packed import neutral
        from quant_core.engines.sharing import open_plan
        from quant_core.engines.staged import cannot_reload

        old, path = self.plan, local_path(model)
        with neutral():
            plan = open_plan(path, self.options)
        if old.quantized.keys() != plan.quantized.keys():
            raise cannot_reload(f"{path} quantizes other layers")
        self.model, self._plan = path, plan
        assert self.account is not None
        self.account.plan = plan

    @property
    def names(self) -> Names:
        if self._names is None:
            from quant_core.engines.sharing import Names

            rename = None if self._mapper is None else self._mapper._map_name
            self._names = Names(self.plan, rename)
        return self._names

    @property
    def round(self) -> Round:
        """The packed layers of this model, which load again together."""
        if self._round is None:
            from quant_core.engines.sglang_slots import Round

            self._round = Round()
        return self._round

    @property
    def fused(self) -> dict[str, Sequence[str]]:
        """Last name of a fused module -> last names of its members."""
        declared = {k: v for k, v in self.packed_modules_mapping.items() if isinstance(v, list)}
        return {**_FUSED, **declared}

    def builder(self, plan: Plan, device: str, dtype: torch.dtype) -> Builder:
        from quant_core.build import Builder

        return Builder(plan=plan, device=device, dtype=dtype, kernels=self.options.kernels)

    # --------------------------------------------------------------------------------- the layers

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from quant_core.engines.sglang_layers import method_for

        return method_for(self, layer, prefix)

    def is_linear_unquantized(self, prefix: str) -> bool:
        """Asked before layers are built; takes nothing."""
        return not any(self.packs(m) for m in self.names.of(prefix, self.fused))

    @property
    def fed(self) -> bool:
        """Does ``sglang_loader`` load this model?"""
        return FED.get()

    def packs(self, member: Member) -> bool:
        """Is it quantized, and its layer ours?"""
        return member.quantized and member.layer.name not in self.absorbed

    def check_taken(self) -> None:
        """Once, when the model is built: every quantized member has a layer.

        Raises:
            CheckpointError: ``Q-TENSOR-UNEXPECTED``; ``Q-TENSOR-MISSING`` for float parameters.
        """
        if self.checked:
            return
        from quant_core.engines.complete import check_floats

        self.checked = True
        assert self.plan is not None
        assert self.account is not None
        layers = _num_layers()
        self.account.check(lambda name: _absent(name, layers))
        check_floats(self.plan, _hf_config())


def _of_draft(name: str, num_layers: int | None) -> bool:
    number = _LAYER_NUMBER.search(name)
    beyond = number and num_layers is not None and int(number[1]) >= num_layers
    return bool(beyond) or name.startswith("mtp.")


def _absent(name: str, num_layers: int | None) -> str:
    """Why this rank has no layer for a member; "" if there is no reason."""
    from sglang.srt.runtime_context import get_parallel

    if _of_draft(name, num_layers):
        return "layers of a draft model"
    return "held by another pipeline stage" if get_parallel().pp_size > 1 else ""


def _check_draft() -> None:
    from sglang.srt.runtime_context import get_flags

    from quant_core.errors import ConfigError

    if get_flags().moe.in_speculative_scope:
        raise ConfigError(
            f"draft model: its quantization is {METHOD!r}, expected none or one of SGLang's own: "
            "drafts name their layers apart from the checkpoint. Start with "
            "--speculative-draft-model-quantization unquant if the draft is stored as floats, "
            "without a draft otherwise.",
            code="Q-ENGINE-DRAFT",
            tensor="speculative_draft_model_quantization",
            actual=METHOD,
        )


def _check_container(plan: Plan) -> None:
    from quant_core.errors import ConfigError

    checkpoint = plan.checkpoint
    if checkpoint.container == "safetensors" or FED.get():
        return
    raise ConfigError(
        f"{checkpoint.path}: is a {checkpoint.container} checkpoint, expected safetensors: "
        "SGLang's own loaders read float parameters from nothing else. Start with --load-format "
        f"{LOAD_FORMAT}.",
        code="Q-ENGINE-CONTAINER",
        path=checkpoint.path,
        expected="safetensors",
        actual=checkpoint.container,
    )


def _absorbed(plan: Plan) -> frozenset[str]:
    """Latent attention (MLA): models split the weight of ``kv_b_proj`` in ``load_weights``.

    ``sglang_loader`` gives them its dequantized weight; to SGLang's own loaders it would be lost.

    Raises:
        LayoutError: ``Q-ENGINE-MODULE`` if it is packed and SGLang's own loader is at work.

    Source: SGLang 0.5.23, srt/models/deepseek_common/deepseek_weight_loader.py
    (post_load_weights); srt/models/{minicpm3,kimi_linear,longcat_flash}.py do the same.
    """
    from quant_core.errors import LayoutError, summarize

    layers = _num_layers()
    names = [n for n in plan.quantized if n.endswith(".kv_b_proj") and not _of_draft(n, layers)]
    if not names or FED.get():
        return frozenset(names)
    raise LayoutError(
        f"{plan.checkpoint.path}: {len(names)} layer(s) of latent attention are quantized: "
        f"{summarize(names)}; expected floats: SGLang splits their weights while it loads, before "
        f"packed layers exist. Start with --load-format {LOAD_FORMAT}, which gives it their "
        "dequantized weights.",
        code="Q-ENGINE-MODULE",
        path=plan.checkpoint.path,
        tensor=names[0],
    )


def _hf_config() -> Any:
    from sglang.srt.runtime_context import process_model_config

    return process_model_config().hf_config


def _num_layers() -> int | None:
    config = _hf_config()
    text = getattr(config, "get_text_config", lambda: config)()
    return getattr(text, "num_hidden_layers", None)


def _model_path() -> str:
    from sglang.srt.runtime_context import process_model_config

    return str(process_model_config().model_path)


def local_path(model: str) -> str:
    """Folder of a model; one that is a repository's id is looked up where SGLang put it."""
    if os.path.exists(model):
        return model
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model))
