"""Two programs of a cluster that share what they copy: Triton's PTX, rewritten.

    copies by tensor map   go into the shared memory of both programs, at the same place, and count
                           at the barrier that lies at the same place in each
    arrivals               count at the barriers of both

Gluon has neither (Triton 3.6 to 3.8). A kernel whose constant ``CLUSTER`` is 2 says the rest:
each program copies its half of x, and a stage is free once the consumers of both have released it.
``direct`` launches it with two programs to a cluster; Triton's own launcher cannot.

Source: PTX ISA 8.7 (cp.async.bulk.tensor, .multicast::cluster; mapa; mbarrier.arrive).
"""

from __future__ import annotations

import re

__all__ = ["CLUSTER", "shared_copies"]

CLUSTER = "CLUSTER"
"""The constant that says how many programs a cluster has."""

_COPY = re.compile(
    r"(@%p\d+) cp\.async\.bulk\.tensor\.(\d)d\.shared::(?:cluster|cta)\.global"
    r"\.mbarrier::complete_tx::bytes (\[%r\d+\], \[%rd\d+, \{[^}]*\}\], \[%r\d+\]);"
)
_TO_BOTH = (
    r"{ .reg .b16 both; mov.b16 both, 3; \1 cp.async.bulk.tensor.\2d.shared::cluster.global"
    r".mbarrier::complete_tx::bytes.multicast::cluster \3, both; }"
)
_ARRIVAL = re.compile(r"(@%p\d+) mbarrier\.arrive\.shared::cta\.b64 _, \[(%r\d+)\];")
_AT_ONE = (
    r" mapa.shared::cluster.u32 there, \2, RANK;"
    r" \1 mbarrier.arrive.shared::cluster.b64 _, [there];"
)
_AT_BOTH = "{ .reg .b32 there;" + "".join(_AT_ONE.replace("RANK", r) for r in "01") + " }"


def shared_copies(ptx: str) -> str:
    """``ptx`` with every copy and every arrival for both programs of the cluster.

    Raises:
        ValueError: a copy or an arrival is written in a way that is not known here.
    """
    copies = ptx.count("cp.async.bulk.tensor.")
    arrivals = ptx.count(" mbarrier.arrive.shared")
    ptx, copied = _COPY.subn(_TO_BOTH, ptx)
    ptx, arrived = _ARRIVAL.subn(_AT_BOTH, ptx)
    if not copied or not arrived or (copied, arrived) != (copies, arrivals):
        raise ValueError(
            f"PTX of a cluster: {copied} of {copies} copies and {arrived} of {arrivals} arrivals "
            "are known, expected all of them. Use Triton 3.6 to 3.8."
        )
    return ptx
