"""New weights from memory for a model that vLLM serves, as trainers send them.

vLLM hands a stream of tensors under the checkpoint's own names to the model, all at once or in
several parts. Packed layers have no parameters of those names, so the stream goes through here:

    float tensors of the model          go on as they are
    tensors of packed layers            wait, copied to the CPU, until their layer is complete;
                                        then tickets lead vLLM to it and it reads what waits

At most the layers that are incomplete wait, so a stream in the order of the model needs the memory
of one layer. Experts of one layer are one such layer.

Source: vLLM 0.32.0, model_executor/models/utils.py (AutoWeightsLoader.load_weights joins mappers
by ``|`` and calls ``apply``), model_executor/model_loader/reload/.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from quant_core.engines.sharing import stored_bias
from quant_core.engines.staged import cannot_reload, check_described, staged_plan, stored_names
from quant_core.errors import printable, summarize
from quant_core.plan import Member, member_parts

if TYPE_CHECKING:
    from quant_core.engines.vllm_config import QuantCoreConfig

__all__ = ["Refit", "RefitMapper", "tickets"]

log = logging.getLogger("quant_core")


def tickets(member: Member) -> Iterator[str]:
    """Names that lead vLLM to a packed member's layer.

    Raises:
        LayoutError: ``Q-ENGINE-RELOAD`` for experts that are stored as one tensor.
    """
    layer = member.layer
    if not layer.experts:
        yield f"{layer.name}.weight"
        return
    if layer.role:
        raise cannot_reload(f"the experts {layer.name} are stored as one tensor for all")
    module, _, last = layer.name.rpartition(".")
    yield f"{module}.{layer.experts[0]}.{last}.weight"


class Refit:
    """The tensors that wait, and which packed layer they are for.

    Made once for a loaded model; it lasts over the parts of one update, and over updates.
    """

    def __init__(self, config: QuantCoreConfig) -> None:
        plan, account = config.plan, config.account
        assert account is not None
        if plan.checkpoint.container != "safetensors":
            raise cannot_reload(
                f"they come from memory, and the model from a {plan.checkpoint.container} container"
            )
        self.plan = plan
        self.values: dict[str, Tensor] = {}
        self.public = {stored: name for name, stored in plan.dense.items()}
        self.members: dict[str, list[Member]] = {}  # engine's module -> its members
        for name, module in account.taken.items():
            self.members.setdefault(module, []).append(plan.members[name])
        self.needs = {m: self._needs(found) for m, found in self.members.items()}
        self.module_of = {n: m for m, names in self.needs.items() for n in names}
        self.biases = {
            name: f"{member.layer.name}.bias"
            for members in self.members.values()
            for member in members
            if member.quantized and not member.layer.experts
            for name in [stored_bias(plan, member)]
            if name is not None
        }
        every = (*plan.members.values(), *plan.attention.values())
        mine = {*self.module_of, *self.public}
        self.others = {n for m in every for _, n, _, _ in member_parts(m) if n not in mine}
        self.cache = {n for m in plan.attention.values() for _, n, _, _ in member_parts(m)}
        config.read_from(staged_plan(plan, self.values))

    def _needs(self, members: Iterable[Member]) -> set[str]:
        members = list(members)
        names = set(stored_names(self.plan, members))
        packed = (m for m in members if m.quantized and not m.layer.experts)
        return names | {n for m in packed if (n := stored_bias(self.plan, m)) is not None}

    def stream(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What goes on to the model in place of ``weights``.

        Raises:
            LayoutError: ``Q-ENGINE-RELOAD``.
        """
        for name, value in weights:
            yield from self._take(name, value)
        if self.values:
            log.warning(
                "%d tensor(s) wait for the others of their layers, which keep their old weights "
                "until then: %s",
                len(self.values),
                summarize(sorted(self.values), 3),
            )

    def _take(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        check_described(self.plan, name, value)
        if name in self.cache:
            old = self.plan.checkpoint.read(name)
            if not bool((old == value.detach().to("cpu", old.dtype)).all()):
                raise cannot_reload(
                    f"the scale {printable(name)!r} of the quantized cache changed", tensor=name
                )
            return
        module = self.module_of.get(name)
        if module is None:
            if name not in self.others and name not in self.plan.ledger.skipped:
                yield self.public.get(name, name), value
            return
        self.values[name] = value.detach().to("cpu", copy=True)
        if not self.needs[module] <= self.values.keys():
            return
        from quant_core.engines.vllm_layers import ticket

        for stored in sorted(self.needs[module] & self.biases.keys()):
            yield self.biases[stored], self.values[stored]
        for member in self.members[module]:
            if member.quantized:
                yield from ((n, ticket()) for n in tickets(member))
        for stored in self.needs[module]:
            del self.values[stored]


class RefitMapper(WeightsMapper):  # type: ignore[misc]
    """A mapper of names that puts ``Refit.stream`` before them, and stays one when joined."""

    refit: Refit
    config: QuantCoreConfig

    @classmethod
    def of(cls, config: QuantCoreConfig, refit: Refit) -> RefitMapper:
        return cls()._with(config, refit)

    def _with(self, config: QuantCoreConfig, refit: Refit) -> RefitMapper:
        self.config, self.refit = config, refit
        return self

    def _joined(self, mapper: Any) -> RefitMapper:
        fields = {k: v for k, v in vars(mapper).items() if k not in ("config", "refit")}
        return type(self)(**fields)._with(self.config, self.refit)

    def __or__(self, other: WeightsMapper) -> RefitMapper:
        return self._joined(WeightsMapper.__or__(self, other))

    def __ror__(self, other: WeightsMapper) -> RefitMapper:
        return self._joined(WeightsMapper.__or__(other, self))

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        self.config.feeding = True  # models that load their parts themselves ask again
        try:
            yield from super().apply(self.refit.stream(weights))
        finally:
            self.config.feeding = False
