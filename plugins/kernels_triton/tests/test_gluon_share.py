"""The shares of a persistent Gluon kernel, run as plain Python: every group of every tile once."""

from __future__ import annotations

import types
from typing import Any

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

from quant_kernels_triton import gluon_share
from quant_kernels_triton.gluon_plan import cut

GN = 8


def plain(programs: int, program: int) -> dict[str, Any]:
    """The device functions with a language of Python integers."""
    words = types.SimpleNamespace(
        num_programs=lambda _: programs,
        program_id=lambda _: program,
        maximum=max,
        minimum=min,
        cdiv=lambda a, b: -(-a // b),
        where=lambda c, a, b: a if c else b,
    )
    scope: dict[str, Any] = {"gl": words}
    for name in (
        "_rounds",
        "_holder",
        "share_start",
        "beginner",
        "groups_of",
        "segments",
        "segment",
    ):
        made = getattr(gluon_share, name).fn
        scope[name] = types.FunctionType(made.__code__, scope)
    return scope


def beginners(tiles: int, groups: int, programs: int) -> list[int]:
    """``beginner`` of all shares."""
    made = (plain(programs, programs - 1 - r) for r in range(programs))
    return [f["beginner"](tiles, groups) for f in made]


def shares(nm: int, nn: int, groups: int, programs: int) -> list[list[tuple[int, ...]]]:
    """The segments of all shares."""
    out = []
    for r in range(programs):
        f = plain(programs, programs - 1 - r)
        count = f["segments"](nm * nn, groups)
        out.append([f["segment"](s, nm, nn, groups, GN) for s in range(count)])
    return out


@pytest.mark.parametrize(
    ("nm", "nn", "groups", "programs"),
    [(1, 224, 32, 132), (2, 224, 32, 132), (1, 32, 32, 132), (3, 11, 7, 132), (16, 37, 28, 132),
     (1, 2, 5, 10), (1, 1, 1, 1), (4, 5, 3, 20), (7, 9, 4, 8), (1, 3, 32, 96), (2, 3, 5, 29)],
)  # fmt: skip
def test_every_group_is_computed_once_and_owners_know_who_is_behind(nm, nn, groups, programs):
    held = shares(nm, nn, groups, programs)
    begins = beginners(nm * nn, groups, programs)
    seen: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    owners = {}
    for r, parts in enumerate(held):
        # a share writes its sums in one buffer: it may hold one tile that another began
        assert sum(k0 > 0 for _, _, k0, _, _ in parts) <= 1
        for pn, pm, k0, k1, other in parts:
            assert 0 <= k0 < k1 <= groups
            seen.setdefault((pn, pm), []).append((k0, k1, r))
            if k0 == 0:
                owners[pn, pm] = (r, other)
    assert len(seen) == nm * nn
    for tile, parts in seen.items():
        ordered = sorted(parts)
        assert [k0 for k0, _, _ in ordered] == [0, *(k1 for _, k1, _ in ordered[:-1])]
        assert ordered[-1][1] == groups
        r, behind = owners[tile]
        assert [q for _, _, q in ordered] == list(range(r, r + behind + 1))
        assert all(begins[q] == r for k0, _, q in ordered if k0 > 0)
    assert cut(nm * nn, groups, programs) == any(len(parts) > 1 for parts in seen.values())


def test_work_is_even():
    held = shares(1, 224, 32, 132)
    sizes = [sum(k1 - k0 for _, _, k0, k1, _ in parts) for parts in held]
    assert max(sizes) - min(sizes) <= 1


def test_groups_of_a_share_are_those_of_its_segments():
    for r, parts in enumerate(shares(3, 11, 7, 20)):
        assert plain(20, 19 - r)["groups_of"](33, 7) == sum(k1 - k0 for _, _, k0, k1, _ in parts)


def test_as_many_programs_as_tiles_get_one_each():
    assert all(p[0][2:] == (0, 7, 0) and len(p) == 1 for p in shares(3, 5, 7, 15))
