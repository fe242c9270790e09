"""Kernels for ``gpu_sanitizer.py`` of which it is known what the tools have to say.

    right      two groups of warps sum, one hands its sums over: it stores them in shared memory
               and arrives at an mbarrier, the other waits and adds them
    early      as that, but the other does not wait
    reused     as that, twice over one buffer, though nobody says that it has been read
    beyond     a store behind the end of a tensor

``right`` takes on, one by one, what kernels of this project do before they hand sums over: stages
that come by TMA and are used again (RING), products of warpgroups (MMA), copies by ``cp.async``
(COPY); and one of the groups is late. So what a tool says of such a kernel can be compared with
what it says of the same hand-over alone.

The same hand-over in CUDA, without Triton: 128 threads store, 128 others wait and load.

    cuda elected   the group meets at a barrier, then one thread arrives: right
    cuda warps     each warp meets, then its first thread arrives: right
    cuda every     every thread arrives: right
    cuda none      one thread arrives at once: a race
"""

from __future__ import annotations

import itertools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["CONTROLS", "run_control"]

_BLOCKS, _STAGES, _STEPS, _SIZE = 4, 4, 12, 64
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.8, 3.6


@gluon.jit
def _sleep():
    gl.inline_asm_elementwise(
        "nanosleep.u32 900000; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _fetch(xd, xs, full, empty, STEPS: gl.constexpr, ST: gl.constexpr, RING: gl.constexpr):
    if RING:
        st = 0
        ph = 1
        for k in range(STEPS):
            mbarrier.wait(empty.index(st), ph)
            mbarrier.expect(full.index(st), xd.block_type.nbytes)
            tma.async_copy_global_to_shared(xd, [0, k * 64], full.index(st), xs.index(st))
            st += 1
            if st == ST:
                st = 0
                ph ^= 1


@gluon.jit
def _side(xs, ws, sums, full, empty, done, W, V, Y, ROW: gl.constexpr, STEPS: gl.constexpr,
          ST: gl.constexpr, RING: gl.constexpr, MMA: gl.constexpr, COPY: gl.constexpr,
          WAIT: gl.constexpr, TIMES: gl.constexpr, LATE: gl.constexpr):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    WL: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    words = gl.arange(0, 512, layout=WL)
    if COPY:
        async_copy.async_copy_global_to_shared(ws.index(ROW), W + ROW * 512 + words)
        async_copy.commit_group()
    acc = gl.zeros([64, 64], gl.float32, mma)
    st = ROW
    ph = 0
    for _ in range(ROW, STEPS, 2):
        if RING:
            mbarrier.wait(full.index(st), ph)
        x = xs.index(st)
        if MMA:
            t = warpgroup_mma(x, x.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(t,))
        else:
            acc += x.load(mma).to(gl.float32)
        if RING:
            mbarrier.arrive(empty.index(st), count=1)
        st += 2
        if st >= ST:
            st -= ST
            ph ^= 1
    if COPY:
        async_copy.wait_group(0)
        gl.store(V + (gl.program_id(0) * 2 + ROW) * 512 + words, ws.index(ROW).load(WL))
    total = acc
    if ROW == LATE:
        _sleep()
    for turn in gl.static_range(TIMES):
        if ROW == 1:
            sums.store(acc + turn)
            mbarrier.arrive(done, count=1)
        else:
            if WAIT:
                mbarrier.wait(done, turn % 2)
            total += sums.load(mma)
    if ROW == 0:
        n = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        m = gl.arange(0, 64, layout=gl.SliceLayout(0, mma))
        gl.store(Y + gl.program_id(0) * 4096 + n[:, None] * 64 + m[None, :], total)


@gluon.jit
def handed(xd, X, W, V, Y, STEPS: gl.constexpr, ST: gl.constexpr, RING: gl.constexpr,
           MMA: gl.constexpr, COPY: gl.constexpr, WAIT: gl.constexpr,
           TIMES: gl.constexpr, LATE: gl.constexpr):  # fmt: skip
    xs = gl.allocate_shared_memory(gl.bfloat16, [ST, 64, 64], xd.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ws = gl.allocate_shared_memory(gl.int32, [2, 512], FLAT)
    SS: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [64, 64], SS)
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if RING:
        for i in gl.static_range(ST):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
    else:
        L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        r = gl.arange(0, 64, layout=gl.SliceLayout(1, L))
        c = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
        for i in gl.static_range(ST):
            xs.index(i).store(gl.load(X + r[:, None] * (STEPS * 64) + i * 64 + c[None, :]))
    mbarrier.init(done, count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_side, (xs, ws, sums, full, empty, done, W, V, Y, 0, STEPS, ST, RING, MMA, COPY, WAIT,
                     TIMES, LATE)),
            (_side, (xs, ws, sums, full, empty, done, W, V, Y, 1, STEPS, ST, RING, MMA, COPY, WAIT,
                     TIMES, LATE)),
            (_fetch, (xd, xs, full, empty, STEPS, ST, RING)),
        ],
        [4, 1],
        [128, 24],
    )  # fmt: skip


