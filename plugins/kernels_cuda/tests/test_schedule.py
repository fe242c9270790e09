"""How a call is cut: what is launched covers every column of every row exactly once, and fits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_cases import SPECS, make_layer, make_op
from quant_kernels_cuda import ops
from quant_kernels_cuda.schedule import candidates, schedule
from quant_kernels_cuda.variant import Variant, describe

CLUSTERS = (66, 42, 31, 24, 19, 15, 14)  # of 2, 3, ... 8 blocks that run at once
H100 = (132, 232448, CLUSTERS)  # multiprocessors, bytes of shared memory
SMALL = (28, 101376, ())


def variant(name, n, k):
    op = make_op(make_layer(SPECS[name], 16, 128), k)
    v = describe(replace(op, sizes=(("n", n), ("k", k))))
    assert isinstance(v, Variant)
    return v


def resident_parts_of(v, s):
    """The same for csrc/resident.cu; and that sums of a batch have places of their own."""
    out = []
    for walker in range(s.walkers):
        tiles = s.tiles // s.walkers + (walker < s.tiles % s.walkers)
        for rank, warp in itertools.product(range(s.cluster), range(s.warps)):
            g0 = rank * s.slice
            count = min(v.groups, g0 + s.slice) - g0
            slots = min(s.slots, count)
            few, more = divmod(count, slots)
            assert few <= 4, "what the kernel counts to"
            team, slot = divmod(warp, s.slots)
            if team >= s.sets or slot >= slots:
                continue
            first, mine = g0 + slot * few + min(slot, more), few + (slot < more)
            assert 1 <= mine <= s.gpc, "groups that a warp has registers for"
            for i, tile in enumerate(range(team, tiles, s.sets)):
                place = i % (s.batch // s.sets) * s.sets + team
                assert place == tile % s.batch, "a tile's place in its batch"
                out.append((walker + tile * s.walkers, first, mine))
    return out


def parts_of(v, s):
    """(tile, first group, groups) of every chunk, as csrc/decode.cu walks the line of chunks."""
    if s.kernel == "resident":
        return resident_parts_of(v, s)
    out = []
    for walker in range(s.walkers):
        tiles = s.tiles // s.walkers + (walker < s.tiles % s.walkers)
        for rank in range(s.cluster):
            g0 = rank * s.slice
            g1 = min(v.groups, g0 + s.slice)
            phases = -(-(g1 - g0) // s.span) if s.span < s.slice else 1
            sizes = [min(s.span, g1 - g0 - p * s.span) for p in range(phases)]
            for warp in range(s.warps):
                phase, tile, run, slots = 0, 0, warp, {}
                while True:
                    while phase < phases:
                        chunks = -(-sizes[phase] // s.gpc)
                        runs = -(-chunks // (1 << s.run))
                        if run < runs:
                            break
                        run, tile = run - runs, tile + 1
                        if tile == tiles:
                            tile, phase = 0, phase + 1
                    if phase == phases:
                        break
                    slots.setdefault((phase, tile), run)
                    assert slots[phase, tile] < min(s.slots, s.warps), "a warp's place in the sums"
                    for chunk in range(run << s.run, min((run + 1) << s.run, chunks)):
                        first = g0 + phase * s.span + chunk * s.gpc
                        out.append((walker + tile * s.walkers, first, min(s.gpc, g1 - first)))
                    run += s.warps
    return out


@settings(deadline=None)
@given(
    name=st.sampled_from(["int4_g128", "int8_channel", "int4_two_level", "fp4_e4m3_g16"]),
    n=st.integers(1, 700),
    k=st.integers(1, 90).map(lambda v: 32 * v),
    m=st.integers(1, 16),
    pick=st.integers(0, 10**6),
    limits=st.sampled_from([H100, SMALL, (4, 232448, (2, 1, 1))]),
)
def test_every_cut_covers_every_group_of_every_tile_once(name, n, k, m, pick, limits):
    v = variant(name, n, k)
    found = candidates(v, m, *limits)
    if not found:
        return
    s = found[pick % len(found)][1]
    assert s.shared <= limits[1]
    assert s.warps <= 32
    if s.kernel == "resident":
        assert s.slots * s.sets <= s.warps
        fp4 = dict(v.defines)["IN_WEIGHT"] == "1" and v.bits == 4
        halves = s.gpc > 3 or (fp4 and s.gpc > 1)  # as csrc/resident.cu compiles it
        assert s.run >= 1 or halves, "half a stage is asked for where the code can"
        assert s.run < s.stages
    assert s.tiles * 16 * s.rt <= n + -n % 64, "reads no tile beyond the buffer"
    seen = sorted((tile, group + i) for tile, group, count in parts_of(v, s) for i in range(count))
    assert seen == [(t, g) for t in range(s.tiles) for g in range(v.groups)]


@pytest.mark.parametrize("limits", [H100, SMALL])
@pytest.mark.parametrize("k", [32, 4096, 14336, 53248])
@pytest.mark.parametrize("name", ["int4_g128", "int4_two_level", "int6_two_level", "int8_g32"])
def test_one_row_always_fits_and_more_are_sliced(name, k, limits):
    v = variant(name, 4096, k)
    for m in (1, 7, 16, 1000):
        s = schedule(v, m, *limits)
        assert 1 <= s.m <= min(m, 16)
        assert s.nt == (1 if s.m <= 8 else 2)


def test_no_clusters_where_the_device_has_none():
    v = variant("int4_g128", 256, 14336)
    assert {s.cluster for _, s in candidates(v, 1, *SMALL)} == {1}
    assert {s.cluster for _, s in candidates(v, 1, *H100)} == set(range(1, 9))


@pytest.mark.parametrize("m", [1, 8, 16])
def test_no_more_clusters_are_launched_than_run_at_once(m):
    for _, s in candidates(variant("int4_g128", 4096, 14336), m, *H100):
        assert s.walkers <= (132, *CLUSTERS)[s.cluster - 1]


def test_reordered_columns_and_experts_stay_with_the_general_kernel():
    v = variant("int4_g128", 4096, 4096)
    assert {s.kernel for _, s in candidates(v, 16, *H100)} == {"decode", "resident"}
    for other in (replace(v, gather=True), replace(v, op="grouped_linear", experts=8)):
        assert {s.kernel for _, s in candidates(other, 1, *H100)} == {"decode"}


@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (28672, 4096), (4096, 4096), (200, 1056)])
def test_buckets_run_all_code_that_any_number_of_rows_runs(n, k, monkeypatch):
    v = variant("int4_g128", n, k)
    monkeypatch.setattr(ops, "device_limits", lambda _device: (*H100, "90"))

    def code(rows):
        s = ops._schedule(v, rows, 0)
        assert s.m == rows
        assert s.shared <= H100[1]
        return s.kernel, ops._defines(v, s)

    assert {code(m) for m in range(1, 17)} == {code(m) for m in (1, 2, 4, 8, 16)}


def test_a_row_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="does not fit 1000 bytes"):
        schedule(variant("int4_g128", 64, 128), 1, 132, 1000, ())


@given(divisor=st.integers(1, 1 << 16), data=st.data())
def test_division_by_multiplication_is_exact(divisor, data):
    x = data.draw(st.integers(0, ((1 << 32) - 1) // divisor))
    inverse = ops._inverse(divisor)
    assert 0 <= inverse < 1 << 32
    assert (x * inverse >> 32 if inverse else x) == x // divisor
