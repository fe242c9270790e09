"""From a plan to modules: load members one by one, fuse or compose, choose a kernel, bind.

Peak memory is what the modules keep plus one matrix: a stack of experts is loaded expert by
expert into allocated buffers, a fused layer member by member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quant_core.errors import LayoutError
from quant_core.fuse import Composite, fuse
from quant_core.kernels.ahead import compile_ahead
from quant_core.kernels.choose import Choice, Memo, choose
from quant_core.kernels.device import device_key
from quant_core.kernels.failed import allocated
from quant_core.kernels.transforms import transform_features
from quant_core.load import read_matrix, read_parameter
from quant_core.memory import written_whole
from quant_core.nn import (
    BoundMember,
    QuantComposite,
    QuantEmbedding,
    QuantExperts,
    QuantGrouped,
    QuantLinear,
    QuantModule,
)
from quant_core.parts import load_part_
from quant_core.plan import Member, Plan
from quant_core.registry import Registry
from quant_core.registry import registry as default_registry
from quant_core.scheme import Scheme
from quant_core.spec import OpSpec
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["Builder", "check_alike", "check_size", "op_spec"]

_LARGE = 1 << 20  # weights of a layer that takes long enough to load for compiling beside it


def _features(lt: LayerTensors) -> frozenset[str]:
    names = {
        name
        for name in ("bias", "acc_bias", "out_scale", "input_scale", "input_zero")
        if getattr(lt, name) is not None
    }
    if lt.bias is not None:
        names.add(f"bias:{str(lt.bias.dtype).removeprefix('torch.')}")
    if lt.weight.gather is not None:
        names.add("gather")
    return frozenset(names) | transform_features(lt.transforms)


def op_spec(
    kind: str,
    lt: LayerTensors,
    scheme: Scheme,
    *,
    device: str,
    dtype: torch.dtype,
    in_features: int | None = None,
    **sizes: int,
) -> OpSpec:
    """What a kernel is asked for one layer's tensors under its scheme; ``kind`` as ``OpSpec.op``.

    Operands that hold no tensors of their own (quantized activations) come from the scheme; so do
    the in_features, unless ``lt`` is a rank's part of it.
    """
    qt = lt.weight
    computed = ((r, s) for r, s in scheme.operands.items() if r not in lt.operands)
    return OpSpec(
        op=kind,  # type: ignore[arg-type]
        operands=(*((role, t.spec) for role, t in lt.operands.items()), *computed),
        packing=qt.packing,
        sizes=(("n", qt.shape[0]), ("k", in_features or scheme.shape[1]),
               ("k_stored", qt.shape[1]), *sizes.items()),
        act_dtype=str(dtype).removeprefix("torch."),
        device=device_key(device),
        features=_features(lt),
        transforms=tuple(t for t, _ in lt.transforms),
    )  # fmt: skip


def check_size(name: str, qt: QuantizedTensor, n: int | None, k: int | None, scheme_k: int) -> None:
    """The matrix has the sizes of the engine's layer, where those are given.

    Raises:
        LayoutError: ``Q-LAYOUT-SHAPE``.
    """
    found = (qt.shape[0], scheme_k)
    if (n, k) != (None, None) and found != (n, k):
        raise LayoutError(
            f"{name}: the checkpoint holds a {found[0]} x {found[1]} matrix, the model expects "
            f"{n} x {k}. config.json describes another model, or the checkpoint was cut.",
            code="Q-LAYOUT-SHAPE",
            tensor=name,
            expected=(n, k),
            actual=found,
        )


def check_alike(name: str, a: int, first: LayerTensors, b: int, other: LayerTensors) -> None:
    """Experts ``a`` and ``b`` of a stack have one layout.

    Raises:
        LayoutError: ``Q-LAYOUT-FUSED``.
    """
    one, two = first.weight, other.weight
    same = [t for t, _ in other.transforms] == [t for t, _ in first.transforms]
    same = same and (two.spec, two.shape) == (one.spec, one.shape)
    if not same or not all(map(torch.equal, two.codebook, one.codebook)):
        raise LayoutError(
            f"{name}: expert {b} is {two.spec.label} {two.shape}, expert {a} is {one.spec.label} "
            f"{one.shape}; expected one layout for the whole stack. Quantize all experts alike, "
            "and do not cut inside their groups.",
            code="Q-LAYOUT-FUSED",
            tensor=name,
            expected=one.spec.label,
            actual=two.spec.label,
        )


@dataclass(frozen=True, slots=True)
class _Chooser:
    """How a module chooses again after a move. Small: it must not keep the plan alive.

    A copy shares it; in another process it asks that process' own registry.
    """

    registry: Registry
    kernels: str | Sequence[str] | None
    module: str = ""

    def __call__(self, op: OpSpec, memo: Memo | None = None) -> Choice:
        return choose(op, self.registry, kernels=self.kernels, module=self.module, memo=memo)

    def __deepcopy__(self, memo: object) -> _Chooser:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _chooser_here, (self.kernels, self.module)


def _chooser_here(kernels: str | Sequence[str] | None, module: str) -> _Chooser:
    return _Chooser(default_registry(), kernels, module)


@dataclass(slots=True, kw_only=True)
class Builder:
    """Builds the modules of one model from one plan.

    Attributes:
        device: where buffers are allocated.
        dtype: the model's float dtype; only embeddings need it.
        kernels: names to allow, as in ``choose``.
        choices: (module name, choice) of everything built, for reports.
        memo: choices by operation; most layers of a model ask the same.
    """

    plan: Plan
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    kernels: str | Sequence[str] | None = None
    choices: list[tuple[str, Choice]] = field(default_factory=list)
    memo: Memo = field(default_factory=dict)

    def _chooser(self, module: str) -> _Chooser:
        return _Chooser(self.plan.registry, self.kernels, module)

    def _chosen(self, name: str, op: OpSpec) -> tuple[Choice, _Chooser]:
        """Who runs ``op`` in the module ``name``; what that compiles is begun at the first one."""
        chooser, known = self._chooser(name), len(self.memo)
        choice = chooser(op, self.memo)
        self.choices.append((name, choice))
        if len(self.memo) > known and op.size("n") * op.size("k") >= _LARGE:
            compile_ahead(choice.kernel, choice.op)
        return choice, chooser

    def op_for(
        self,
        kind: str,
        lt: LayerTensors,
        member: Member,
        *,
        in_features: int | None = None,
        **sizes: int,
    ) -> OpSpec:
        """What a kernel is asked for one layer's tensors; ``kind`` as ``OpSpec.op``.

        Operands that hold no tensors of their own (quantized activations) come from the scheme
        of ``member``; so do the in_features, unless ``lt`` is a rank's part of it.
        """
        assert isinstance(member.scheme, Scheme)
        return op_spec(
            kind, lt, member.scheme, device=self.device, dtype=self.dtype,
            in_features=in_features, **sizes,
        )  # fmt: skip

    def _bind(
        self, cls: type[QuantModule], name: str, op: OpSpec, lt: LayerTensors,
        members: Sequence[BoundMember],
    ) -> QuantModule:  # fmt: skip
        choice, chooser = self._chosen(name, op)
        with written_whole():
            buffers = allocated(choice.kernel, choice.op, self.device, name, choice.trace)
        load_part_(choice, buffers, lt, {"row": 0}, name)
        return cls(choice, buffers, members, chooser)

    # ---------------------------------------------------------------------------------- floats

    def taken(self, parameter: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A float parameter of the model from elsewhere than the checkpoint; here never."""
        return None

    def parameter(self, name: str) -> Tensor:
        """A float tensor of the checkpoint by its public name, as the model wants it."""
        return read_parameter(self.plan, name)

    def filled(self, parameter: str, value: Tensor) -> None:
        """Told of every float parameter that was read."""

    # ---------------------------------------------------------------------------------- layers

    def matrix(self, member: Member) -> LayerTensors:
        """The matrix of a member that is no stack."""
        return read_matrix(self.plan, member)

    def linear(
        self, name: str, members: Sequence[Member], *, n: int | None = None, k: int | None = None
    ) -> nn.Module:
        """A linear layer from its members in row order (usually one).

        Args:
            n, k: sizes the engine's layer has, checked against the checkpoint.

        Raises:
            LayoutError: ``Q-LAYOUT-SHAPE`` if they disagree.
            KernelError: nothing can run it.
        """
        loaded, rows = [], 0
        bound: list[BoundMember] = []
        k_model = members[0].scheme.shape[1]  # type: ignore[union-attr]
        for m in members:
            lt = self.matrix(m)
            stop = rows + lt.weight.shape[0]
            bound.append(
                BoundMember(name=m.layer.name, start=rows, stop=stop, packing=lt.weight.packing)
            )
            rows = stop
            loaded.append(lt)
        if len(members) == 1:
            check_size(name, loaded[0].weight, n, k, k_model)
            return self._bind(
                QuantLinear, name, self.op_for("linear", loaded[0], members[0]), loaded[0], bound
            )
        fused = fuse(loaded, [m.scheme.operands.get("input") for m in members])  # type: ignore[union-attr]
        if not isinstance(fused, Composite):
            op = self.op_for("linear", fused, members[0])
            return self._bind(QuantLinear, name, op, fused, bound)
        parts = []
        for start, lt in fused.parts:
            stop = start + lt.weight.shape[0]
            first = next(i for i, b in enumerate(bound) if b.start == start)
            mine = [b for b in bound if start <= b.start < stop]
            mine = [replace(b, start=b.start - start, stop=b.stop - start) for b in mine]
            op = self.op_for("linear", lt, members[first])
            parts.append(self._bind(QuantLinear, f"{name}[{start}:{stop}]", op, lt, mine))
        return QuantComposite(parts, fused.reason)  # type: ignore[arg-type]

    def embedding(
        self, name: str, member: Member, *, n: int | None = None, k: int | None = None
    ) -> QuantEmbedding:
        """An embedding table; its kernel also serves a tied lm_head."""
        lt = self.matrix(member)
        k_model = member.scheme.shape[1]  # type: ignore[union-attr]
        check_size(name, lt.weight, n, k, k_model)
        bound = BoundMember(
            name=member.layer.name, start=0, stop=lt.weight.shape[0], packing=lt.weight.packing
        )
        module = self._bind(QuantEmbedding, name, self.op_for("embedding", lt, member), lt, [bound])
        assert isinstance(module, QuantEmbedding)
        return module

    def _stack(self, name: str, member: Member) -> QuantGrouped:
        """One stack of experts, read expert by expert into the kernel's buffers."""
        ids = member.layer.experts
        first = read_matrix(self.plan, member, ids[0])
        op = self.op_for("grouped_linear", first, member, experts=len(ids))
        choice, chooser = self._chosen(name, op)
        with written_whole():  # every expert is loaded below
            buffers = allocated(choice.kernel, choice.op, self.device, name, choice.trace)
        for i, e in enumerate(ids):
            lt = first if i == 0 else read_matrix(self.plan, member, e)
            check_alike(name, ids[0], first, e, lt)
            load_part_(choice, buffers, lt, {"row": 0, "expert": i}, name)
        bound = BoundMember(
            name=member.layer.name, start=0, stop=first.weight.shape[0],
            packing=first.weight.packing,
        )  # fmt: skip
        return QuantGrouped(choice, buffers, [bound], chooser)

    def experts(
        self,
        name: str,
        *,
        gate: Member,
        up: Member,
        down: Member,
        activation: Callable[[Tensor], Tensor] | None,
        gating: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> QuantExperts:
        """The routed experts of one layer; gate, up and down may be of different types.

        Args:
            activation: act of act(gate) * up; None if there is a gating.
            gating: what is computed of gate and up instead.
        """
        counts = {m.layer.name: m.layer.experts for m in (gate, up, down)}
        if len(set(counts.values())) != 1:
            raise LayoutError(
                f"{name}: stacks hold {[len(c) for c in counts.values()]} experts, expected the "
                "same experts in gate, up and down. The checkpoint is incomplete.",
                code="Q-TENSOR-MISSING",
                tensor=name,
                actual=counts,
            )
        return QuantExperts(
            self._stack(f"{name}.gate", gate),
            self._stack(f"{name}.up", up),
            self._stack(f"{name}.down", down),
            activation,
            len(gate.layer.experts),
            gating,
        )
