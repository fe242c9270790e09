"""A decoder layer of random weights, all that a step of it needs, and the same in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cpu_made import SPECS, make_layer, make_op
from quant_core.kernels.between import NORMS, Block, gated_op, norm_op
from quant_kernels_cpu.kernel import WnA16

HEADS, KV, DIM, HIDDEN, WIDE, ROOM = 4, 2, 16, 64, 96, 12
CPU = ("cpu", "")
DTYPE = torch.bfloat16
EPS = (1e-5, 1e-6, 1e-4, 1e-3)
SCALE = 0.02  # the scores differ by about 1
_QKV = [HEADS * DIM, KV * DIM, KV * DIM]
HOW = {
    "seven layers": {},
    "fused": {"qkv": 1, "sides": 1},
    "up first": {"sides": 1, "up_first": True},
    "head norms": {"head_norms": True},
    "all": {"qkv": 1, "sides": 1, "head_norms": True},
}


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(DTYPE)


class Made:
    """A layer, and all that a step needs."""

    def __init__(
        self, batch: int = 1, at: int = 5, *, qkv: int = 3, sides: int = 2,
        up_first: bool = False, head_norms: bool = False, hidden: int = HIDDEN, wide: int = WIDE,
    ) -> None:  # fmt: skip
        kernel, linears, self.buffers, self.dense = WnA16(), [], [], []
        groups = [[n] for n in _QKV] if qkv == 3 else [_QKV]
        groups = [(g, hidden) for g in groups] + [([hidden], HEADS * DIM)]
        groups += [([wide], hidden)] * 2 if sides == 2 else [([wide, wide], hidden)]
        for i, (rows, k) in enumerate([*groups, ([hidden], wide)]):
            lt = make_layer(SPECS["uint4 g32 f16 code"], sum(rows), k, seed=i)
            op = make_op("linear", lt, k)
            held = kernel.allocate(op)
            kernel.load_(held, op, lt, {"row": 0})
            linears.append(op)
            self.buffers.append(list(held.values()))
            self.dense += lt.weight.dequantize().split(rows)
        if up_first:
            self.dense[4:6] = self.dense[5], self.dense[4]
        norm = norm_op(hidden, NORMS[0], "bfloat16", CPU)
        heads = (norm_op(DIM, NORMS[1], "bfloat16", CPU),) * 2 if head_norms else ()
        block = Block(
            linears=tuple(linears), norms=(norm, norm, *heads), heads=HEADS, kv_heads=KV,
            head_dim=DIM, rotated=DIM, gated=gated_op(wide, "silu", "bfloat16", CPU), qkv=qkv,
            sides=sides, up_first=up_first,
        )  # fmt: skip
        self.run = kernel.bind_block(block)
        self.table = self.run.table(lambda: self.buffers)
        sizes = [hidden, hidden, DIM, DIM][: 2 + len(heads)]
        self.norms = tuple(1 + normal(n, seed=20 + i) / 4 for i, n in enumerate(sizes))
        self.eps = EPS[: len(sizes)]
        self.scale = 0.25 if heads else SCALE
        self.x = normal(batch, 1, hidden, seed=30)
        angle = torch.randn(batch, 1, DIM // 2, generator=torch.Generator().manual_seed(31))
        self.cos, self.sin = (
            f(torch.cat([angle] * 2, -1)).to(DTYPE) for f in (torch.cos, torch.sin)
        )
        self.keys, self.values = (normal(batch, KV, ROOM, DIM, seed=s) for s in (32, 33))
        self.at = torch.tensor([at])
        self.mask = (torch.arange(ROOM) <= at).expand(batch, 1, 1, ROOM)

    def arguments(self, **changes) -> tuple:
        """Of the operator, on copies of the cache."""
        given = {
            "x": self.x, "table": self.table.tensor, "norms": self.norms,
            "layout": self.run.text, "cos": self.cos, "sin": self.sin,
            "keys": self.keys.clone(), "values": self.values.clone(), "mask": self.mask,
            "at": self.at, "scale": self.scale, "eps": self.eps,
        }  # fmt: skip
        assert set(changes) <= set(given)
        return tuple((given | changes).values())

    def plain(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer in float64 of torch's own operators, and the keys that it writes."""
        batch = self.x.shape[0]
        w = [d.double() for d in self.dense]
        x, cos, sin = self.x.double(), self.cos.double()[:, None], self.sin.double()[:, None]

        def norm(x, i):
            mean = x.pow(2).mean(-1, keepdim=True)
            return self.norms[i].double() * x * torch.rsqrt(mean + EPS[i])

        def turn(x):
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        h = norm(x, 0)
        q, k, v = (
            (h @ w[i].T).view(batch, 1, n, DIM).transpose(1, 2)
            for i, n in ((0, HEADS), (1, KV), (2, KV))
        )
        if len(self.norms) == 4:
            q, k = norm(q, 2), norm(k, 3)
        keys, values = self.keys.double().clone(), self.values.double().clone()
        at = int(self.at)
        keys[:, :, at], values[:, :, at] = turn(k)[:, :, 0], v[:, :, 0]
        if mask.dtype != torch.bool:
            mask = mask.double()
        y = F.scaled_dot_product_attention(
            turn(q), keys, values, attn_mask=mask, scale=self.scale, enable_gqa=True
        )
        s = x + y.transpose(1, 2).reshape(batch, 1, -1) @ w[3].T
        h = norm(s, 1)
        return s + (F.silu(h @ w[4].T) * (h @ w[5].T)) @ w[6].T, keys[:, :, at]


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """bfloat16 between all operations: a dozen roundings of 2^-9 each, a softmax among them."""
    return bool(((got.double() - want).norm(dim=-1) <= 2.0**-5 * want.norm(dim=-1)).all())
