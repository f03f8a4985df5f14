"""Which cases the suite has. What tells most stands first: what the time does not reach is listed as such."""

from __future__ import annotations

from benchmarks.baselines import nsa as peers
from benchmarks.gpu.patterns import Case
from benchmarks.nsa import loops

LENGTHS = (65536, 8192, 32768, 131072)
SHAPE: Case = {"heads": 64, "kv_heads": 4, "dtype": "bfloat16", "by": "mlp", "lists": "own", "params": {}}
DIMS = ((128, 128), (192, 128))
SMALL: Case = {
    "heads": 4,
    "kv_heads": 2,
    "params": {"width": 8, "stride": 4, "block": 16, "count": 4, "window": 20},
}
SMALL_DIMS, SMALL_LENGTHS = ((16, 16), (32, 16)), (96,)
CHECKED = (8192 + 67, 65536)  # tokens of the checks; the first is a multiple of nothing
MOST_CHECKED = 65536  # tokens: beyond, the float32 copies of the reference may not fit
STEPS = ((1, 64), (16, 64))  # batch, page
BACKENDS = ("flash", "cudnn")
GROUPS, SMALL_GROUPS = (1, 2, 4, 8, 16), (1, 2)  # heads that share a list


def shapes(dry: bool, lengths: list[int] | None, all_dims: bool = True) -> list[Case]:
    shape = SHAPE | (SMALL if dry else {})
    dims = SMALL_DIMS if dry else DIMS
    found = list(lengths or (SMALL_LENGTHS if dry else LENGTHS))
    return [
        shape | {"dim": dim, "v_dim": v_dim, "tokens": tokens}
        for dim, v_dim in (dims if all_dims else dims[:1])
        for tokens in found
    ]


def checked(dry: bool, lengths: list[int] | None) -> list[Case]:
    """Numerics with the module's choice and with lists of both kinds, and the choice itself."""
    wanted = lengths or (SMALL_LENGTHS if dry else CHECKED)
    rows: list[Case] = []
    few = [tokens for tokens in wanted if tokens <= MOST_CHECKED]
    for shape in shapes(dry, few) if few else []:
        rows += [shape | {"kind": "nsa_selected"}, shape | {"kind": "nsa_attended"}]
        rows += [shape | {"kind": "nsa_attended", "lists": name} for name in ("random", "clustered")]
    return sorted(rows, key=lambda row: row["tokens"])


def timed(dry: bool, lengths: list[int] | None) -> list[Case]:
    cases: list[Case] = [{"kind": "ceilings"}]
    for shape in shapes(dry, lengths, all_dims=not dry):
        cases += [shape | {"kind": "nsa_counted"}, shape | {"kind": "nsa_whole"}]
        cases += [shape | {"kind": "nsa_dense", "backend": name} for name in BACKENDS]
        cases += steps(shape)
        cases += branches(shape)
        cases += [shape | {"kind": "nsa_whole", "lists": name} for name in ("random", "clustered")]
        cases += others(shape)
    for shape in shapes(dry, lengths, all_dims=False)[:2]:
        cases += both_loops(shape, SMALL_GROUPS if dry else GROUPS)
    return cases


def both_loops(shape: Case, groups: tuple[int, ...]) -> list[Case]:
    """Queries and keys outermost over the same lists, by the heads of a list."""
    return [
        shape | {"kind": "nsa_loop", "kv_heads": shape["heads"] // group, "lists": kind, "outer": outer}
        for group in groups
        for kind in ("clustered", "random")
        for outer in loops.OUTERMOST
    ]


def branches(shape: Case) -> list[Case]:
    found = [
        shape | {"kind": "nsa_branch", "branch": name} for name in ("coarse", "scored", "select", "near", "entries")
    ]
    return found + [
        shape | {"kind": "nsa_branch", "branch": "fine", "lists": name} for name in ("own", "random", "clustered")
    ]


def steps(shape: Case) -> list[Case]:
    found = []
    for batch, page in STEPS:
        found += [shape | {"kind": "nsa_decode", "batch": batch, "page": page}]
        found += [shape | {"kind": "nsa_dense_decode", "batch": batch, "backend": name} for name in BACKENDS]
    return found


def others(shape: Case) -> list[Case]:
    """Peers, and ours with the entries that they make: the mean of a cell."""
    found = [shape | {"kind": "nsa_whole", "by": "mean"}]
    for name in peers.NAMES:
        found += [shape | {"kind": "nsa_peer", "peer": name, "branch": one} for one in ("whole", "scored", "coarse")]
        found += [
            shape | {"kind": "nsa_peer", "peer": name, "branch": "fine", "lists": kind}
            for kind in ("random", "clustered")
        ]
    return found


def warmed(cases: list[Case]) -> list[list[Case]]:
    """What compiles something, once each: by kind, dims and branch, at the shortest length."""
    groups: dict[str, Case] = {}
    for case in cases:
        if case["kind"] in ("nsa_whole", "nsa_branch", "nsa_decode", "nsa_peer", "nsa_loop"):
            names = ("kind", "dim", "v_dim", "branch", "peer", "by", "page", "outer", "kv_heads")
            own = " ".join(str(case.get(name)) for name in names)
            known = groups.get(own)
            if known is None or case["tokens"] < known["tokens"]:
                groups[own] = case | {"once": True}
    return [[case] for case in groups.values()]
