"""One change at a time in what gives biases their gradients; the checks beside must see each of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.library import broken
from tests.numerics.cases import Shape, checked
from tests.numerics.conftest import Engine
from tests.numerics.patterns import printed

TABLE = "causal t = tensor(head, 40) return attend(all, bias = t[h][min(q - k, 39)])"
ENTRIES = "t = tensor(head, 40) return attend(all, bias = t[h][(q + k) % 40])"
SLOPES = "causal s = tensor(head) return attend(all, bias = s[h] * (k - q))"
ROWS = "causal c = tensor(token) return attend(sliding(20), bias = c[q] * (q - k))"
KEYS = "causal c = tensor(head, token) return attend(sliding(20), bias = c[h][k])"
PAIRS = "p = tensor(token, token) return attend(sliding(20), bias = p[q][k])"
CHOSEN = "c = top_k(2, score = dot(compress(16)), share = max(group), unit = 16)"
UNITS = f"causal t = tensor(head, 20) {CHOSEN} return attend(c, bias = t[h][min(q - k, 19)])"
TIES = "causal s = tensor(head) return attend(all, bias = max(s[h], 0) * k)"
JOINT = "causal a = tensor() return merge(attend(sliding(9), bias = a * k), attend(sink(3) - sliding(9), bias = a * q))"
SHAPE = Shape(34, 34, batch=2, heads=2, kv_heads=1)


class Bug(NamedTuple):
    title: str
    pattern: str
    old: str
    new: str


KERNELS = [
    Bug("a part of the table left out", TABLE, "tiles * rt.chunks_of(T)", "tiles * (rt.chunks_of(T) - 1)"),
    Bug("all parts begin with entry 0", TABLE, "% T.CHUNKS * T.CHUNK", "% T.CHUNKS * 0"),
    Bug("the greatest entry of a tile left out", ENTRIES, "tl.range(least, greatest + 1)", "tl.range(least, greatest)"),
    Bug("the least entry of a tile left out", ENTRIES, "tl.range(least, greatest", "tl.range(least + 1, greatest"),
    Bug("the last entry of a part left out", ENTRIES, "(entry < T.CHUNK)", "(entry < T.CHUNK - 1)"),
    Bug("a part of another table left out", ENTRIES, "tiles * rt.chunks_of(T)", "tiles * (rt.chunks_of(T) - 1)"),
    Bug("distances of a tile off by one", TABLE, "+ (C.BLOCK_N - 1) - distance", "+ C.BLOCK_N - distance"),
    Bug("some distances of a tile left out", TABLE, "static_range(0, T.DISTANCES", "static_range(T.STEP, T.DISTANCES"),
    Bug("the first row of all tiles", TABLE, "first_row = tl.min(rows.position)", "first_row = 0"),
    Bug("tiles that meet a part in few distances", TABLE, "least + tl.arange(0, T.DISTANCES)",
        "least + 0 * tl.arange(0, T.DISTANCES)"),
    Bug("diagonals beyond the tile", TABLE, "tl.where(there, own, 0.0)", "own"),
    Bug("hidden pairs among the entries", "t = tensor(9) return attend(sliding(9), bias = t[abs(q - k) % 9])",
        's = tl.where(seen, s, float("-inf"))\n    p = tl.exp2(s * attend_unit(C) - grads.lse)\n\n    v0',
        "p = tl.exp2(s * attend_unit(C) - grads.lse)\n\n    v0"),
    Bug("one tile for all", SLOPES, "sums += tl.sum(ds, 1)", "sums = tl.sum(ds, 1)"),
    Bug("batch rows not added", SLOPES, "accumulate=True", "accumulate=False"),
    Bug("no derivative", SLOPES, "(ds * attend_dbias_0_slope(", "(ds + 0 * attend_dbias_0_slope("),
    Bug("a row's number is that of the next", ROWS, "_0_place(rows.position, 0", "_0_place(rows.position + 1, 0"),
    Bug("one head for the keys of a group", KEYS, "rt.store_key_values(rt.at(sums, s, h,",
        "rt.store_key_values(rt.at(sums, s, kv_head * C.GROUP,"),
    Bug("the last head alone", PAIRS, "tl.load(pointers, mask=there, other=0.0) + x", "x"),
    Bug("one head of all", PAIRS, "tl.program_id(1) * heads + heads)", "tl.program_id(1) * heads + 1)"),
    Bug("tables of packed heads as one", UNITS, "(rows.head - h) * T.ENTRIES", "0 * rows.head"),
    Bug("a tie goes to both sides", "s = tensor(head) return attend(all, bias = max(s[h], s[h // 2]) * k)",
        "tl.where(a == b, 0.5, 0.0)", "tl.where(a == b, 1.0, 0.0)"),
    Bug("one part of a joint", JOINT, "found[name].add_(grad) if name in found else grad", "grad"),
]  # fmt: skip
CPU = [
    Bug("tiles not added", SLOPES, "accumulate=True", "accumulate=False"),
    Bug("no derivative", SLOPES, "ds[tile] * read.slope(q_at, k_at)", "ds[tile]"),
    Bug("the first tile for all", ROWS,
        "first = q_origin + call.first + tile * call.rows", "first = q_origin + call.first + 0 * tile"),
    Bug("sign of dlse", TABLE, ".sum(-1, keepdim=True) - dlse)", ".sum(-1, keepdim=True) + dlse)"),
    Bug("units without their bias", UNITS, "read.slope(*on_pairs.places)", "0.0"),
    Bug("tokens of the first sequence", UNITS, "number.long() - least,", "number.long() * 0,"),
]  # fmt: skip


@pytest.mark.parametrize("bug", KERNELS, ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_in_the_kernels_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    module = kernels(broken(printed(bug.pattern), bug.old, bug.new, tmp_path))
    with pytest.raises(AssertionError):
        checked(bug.pattern, SHAPE, module=module)


@pytest.mark.parametrize("bug", CPU, ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_on_the_cpu_path_is_seen(cpu: Engine, bug: Bug, tmp_path: Path) -> None:
    module = cpu(broken(printed(bug.pattern), bug.old, bug.new, tmp_path))
    with pytest.raises(AssertionError):
        checked(bug.pattern, Shape(1400, 1400) if "tile" in bug.title else SHAPE, module=module)


@pytest.mark.parametrize("body", sorted({bug.pattern for bug in (*KERNELS, *CPU)}))
def test_the_same_checks_pass_without_a_bug(engine: Engine, body: str) -> None:
    if engine.name == "interpreted" and body not in (TABLE, ENTRIES, PAIRS):
        pytest.skip("as in test_bias_gradients")
    checked(body, SHAPE, module=engine(body))
