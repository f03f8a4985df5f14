"""Calls of the tests of launches: patterns of every kind of step, their sizes, and what their modules really start."""

from __future__ import annotations

from types import ModuleType

import torch

from spdsl.ir.plan import Plan
from spdsl.ir.pool import Pool
from spdsl.ir.schedule import Stage
from spdsl.machine import survey
from spdsl.passes.count import Shape
from tests.cost.launched import Started, started
from tests.cost.plans import module_of, plan, plan_of_text, text_of

MEANS = """
pattern means {
    causal
    coarse = compress(32, 16, by = mean)
    return gate(attend(coarse), attend(sliding(64)))
}
"""
POOLS = """
pattern pools {
    causal
    sums = compress(32, 16, by = weighted)
    high = compress(32, 16, by = max)
    low  = compress(32, 16, by = min)
    return gate(attend(sums), attend(high), attend(low), attend(sliding(64)))
}
"""
EARLY = """
pattern early {
    causal
    z = stream(value = none)
    a = compress(32, 16, before = 16, by = mean)
    b = compress(32, 16, before = 16, by = max)
    c = compress(32, 16, before = 16, by = weighted)
    d = compress(32, 16, before = 16, by = mlp)
    e = compress(32, 16, before = 16, by = softmax(z))
    return gate(attend(a), attend(b), attend(c), attend(d), attend(e))
}
"""
UNION = """
pattern union {
    causal
    means = compress(32, 16)
    chosen = top_k(2, score = softmax(dot(means)), share = sum(group), unit = sum(64))
    return attend(chosen | sliding(64))
}
"""
# Scores that stand in memory: of cells of queries, and of two products.
CELLS = """
pattern of_cells {
    causal
    rank = softmax(antidiagonal(8))
    chosen = top_p(0.9, score = rank, share = head, rows = sum(64), unit = sum(64), force = last(1), most = 8)
    return attend(chosen) if prefill
    return attend(all)
}
"""
COMBINED = """
pattern combined {
    causal
    a = compress(32, 16)
    rank = relative(dot(a) - cosine(a))
    chosen = threshold(-1, score = rank, share = max(group), unit = max(64), force = last(1), most = 8)
    return attend(chosen)
}
"""
# Numbers of a list that the call says; torch computes them from one tensor.
LIMITS = """
pattern limits {
    causal
    most = tensor(int)
    near = top_k(most, score = dot(compress(64)), share = max(group), most = 4)
    return attend(near)
}
"""
SUNK = """
pattern sunk {
    causal
    s = tensor(head)
    z = tensor(head)
    both = merge(attend(sliding(16), sink_logit = s), attend(sink(4) - sliding(16), sink_logit = z))
    return gate(both, attend(all)), merge(attend(sliding(8)), attend(sink(2) - sliding(8)))
}
"""
BOTH_CASES = """
pattern both_cases {
    causal
    near = attend(sliding(32))
    return near if length < 100
    return merge(near, attend(sink(4) - sliding(32)))
}
"""
KEYS = """
pattern keys {
    causal
    latent = stream(heads = 1, v = 32, value = key)
    return gate(attend(latent), attend(latent[sliding(16)]))
}
"""
APART = """
pattern apart {
    causal
    a = attend(sliding(8))
    b = attend(sink(2) - sliding(8))
    return merge(a, b), a
}
"""
THREE = """
pattern three {
    causal
    a = attend(sliding(8))
    b = attend(sink(2) - sliding(8))
    return merge(a, b, attend(first(9) - sink(2) - sliding(8))), a
}
"""
# Sets that decode reads alone: the maps are made in any phase.
GIVEN = """
pattern given_in_decode {
    causal
    tiles = given(rows = 64, unit = 64, share = head)
    return attend(tiles) if decode
    return attend(all)
}
"""
DRAWN = """
pattern drawn_in_decode {
    allow(W404)
    return attend(random(3, unit = 64, rows = 64, seed = 0, share = head)) if decode
    return attend(all)
}
"""
BEFORE = """
pattern drawn_before {
    causal
    return attend(random(3, unit = 64, rows = 64, seed = 0, share = head)) if decode
    return attend(all)
}
"""
SUMS = """
pattern sums {
    causal
    return gate(attend(sliding(16)), attend(all), attend(sliding(4)))
}
"""
CASES = """
pattern cases {
    causal
    return attend(sliding(16)) if length < 100
    return attend(sliding(32)) if length < 200
    return attend(all)
}
"""
LONG = """
pattern long {
    causal
    coarse = attend(compress(32, 16))
    chosen = top_k(300, score = mass(coarse), share = group, unit = 64, force = last(1))
    every = threshold(0.1, score = dot(compress(16)), share = head, unit = max(16), least = 2)
    return gate(coarse, attend(chosen), attend(every))
}
"""
# Phases with a cache alone: no gradient is taken, so its kernels are not there.
DECODED = """
pattern decoded {
    causal
    coarse = attend(compress(32, 16))
    chosen = top_k(2, score = mass(coarse), share = group, unit = 64, force = last(1))
    return gate(coarse, attend(chosen), merge(attend(sliding(64)), attend(sink(4) - sliding(64)))) if decode
}
"""
FILLED = """
pattern filled {
    causal
    few = top_k(2, score = dot(compress(16)), share = head, unit = 16)
    return gate(attend(few), attend(dilated(64, 4), bias = 0.5 * (k - q))) if prefill
}
"""
COSINE = """
pattern cosines {
    causal
    near = threshold(0.1, score = cosine(compress(16)), share = max(group), least = 2, most = 8, force = last(1))
    return attend(near)
}
"""
TILED = """
pattern tiled {
    chosen = top_k(2, score = softmax(dot(compress(32, 16))), share = sum(group), unit = 64, rows = max(48))
    return attend(chosen)
}
"""
# Queries of cells: lists that are ranked and cut, and a branch whose rows stand for all queries of their cells.
QUERY_CELLS = """
pattern query_cells {
    q_mean = compress(16, of = q, by = mean, partial = keep)
    q_max  = compress(32, of = q, by = max, partial = keep)
    cells  = compress(16)
    coarse = attend(cells, query = q_mean)
    few    = top_k(3, score = mass(coarse), share = head)
    cut    = top_k(3, score = dot(cells, query = q_max), share = max(group), rows = max(64))
    return gate(coarse, attend(few), attend(cut)) if train
}
"""
CELLS_OF_A_PROMPT = """
pattern cells_of_a_prompt {
    causal
    q_mean = compress(8, of = q, by = mean, partial = keep)
    few    = top_k(3, score = softmax(dot(compress(16), query = q_mean)), share = head, force = last(1))
    return attend(few) if prefill
    return attend(few) if decode
}
"""
# One list for all queries of a call.
ALL_ROWS = tuple(
    f"pattern {name} {{ allow(W404) seen = softmax(dot(kv, query = {query})) "
    "chosen = top_k(3, score = seen, rows = sum(all), share = head, unit = sum(16)) return attend(chosen) }"
    for name, query in (("columns_of_all", "q"), ("columns_of_the_last", "tail(q, 48)"))
)
SHORT_CELLS = tuple(
    f"pattern short_by_{by} {{ causal cells = compress(16, by = {by}, partial = keep) "
    "few = top_k(3, score = dot(cells), share = head, force = last(1)) "
    "return attend(few) if prefill return attend(all) }"
    for by in ("mean", "max", "min")
)
LISTS_OF_CELLS = """
pattern lists_of_cells {
    allow(W404)
    rows = compress(8, of = q, by = mean, partial = keep)
    return attend(top_k(3, score = dot(compress(16), query = rows), share = head))
}
"""
BRANCHES_OF_CELLS = tuple(
    f"pattern {name} {{ allow(W404) rows = compress(16, of = q, by = {by}, partial = keep) "
    f"return gate({branches}, attend(sliding(16))) }}"
    for name, by, branches in (
        ("branch_of_means", "mean", "attend(compress(16), query = rows)"),
        ("branches_of_means", "mean", "attend(compress(16), query = rows), attend(compress(32), query = rows)"),
        ("branch_of_maxima", "max", "attend(compress(16), query = rows)"),
    )
)
# Units that tensors and another choice allow, which torch asks before they are scored.
NESTED = """
pattern nested {
    mark = tensor(token, bool)
    rank = softmax(dot(compress(32)))
    wide = top_k(2, score = rank, rows = sum(64), unit = sum(64), share = head)
    few = top_k(2, score = rank, rows = sum(32), share = head, within = wide, force = where(mark[k]))
    return attend(few | sliding(16))
}
"""
# Lists of the caller, which torch sorts in each call, and units that no block of keys lies in.
GIVEN_LISTS = """
pattern given_lists {
    causal
    near = given(most = 40)
    far = given(unit = 6, share = head)
    return gate(attend(near), attend(far | sliding(16)))
}
"""
SHORT = """
pattern short_units {
    causal
    coarse = attend(compress(16, 8))
    chosen = top_k(6, score = mass(coarse), share = group, unit = 8, force = last(1))
    return gate(coarse, attend(chosen))
}
"""
DECODED_LISTS = """
pattern decoded_lists {
    causal
    near = given(unit = 24, share = head, most = 5)
    return attend(near) if decode
    return attend(all)
}
"""
# Biases that learn: slopes, a table, a row and a key, in the forms of kernels. A read at [q][k] has no sums.
SLOPES = """
pattern slopes {
    causal
    s = tensor(head)
    t = tensor(head, 32)
    return attend(all, bias = s[h] * (q - k) + t[h][min(q - k, 31)])
}
"""
ROWS_AND_KEYS = """
pattern rows_and_keys {
    causal
    c = tensor(head, token)
    near = attend(sliding(16), bias = c[h][q] - c[h][k])
    return merge(near, attend(sink(4) - sliding(16), bias = c[h][q]))
}
"""
PAIR_BIAS = """
pattern pair_bias {
    p = tensor(token, token)
    return attend(all, bias = p[q][k]) if train
}
"""
MAPPED = """
pattern mapped {
    causal
    d = tensor(token, int)
    s = tensor(head)
    return attend(where(d[q] == d[k]), bias = s[h] * (q - k))
}
"""
OF_UNITS = """
pattern of_units {
    causal
    s = tensor(head)
    t = tensor(head, 32)
    chosen = top_k(2, score = dot(compress(16)), share = max(group), unit = 16, force = last(1))
    return attend(chosen, bias = s[h] * (q - k) + t[h][min(q - k, 31)])
}
"""
OF_PAIRS = """
pattern of_pairs {
    causal
    s = tensor(head)
    t = tensor(head, 32)
    chosen = top_k(2, score = dot(compress(16)), share = head, unit = 16, force = last(1))
    return attend(chosen, bias = s[h] * (q - k) + t[h][min(q - k, 31)])
}
"""
OF_CLASSES = """
pattern of_classes {
    causal
    s = tensor(head)
    return attend(dilated(8, 4), bias = s[h] * (q - k))
}
"""
LEARNED = (SLOPES, ROWS_AND_KEYS, PAIR_BIAS, MAPPED, OF_UNITS, OF_PAIRS, OF_CLASSES)
PARAMS = {"moba": {"block": 16}, "msa_minimax": {"block": 16}}
TOKENS = 256
PHASES = {"train": (Stage.FORWARD, Stage.BACKWARD), "prefill": (Stage.PREFILL,), "decode": (Stage.DECODE,)}
DIM = 64  # the head dim where a pattern leaves it open: tables go by it, and jobs are as long as their tiles

