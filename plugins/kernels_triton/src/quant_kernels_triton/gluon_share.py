"""How the blocks of a persistent Gluon kernel share tiles: whole ones first, the rest cut along K.

With T tiles of G groups for P programs, every program computes T // P - 1 whole tiles, number
``round * P + r``; the tiles that remain (less than 2 P) stand in one line of groups, of which
program r takes the r-th share. Shares are numbered against the programs: r = P - 1 - program, so a
program that waits for shares behind its own waits for programs that were started before it. With as
many programs as tiles a share is one whole tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["beginner", "groups_of", "segment", "segments", "share_start"]


@gluon.jit
def _rounds(tiles):
    return gl.maximum(tiles // gl.num_programs(0) - 1, 0)


@gluon.jit
def share_start(r, tiles, G):
    """First group of share ``r`` in the line of what is cut."""
    line = (tiles - _rounds(tiles) * gl.num_programs(0)) * G
    return r * (line // gl.num_programs(0)) + gl.minimum(r, line % gl.num_programs(0))


@gluon.jit
def _holder(group, line, programs):
    """The share that holds a group of the line: the first ones are one group larger."""
    size, rest = line // programs, line % programs
    big = rest * (size + 1)
    return gl.where(group < big, group // (size + 1), rest + (group - big) // gl.maximum(size, 1))


@gluon.jit
def segments(tiles, G):
    """How many tiles, whole or in part, this program computes."""
    r = gl.num_programs(0) - 1 - gl.program_id(0)
    u0 = share_start(r, tiles, G)
    u1 = share_start(r + 1, tiles, G)
    return _rounds(tiles) + gl.where(u1 > u0, gl.cdiv(u1, G) - u0 // G, 0)


@gluon.jit
def groups_of(tiles, G):
    """How many groups of columns this program computes."""
    r = gl.num_programs(0) - 1 - gl.program_id(0)
    return _rounds(tiles) * G + share_start(r + 1, tiles, G) - share_start(r, tiles, G)


@gluon.jit
def beginner(tiles, G):
    """The share with the first group of the tile in which this program's share begins."""
    programs = gl.num_programs(0)
    u0 = share_start(programs - 1 - gl.program_id(0), tiles, G)
    return _holder(u0 // G * G, (tiles - _rounds(tiles) * programs) * G, programs)


@gluon.jit
def segment(s, nm, nn, G, GN: gl.constexpr):
    """Segment ``s`` of this program.

    Returns:
        Block of outputs, block of rows, first and last + 1 group; if the tile begins but does not
        end here, the number of shares behind that hold the rest.
    """
    tiles = nm * nn
    programs = gl.num_programs(0)
    r = programs - 1 - gl.program_id(0)
    rounds = _rounds(tiles)
    u0 = share_start(r, tiles, G)
    u1 = share_start(r + 1, tiles, G)
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