@gluon.jit
def beyond(Y, N: gl.constexpr, PAST: gl.constexpr):
    i = gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(Y + i + PAST, i)


_CUDA = """extern "C" __global__ void handed_cuda(const int* x, int* y) {
  __shared__ int sums[128];
  __shared__ unsigned long long done;
  const int t = threadIdx.x % 128, first = t / 32 * 32;
  const unsigned bar = (unsigned)__cvta_generic_to_shared(&done);
  if (threadIdx.x == 0)
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(bar), "r"(COUNT) : "memory");
  __syncthreads();
  if (threadIdx.x >= 128) {
    sums[t] = x[blockIdx.x * 128 + t] * 3 + 1;
    MEET
    if (ARRIVES)
      asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }" :: "r"(bar) : "memory");
  } else {
    int complete = 0;
    while (!complete)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], 0;"
                   " selp.b32 %0, 1, 0, p; }" : "=r"(complete) : "r"(bar) : "memory");
    y[blockIdx.x * 128 + t] = sums[t];
  }
}
"""
_BARRIER = 'asm volatile("bar.sync 2, 128;" ::: "memory");'
_WAYS = {
    "cuda elected": ("1", _BARRIER, "t == 0"),
    "cuda warps": ("4", "__syncwarp();", "t == first"),
    "cuda every": ("128", "", "true"),
    "cuda none": ("1", "", "t == 0"),
}


def _run_cuda(name: str) -> list[str]:
    count, meet, arrives = _WAYS[name]
    source = _CUDA.replace("COUNT", count).replace("MEET", meet).replace("ARRIVES", arrives)
    run = torch.cuda._compile_kernel(source, "handed_cuda", compute_capability="90")
    x = torch.randint(0, 99, (_BLOCKS, 128), dtype=torch.int32, device="cuda")
    y = torch.full_like(x, -1)
    run(grid=(_BLOCKS, 1, 1), block=(256, 1, 1), args=(x, y))
    torch.cuda.synchronize()
    return [] if name == "cuda none" or torch.equal(y, x * 3 + 1) else ["values differ"]


def _name(ring: bool, mma: bool, copy: bool) -> str:
    more = [n for n, on in (("ring", ring), ("mma", mma), ("copy", copy)) if on]
    return " ".join(["right", *more])


CONTROLS: dict[str, dict[str, bool | int]] = (
    {
        _name(*flags): dict(zip(("RING", "MMA", "COPY"), flags, strict=True))
        for flags in itertools.product((False, True), repeat=3)
    }
    | {
        "right taker late": {"LATE": 0},
        "right giver late": {"LATE": 1},
        "right ring mma taker late": {"RING": True, "MMA": True, "LATE": 0},
        "right ring mma giver late": {"RING": True, "MMA": True, "LATE": 1},
        "early": {"WAIT": False},
        "reused": {"TIMES": 2},
        "beyond": {"PAST": 64},
        "within": {},
    }
    | {name: {} for name in _WAYS}
)
"""name -> how it differs from the plain hand-over; "beyond" and "within" are one store."""


def run_control(name: str) -> list[str]:
    """One launch; what is wrong with its results, "early", "reused" and "beyond" left aside."""
    if name in _WAYS:
        return _run_cuda(name)
    if name in ("beyond", "within"):
        y = torch.full((128,), -1, dtype=torch.int32, device="cuda")
        beyond[(1,)](y, 128, CONTROLS[name].get("PAST", 0), num_warps=4)
        torch.cuda.synchronize()
        return [] if name == "beyond" or int(y.min()) == 0 else ["a store within is missing"]
    blocks = torch.randint(-1, 2, (64, _STAGES * _SIZE), device="cuda").bfloat16()
    x = blocks.repeat(1, _STEPS // _STAGES).contiguous()
    w = torch.randint(0, 99, (2, 512), dtype=torch.int32, device="cuda")
    v = torch.full((_BLOCKS, 2, 512), -1, dtype=torch.int32, device="cuda")
    y = torch.full((_BLOCKS, 64, 64), float("nan"), device="cuda")
    box = [64, _SIZE]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    made = dict.fromkeys(("RING", "MMA", "COPY"), False) | {"WAIT": True, "TIMES": 1, "LATE": -1}
    made |= CONTROLS[name]
    desc = TensorDescriptor(x, list(x.shape), [x.shape[1], 1], box, layout)
    handed[(_BLOCKS,)](desc, x, w, v, y, STEPS=_STEPS, ST=_STAGES, num_warps=4, **made)
    torch.cuda.synchronize()
    parts = x.double().view(64, _STEPS, _SIZE).transpose(0, 1)
    want = (parts @ parts.transpose(1, 2) if made["MMA"] else parts).sum(0)
    wrong = []
    if name not in ("early", "reused") and not torch.equal(y.double(), want.expand_as(y)):
        wrong.append("sums differ")
    if made["COPY"] and not torch.equal(v, w.expand_as(v)):
        wrong.append("copies differ")
    return wrong
