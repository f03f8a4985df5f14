"""Faults that change no number in the interpreter, or only sometimes: the sanitizer must see each of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import spdsl
from spdsl.codegen.standalone import standalone
from spdsl.ir.pattern import Pattern
from tests.library import broken, package_from
from tests.numerics.patterns import pattern_of, text_of
from tests.numerics.test_gathered import CHOSEN, GIVEN
from tests.sanitizer.cases import Case, packed, paged, train
from tests.sanitizer.faults import Fault
from tests.sanitizer.mode import sanitized

OUTSIDE, UNWRITTEN, OWNERS = "no element of the tensor", "nothing was ever written there", "writes there, too"


def middle(module: ModuleType, _: Pattern) -> None:
    """Two rows of a batch of four."""
    q, k, v = (torch.randn(4, 2, 37, 16, dtype=torch.float64)[1:3] for _ in "qkv")
    module.attention(q, k, v)


class Seed(NamedTuple):
    title: str
    case: Case
    wrong: str
    old: str
    new: str


FORWARD = "attend_forward, (triton.cdiv(layout.longest, config.block_m), q.shape[1], sequences"
SEEDS = [
    Seed("mask left out of a load", train, OUTSIDE,
        "tl.load(pointers + column, mask=there[:, None], other=0.0)", "tl.load(pointers + column)"),
    Seed("gap behind the columns", train, OUTSIDE,
        "mask=there[:, None] & (column < DIM), other=0.0", "mask=there[:, None], other=0.0"),
    Seed("gap between the rows", train, OUTSIDE,
        "return x.data + tl.cast(token, tl.int64) * x.token", "return x.data + tl.cast(token, tl.int64) * 24"),
    Seed("mask left out of a store", train, OUTSIDE,
        "element_ty), mask=(row < left) & (column < DIM)", "element_ty), mask=column < DIM"),
    Seed("offset by one block", train, OUTSIDE,
        "start = tl.cast(block.number, tl.int64) * C.BLOCK_N",
        "start = (tl.cast(block.number, tl.int64) + 1) * C.BLOCK_N"),
    Seed("one head too many", train, OUTSIDE, FORWARD, FORWARD.replace("q.shape[1]", "q.shape[1] + 1")),
    Seed("one sequence too many", packed, OUTSIDE, FORWARD, FORWARD + " + 1"),
    Seed("one split too many", paged, OWNERS,
        "attend_decode, (batch, heads // group, splits)", "attend_decode, (batch, heads // group, splits + 1)"),
    Seed("two owners of equal sums", train, OWNERS,
        "row = tile * C.BLOCK_M\n    left = q_count - row\n    out =",
        "row = tile // 2 * C.BLOCK_M\n    left = q_count - row\n    out ="),
    Seed("rows in no sequence have no output", packed, UNWRITTEN,
        "return q.new_zeros(*q.shape[:3], v_dim)", "return q.new_empty(*q.shape[:3], v_dim)"),
    Seed("lse of a split that nobody writes", paged, UNWRITTEN,
        "m + tl.log2(total), mask=row < C.GROUP)", "m + tl.log2(total), mask=row < 0)"),
    Seed("page that was never written", paged, UNWRITTEN, "pages + start // C.PAGE", "pages + start // C.PAGE + 1"),
    Seed("token behind the last", paged, UNWRITTEN,
        "return Block(number, keys.count - start, position)", "return Block(number, keys.count + 1 - start, position)"),
    Seed("row of another batch", middle, OUTSIDE,
        "tl.cast(s, tl.int64) * x.batch", "(tl.cast(s, tl.int64) - 1) * x.batch"),
    Seed("length that another program moves on", paged, "another program of the launch",
        "position = tl.load(call.spans + 2 * s + 1) + token",
        "position = tl.load(call.spans + 2 * s + 1) + token\n    tl.store(call.spans + 3 - 2 * s, call.added)"),
    Seed("sum without an order", train, "an atomic operation",
        "tl.store(token_pointer(x, row)", "tl.atomic_add(token_pointer(x, row)"),
]  # fmt: skip

PAIR = "b = tensor(query, token) return attend(all, bias = b[q][k])"
TOKENS, EIGHT = GIVEN["tokens"], CHOSEN["units of 8"]
PAIRS = "p = tensor(query, token) return attend(sliding(20), bias = p[q][k]) if train"
TABLE = "causal t = tensor(40) return attend(all, bias = t[min(q - k, 39)]) if train"
GATHERED = [
    (PAIRS, Seed("heads that add to one element apart", train, "another program of the launch",
        "return 1 if by_head else heads, 1", "return 1, 1")),
    (TABLE, Seed("entries behind a table", train, OWNERS,
        "tl.store(x.data + entry, sums, mask=entry < T.TOTAL)", "tl.store(x.data + entry, sums)")),
    (PAIR, Seed("rows behind the last", train, OUTSIDE, "(q < t.b_rows) & (k < t.b_1_size)", "(k < t.b_1_size)")),
    (PAIR, Seed("tokens behind the width", train, OUTSIDE, "(q < t.b_rows) & (k < t.b_1_size)", "(q < t.b_rows)")),
    (PAIR, Seed("rows of no sequence", packed, UNWRITTEN,
        "return row - origin, origin", "return row + 1 - origin, origin")),
    (TOKENS, Seed("keys that are not there", train, OUTSIDE,
        "mask=there[:, None], other", "mask=there[:, None] | True, other")),
    (EIGHT, Seed("places behind a list", train, OUTSIDE,
        "visit.units + place, mask=place < visit.count", "visit.units + place, mask=place >= 0")),
    (EIGHT, Seed("masks of places behind a list", train, OUTSIDE,
        "visit.masks + place, mask=place < visit.count", "visit.masks + place, mask=place >= 0")),
    (TOKENS, Seed("a word too many", train, OUTSIDE, "U.WORDS + bit // 64", "U.WORDS + bit // 32")),
    (TOKENS, Seed("a gathered token behind the last", paged, UNWRITTEN,
        "block = Block(token, keys.count - token,", "block = Block(token, keys.count + 1 - token,")),
    (EIGHT, Seed("a unit's token behind the last", packed, UNWRITTEN,
        "block = Block(token, keys.count - token,", "block = Block(token, keys.count + 7 - token,")),
    (TOKENS, Seed("columns behind the head dim", train, OUTSIDE,
        "mask=there[:, None] & (column < DIM), other", "mask=there[:, None], other")),
]  # fmt: skip


@cache
def causal() -> str:
    return spdsl.compile(text_of("causal")).text


@pytest.mark.interpret
@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.title.replace(" ", "_"))
def test_a_fault_is_seen(seed: Seed, tmp_path: Path) -> None:
    module = broken(causal(), seed.old, seed.new, tmp_path)
    with sanitized(), pytest.raises(Fault, match=seed.wrong):
        seed.case(module, pattern_of("causal"))


@pytest.mark.interpret
@pytest.mark.parametrize(
    "body, seed", GATHERED, ids=lambda one: one.title.replace(" ", "_") if isinstance(one, Seed) else one[:9]
)
def test_a_fault_of_gathered_keys_is_seen(body: str, seed: Seed, tmp_path: Path) -> None:
    """Without it the same calls pass: `test_kernels`."""
    module = broken(spdsl.compile(text_of(body)).text, seed.old, seed.new, tmp_path)
    with sanitized(), pytest.raises(Fault, match=seed.wrong):
        seed.case(module, pattern_of(body))


@pytest.mark.interpret
def test_results_that_nobody_writes_are_seen(tmp_path: Path) -> None:
    """No kernel reads them, but the caller will."""
    old, new = "v_dim), q.new_full(q.shape[:3], -torch.inf,", "v_dim), q.new_empty(q.shape[:3],"
    module = broken(causal(), old, new, tmp_path)
    with sanitized(), pytest.raises(AssertionError, match="never written"):
        packed(module, pattern_of("causal"))


@pytest.mark.interpret
@pytest.mark.parametrize("case", [middle, packed], ids=lambda case: case.__name__)
def test_the_same_calls_pass_without_a_fault(case: Case, tmp_path: Path) -> None:
    with sanitized():
        case(package_from(standalone(causal()), tmp_path), pattern_of("causal"))
