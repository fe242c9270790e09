"""Random canonical tensors of every kind the rewrites must keep exact."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from quant_core.packing import pack
from quant_core.spec import CHANNEL, TENSOR, Element, Packing, QuantSpec, Scale, Zero
from quant_core.tensors import LayerTensors, QuantizedTensor

torch.set_num_threads(1)

FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
FP4 = Element(name="fp4_e2m1", bits=4, kind="float")
NF4 = Element(name="nf4", bits=4, kind="lut")
PACKINGS = (
    Packing(),
    Packing(word="int32", k_major=True),
    Packing(word="int32"),
    Packing(word="int32", axis="out", k_major=True),
    Packing(word="int32", straddle=False),
)
AWQ = Packing(word="int32", axis="out", k_major=True, order=(0, 4, 1, 5, 2, 6, 3, 7))


def values(generator: torch.Generator, element: str, *shape: int) -> torch.Tensor:
    """Random stored scale values: no NaN, no zero divisors."""
    if element in ("f16", "bf16", "f32"):
        dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[element]
        return (torch.rand(shape, generator=generator) * 4 - 2).add(2.5).to(dtype)
    low, high = {"fp8_e4m3": (1, 120), "e8m0": (120, 134), "uint6": (0, 64)}[element]
    return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


def make(
    *,
    n: int,
    k: int,
    element: Element,
    scales: tuple[Scale, ...],
    zero: Zero | None = None,
    packing: Packing = PACKINGS[0],
    gather: bool = False,
    experts: int = 0,
    seed: int = 0,
) -> QuantizedTensor:
    """A tensor with random codes, scales, zeros and (with ``gather``) a random column order."""
    g = torch.Generator().manual_seed(seed)
    lead = (experts,) if experts else ()

    def grid(s: Scale) -> tuple[int, ...]:
        r, c = s.grain
        return (*lead, -(-n // (r or n)), -(-k // (c or k)))

    top = 0x7F if element is FP8 else 1 << element.bits  # below the NaN codes of fp8
    codes = torch.randint(0, top, (max(experts, 1), n, k), generator=g, dtype=torch.uint8)
    words = torch.stack([pack(c, element.bits, packing) for c in codes])
    order = None
    if gather:
        order = torch.randperm(k, generator=g).to(torch.int32)
        order[torch.rand(k, generator=g) < 0.1] = -1
    zeros = None
    if zero is not None and zero.kind == "code":
        bits = int(zero.element[4:])
        zeros = torch.randint(0, 1 << bits, grid(scales[0]), generator=g, dtype=torch.uint8)
    levels = zero.levels if zero is not None and zero.kind == "offset" else ()
    return QuantizedTensor(
        spec=QuantSpec(element=element, scales=scales, zero=zero, gather=gather),
        shape=(*lead, n, k),
        codes=words if experts else words[0],
        packing=packing,
        scales=tuple(values(g, s.element, *grid(s)) for s in scales),
        zeros=zeros,
        offset=tuple(values(g, s.element, *grid(s)) for s in levels),
        gather=order,
        codebook=(torch.linspace(-1, 1, 16).index_fill(0, torch.tensor([7]), 0.0),)
        if element is NF4
        else (),
    )


def layer(qt: QuantizedTensor, *, bias: bool = True, seed: int = 0) -> LayerTensors:
    g = torch.Generator().manual_seed(seed + 1000)
    n = qt.shape[-2]
    return LayerTensors(
        operands={"weight": qt},
        bias=torch.randn(*qt.shape[:-1], generator=g) if bias else None,
        acc_bias=torch.randint(-99, 99, (*qt.shape[:-2], n), generator=g, dtype=torch.int32)
        if bias
        else None,
    )


@st.composite
def tensors(
    draw: st.DrawFn,
    *,
    n: st.SearchStrategy[int] | None = None,
    k: st.SearchStrategy[int] | None = None,
    gather: bool | None = None,
    experts: bool = True,
) -> QuantizedTensor:
    """Any supported spec, packing and size, with tails on both axes."""
    size_n = draw(st.integers(1, 40) if n is None else n)
    size_k = draw(st.integers(1, 150) if k is None else k)
    element = draw(
        st.sampled_from([*(Element.uint(b) for b in range(2, 9)), Element.int(8), FP8, FP4, NF4])
    )
    fine_c = draw(st.sampled_from([0, 1, 8, 16, 32, 128]))
    fine = (draw(st.sampled_from([0, 1, 1, 3, 8])), fine_c)
    coarse = draw(st.sampled_from([TENSOR, CHANNEL, (1, 2 * fine_c), (4, 0)]))
    inverse = draw(st.booleans())
    scales = (Scale(element=draw(st.sampled_from(["f16", "f32", "fp8_e4m3"])), grain=fine),)
    if draw(st.booleans()):
        scales += (Scale(element=draw(st.sampled_from(["f32", "e8m0"])), grain=coarse),)
    elif inverse:
        scales = (Scale(element="f32", grain=fine, inverse=True),)
    zero = None
    if element.kind == "uint":
        level = Scale(element="f16", grain=fine)
        zero = draw(
            st.sampled_from(
                [
                    None,
                    Zero(kind="const", value=1 << (element.bits - 1)),
                    Zero(kind="code", element=element.name),
                    Zero(kind="offset", levels=(level,)),
                    Zero(
                        kind="offset",
                        levels=(
                            Scale(element="uint6", grain=fine),
                            Scale(element="f16", grain=coarse),
                        ),
                    ),
                ]
            )
        )
    packing = draw(st.sampled_from([*PACKINGS, AWQ] if element.bits == 4 else PACKINGS))
    return make(
        n=size_n,
        k=size_k,
        element=element,
        scales=scales,
        zero=zero,
        packing=packing,
        gather=draw(st.booleans()) if gather is None else gather,
        experts=draw(st.sampled_from([0, 0, 0, 2])) if experts else 0,
        seed=draw(st.integers(0, 999)),
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape and bits: -0.0 is not 0.0."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def snapshot(qt: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in qt.tensors().items()}


def unchanged(qt: QuantizedTensor, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in qt.tensors().items())