# A mask of the caller, and a bias for each pair: lists are made of what it says.
PAIRS = (
    "pattern pairs { causal m = tensor(query, token, bool) b = tensor(query, token) "
    "return attend(where(m[q][k]), bias = b[q][k]) }"
)


def pooled(pool: Pool, clipped: bool) -> str:
    """A pattern of the entries of one pool."""
    if not pool.named:
        more = ", before = 16" if clipped else ""
        score = f"cohesion(compress(32, 16{more}), by = {pool.name.split('_')[1]})"
        chosen = f"top_k(2, score = {score}, share = head, unit = max(64))"
        return f"pattern pooled_{pool.name}{'_clipped' * clipped} {{ causal c = {chosen} return attend(c) }}"
    by = f"{pool.name}(z)" if pool.weighs else pool.name
    cells = f"compress(32, 16{', before = 16' if clipped else ''}, by = {by})"
    z = "z = stream(value = none)" if pool.weighs else ""
    name = f"pooled_{pool.name}{'_clipped' * clipped}"
    return f"pattern {name} {{ causal {z} return gate(attend({cells}), attend(sliding(16))) }}"


def case(name: str, **more: int) -> tuple[ModuleType, Plan, Shape]:
    """A pattern by its name or its text, and the sizes of its call."""
    is_text, params = name.strip().startswith("pattern"), {**PARAMS.get(name, {}), **more}
    found = plan_of_text(name) if is_text else plan(name, **params)
    module = module_of(name if is_text else text_of(name), **params)
    heads, kv_heads = survey._heads(module)
    ((qk, v),) = survey._open_dims(module, [(DIM, DIM)])
    return module, found, Shape(survey.BATCH, heads, kv_heads, qk, v)


def recorded(module: ModuleType, shape: Shape, phase: str, tokens: int = TOKENS, learned: bool = False) -> Started:
    """In bf16 or float32, by the size of an element; `learned`: with gradients of what biases read."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.size]
    sizes = survey._Sizes(shape.heads, shape.kv_heads, shape.qk, shape.v, dtype)
    return started(module, phase, tokens, sizes, learned)


def both(real: Started, phase: str) -> list[tuple[Stage, list[str], int]]:
    """Kernels and the number of torch operators of each stage of a phase."""
    found = zip((real.kernels, real.back_kernels), (real.steps, real.back_steps), strict=True)
    return [(stage, names, sum(steps.values())) for stage, (names, steps) in zip(PHASES[phase], found, strict=False)]
