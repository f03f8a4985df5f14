"""pair_products: how many numbers are multiplied for one pair of a query head and a key, by the kind of a step."""

from __future__ import annotations

from spdsl.ir.schedule import Kind

FORWARD = frozenset({Kind.FORWARD, Kind.DECODE, Kind.UNIT_FORWARD, Kind.UNIT_DECODE, Kind.PAIR_FORWARD})
DQ = frozenset({Kind.DQ, Kind.UNIT_DQ, Kind.PAIR_DQ})
DKDV = frozenset({Kind.DKDV, Kind.UNIT_DKDV, Kind.PAIR_DKDV})
SCORES = frozenset({Kind.SELECT, Kind.SCORE_UNITS})
KINDS = FORWARD | DQ | DKDV | SCORES
"""The steps whose products are those of pairs."""


def of_tiles(kind: Kind, qk: int, v: int) -> int:
    """Of a tile with these dims: a backward computes scores and dP once for dQ and once more for dK and dV."""
    if kind in SCORES:
        return qk
    return qk + v if kind in FORWARD else 2 * qk + v if kind in DQ else 2 * (qk + v)


def of_algorithm(kind: Kind, qk: int, v: int) -> int:
    """Of the five products of a backward three are those of dQ, and two those of dK and dV."""
    return qk + v if kind in DKDV else of_tiles(kind, qk, v)
