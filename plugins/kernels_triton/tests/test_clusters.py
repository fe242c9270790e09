"""Copies and arrivals of a cluster's programs in Triton's PTX."""

from __future__ import annotations

import pytest

from quant_kernels_triton.clusters import shared_copies

COPY = (
    "\t@%p16 cp.async.bulk.tensor.2d.shared::{space}.global.mbarrier::complete_tx::bytes [%r224],"
    " [%rd33, {{%r1574, %r225}}], [%r69];\n"
)
ARRIVAL = "\t@%p83 mbarrier.arrive.shared::cta.b64 _, [%r975];\n"
OTHERS = (
    "\t@%p15 mbarrier.arrive.expect_tx.shared.b64 _, [%r69], 32768;\n"
    "\tcp.async.mbarrier.arrive.noinc.shared.b64 \t[%r179];\n"
    "\tmbarrier.try_wait.parity.shared.b64 complete, [%r223], %r1579;\n"
)


@pytest.mark.parametrize("space", ["cluster", "cta"])  # as Triton 3.6 and 3.8 write it
def test_copies_and_arrivals_are_for_both_programs(space):
    got = shared_copies(COPY.format(space=space) + OTHERS + ARRIVAL).splitlines()
    assert got[0].strip() == (
        "{ .reg .b16 both; mov.b16 both, 3; @%p16 cp.async.bulk.tensor.2d.shared::cluster.global"
        ".mbarrier::complete_tx::bytes.multicast::cluster [%r224], [%rd33, {%r1574, %r225}],"
        " [%r69], both; }"
    )
    assert "\n".join(got[1:4]) + "\n" == OTHERS
    assert got[4].strip() == (
        "{ .reg .b32 there;"
        " mapa.shared::cluster.u32 there, %r975, 0;"
        " @%p83 mbarrier.arrive.shared::cluster.b64 _, [there];"
        " mapa.shared::cluster.u32 there, %r975, 1;"
        " @%p83 mbarrier.arrive.shared::cluster.b64 _, [there]; }"
    )


@pytest.mark.parametrize(
    "ptx",
    [
        OTHERS + ARRIVAL,  # nothing to share
        COPY.format(space="cta"),  # nobody releases a stage
        COPY.format(space="cta") + ARRIVAL + ARRIVAL.replace("_,", "%rd7,"),
        COPY.format(space="cta").replace("2d", "2d.im2col") + COPY.format(space="cta") + ARRIVAL,
    ],
)
def test_what_is_not_known_is_refused(ptx):
    with pytest.raises(ValueError, match="PTX of a cluster"):
        shared_copies(ptx)
