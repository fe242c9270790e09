"""How the blocks of a persistent Gluon kernel share tiles: whole ones first, the rest cut along K.

With T tiles of G groups for P programs, every program computes T // P - 1 whole tiles, number
``round * P + r``; the tiles that remain (less than 2 P) stand in one line of groups, of which
program r takes the r-th share. Shares are numbered against the programs: r = P - 1 - program, so a
program that waits for shares behind its own waits for programs that were started before it. With as
many programs as tiles a share is one whole tile.

Programs of a cluster share together: what is a program and a tile here is then a cluster, and as
many tiles side by side, one for each of its programs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["beginner", "groups_of", "number", "segment", "segments", "share_start"]


@gluon.jit
def _programs(CLUSTER: gl.constexpr):
    if CLUSTER == 1:
        return gl.num_programs(0)
    else:
        return gl.num_programs(0) // CLUSTER


@gluon.jit
def number(CLUSTER: gl.constexpr = 1):
    """The share of this program, or of its cluster."""
    if CLUSTER == 1:
        return gl.num_programs(0) - 1 - gl.program_id(0)
    else:
        return _programs(CLUSTER) - 1 - gl.program_id(0) // CLUSTER


@gluon.jit
def _rounds(tiles, programs):
    return gl.maximum(tiles // programs - 1, 0)


@gluon.jit
def share_start(r, tiles, G, programs):
    """First group of share ``r`` in the line of what is cut."""
    line = (tiles - _rounds(tiles, programs) * programs) * G
    return r * (line // programs) + gl.minimum(r, line % programs)


@gluon.jit
def _holder(group, line, programs):
    """The share that holds a group of the line: the first ones are one group larger."""
    size, rest = line // programs, line % programs
    big = rest * (size + 1)
    return gl.where(group < big, group // (size + 1), rest + (group - big) // gl.maximum(size, 1))


@gluon.jit
def segments(tiles, G, CLUSTER: gl.constexpr = 1):
    """How many tiles, whole or in part, this program computes."""
    programs = _programs(CLUSTER)
    r = number(CLUSTER)
    u0 = share_start(r, tiles, G, programs)
    u1 = share_start(r + 1, tiles, G, programs)
    return _rounds(tiles, programs) + gl.where(u1 > u0, gl.cdiv(u1, G) - u0 // G, 0)


@gluon.jit
def groups_of(tiles, G, CLUSTER: gl.constexpr = 1):
    """How many groups of columns this program computes."""
    programs = _programs(CLUSTER)
    r = number(CLUSTER)
    cut = share_start(r + 1, tiles, G, programs) - share_start(r, tiles, G, programs)
    return _rounds(tiles, programs) * G + cut


@gluon.jit
def beginner(tiles, G, CLUSTER: gl.constexpr = 1):
    """The share with the first group of the tile in which this program's share begins."""
    programs = _programs(CLUSTER)
    u0 = share_start(number(CLUSTER), tiles, G, programs)
    return _holder(u0 // G * G, (tiles - _rounds(tiles, programs) * programs) * G, programs)


@gluon.jit
def segment(s, nm, nn, G, GN: gl.constexpr, CLUSTER: gl.constexpr = 1):
    """Segment ``s`` of this program.

    Returns:
        Block of outputs, block of rows, first and last + 1 group; if the tile begins but does not
        end here, the number of shares behind that hold the rest.
    """
    tiles = nm * nn
    programs = _programs(CLUSTER)
    r = number(CLUSTER)
    rounds = _rounds(tiles, programs)
    u0 = share_start(r, tiles, G, programs)
    u1 = share_start(r + 1, tiles, G, programs)
    at = u0 // G + (s - rounds)
    whole = s < rounds
    tile = gl.where(whole, s * programs + r, rounds * programs + at)
    k0 = gl.where(whole, 0, gl.maximum(u0 - at * G, 0))
    k1 = gl.where(whole, G, gl.minimum(u1 - at * G, G))
    holder = _holder((at + 1) * G - 1, (tiles - rounds * programs) * G, programs)
    other = gl.where(whole, 0, gl.maximum(holder - r, 0))
    first = tile // (GN * nm) * GN  # GN blocks of outputs share x in the cache
    wide = gl.minimum(nn - first, GN)
    pn = first + (tile % (GN * nm)) % wide
    pm = (tile % (GN * nm)) // wide
    return pn, pm, k0, k1, other
