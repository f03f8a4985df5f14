"""What the plan counts against masks of the oracle, pair by pair."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import pytest
import sympy
import torch

from spdsl.compiler import plan_of
from spdsl.cost.kernels import added
from spdsl.cost.machine import Machine
from spdsl.cost.phases import Stage, kernels
from spdsl.cost.reads import step_reads
from spdsl.diagnostics import Report, Source
from spdsl.ir.pattern import Pattern, Phase, Softmax
from spdsl.ir.plan import Plan
from spdsl.ir.symbols import LENGTH, Boolean
from spdsl.oracle.dense import visible
from spdsl.oracle.sizes import sizes_of
from spdsl.passes.count import Count, Number, Shape, shape_of
from spdsl.passes.lower import lower
from spdsl.passes.visible import DependsOnData
from spdsl.resources import folder
from spdsl.syntax.parse import parse
from tests.oracle import built

HEADS, KV_HEADS, DIM = 4, 2, 4
MACHINE = Machine("sm_90", 132)
SMALL: dict[str, dict[str, int]] = {
    "nsa": {"width": 8, "stride": 4, "block": 16, "count": 4, "window": 10},
    "moba": {"block": 16, "count": 3},
    "infllm_v2": {"block": 32, "count": 2, "local": 2},
    "streaming_llm": {"sinks": 3, "window": 20},
    "dilated": {},
    "sparse_transformer": {},
    "causal": {},
    "early": {},
}
EARLY = f"""
pattern early {{
    heads  query = {HEADS}, kv = {KV_HEADS}
    causal
    entries = compress(12, 4, before = 7)
    coarse = attend(entries)
    chosen = top_k(3, score = mass(coarse), unit = 16, force = first(1) | last(1))
    return gate(coarse, attend(chosen))
}}
"""
LENGTHS = (1, 7, 8, 31, 64, 77, 130)


def text_of(name: str) -> str:
    """The pattern with small numbers in place of those it fixes."""
    text = EARLY if name == "early" else (folder("patterns") / f"{name}.spat").read_text()
    changes = {
        "query = 64, kv = 4": f"query = {HEADS}, kv = {KV_HEADS}",
        "query = 32, kv = 2": f"query = {HEADS}, kv = {KV_HEADS}",
        "length < 8192": "length < 64",
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


@cache
def plan(name: str, text: str | None = None, **params: int) -> Plan:
    return plan_of(Source(text or text_of(name)), None, {key: Fraction(value) for key, value in params.items()})


def count(name: str, length: int) -> tuple[Plan, Count]:
    found = plan(name, **SMALL[name])
    return found, Count(found, length, Shape(heads=HEADS, kv_heads=KV_HEADS, qk=DIM, v=DIM))


def masks(pattern: Pattern, length: int, phase: Phase = Phase.TRAIN) -> dict[str, torch.Tensor]:
    """What each softmax of the case that answers sees: [heads, length, entries], of the pattern before it is split."""
    x = built.numbers(pattern, length, heads=HEADS, kv_heads=KV_HEADS, dim=DIM)
    sizes = sizes_of(pattern, x)
    case = next(one for one in pattern.cases_of(phase) if one.condition is None or holds(one.condition, length))
    found = {}
    for softmax in (step for step in pattern.steps(case) if isinstance(step, Softmax)):
        seen = [visible(pattern, term, x, sizes) for term in softmax.terms]
        whole = [one.expand(1, HEADS, length, one.shape[-1])[0] for one in seen]
        found[softmax.name] = torch.cat(whole, -1)
    return found


def holds(condition: Boolean, length: int) -> bool:
    return bool(condition.xreplace({LENGTH: sympy.Integer(length)}))


@cache
def meaning(name: str) -> Pattern:
    source = Source(text_of(name))
    report = Report(source)
    params = {key: Fraction(value) for key, value in SMALL[name].items()}
    found = lower(parse(source, report).patterns[0], report, params)
    assert found is not None
    return found


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SMALL)
def test_pairs_and_keys_are_those_of_the_masks(name: str, length: int) -> None:
    found, own = count(name, length)
    seen = masks(meaning(name), length)
    of_plan = own.softmaxes(Phase.TRAIN)
    counted: dict[str, Number] = {}
    for softmax in of_plan:  # a softmax that was split has parts: name_listed, name_rest
        whole = next(one for one in seen if softmax.name in (one, f"{one}_listed", f"{one}_rest"))
        counted[whole] = counted.get(whole, Number(0)) + own.pairs(softmax)
    assert counted == {one: Number(int(mask.sum())) for one, mask in seen.items()}
    step, group = step_reads(found, length, own.shape), HEADS // KV_HEADS
    per_head = name == "moba"  # a list for each query head
    last = {one: mask[:, -1] for one, mask in seen.items()}
    lists = {
        one: row if per_head and one == "attend" else row.view(KV_HEADS, group, -1).any(1) for one, row in last.items()
    }
    assert step.keys == Number(sum(int(row.sum(-1).max()) for row in lists.values()))
    scores = {read.softmax for read in step.reads if read.softmax == "ranking"}
    sizes = {one: DIM * 2 * (1 if one in scores else 2) for one in lists}
    assert step.bytes == Number(sum(int(row.sum()) * sizes[one] for one, row in lists.items()))
    assert found.pattern.name == name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("units", [2, 16])
@pytest.mark.parametrize("order", ["causal", ""])
def test_lists_of_tiles_of_rows(order: str, units: int, length: int) -> None:
    """A tile chooses by what its last row sees; exact where every unit with a score is taken, else at most."""
    body = (
        f"heads query = {HEADS}, kv = {KV_HEADS} {order} rank = dot(compress(8, 4)) "
        f"chosen = top_k({units}, score = rank, "
        "unit = max(16), share = max(group), rows = max(24), force = first(1)) "
        f"return attend(chosen) {'if prefill' if order else ''}"
    )
    text = f"pattern rows {{ {body} }}"
    phase = Phase.PREFILL if order else Phase.TRAIN
    own = Count(plan(f"rows {order} {units}", text), length, Shape(heads=HEADS, kv_heads=KV_HEADS, qk=DIM, v=DIM))
    pattern = lower(parse(Source(text), Report(Source(text))).patterns[0], Report(Source(text)), {})
    assert pattern is not None
    wanted = int(masks(pattern, length, phase)["attend"].sum())
    found = next(own.pairs(one) for one in own.softmaxes(phase) if own.in_tiles(one))
    assert found.value >= wanted
    if units == 16 or found.exact:
        assert found == Number(wanted)


@pytest.mark.parametrize("order", ["causal", ""])
@pytest.mark.parametrize("length", [1, 5, 30, 31, 32, 64])
def test_the_short_last_cell_is_counted(length: int, order: str) -> None:
    """By the last query alone with `causal`, by all of them without."""
    body = f"heads query = 1, kv = 1 {order} return attend(compress(12, 8, before = 3, partial = keep)) if train"
    own = Count(plan(f"cut {order}", f"pattern cut {{ {body} }}"), length, Shape(heads=1, kv_heads=1))
    starts = [start for start in range(-3, length, 8) if start < 0 or start + 4 < length]  # else one before has its end
    last = [min(start + 12, length) - 1 for start in starts]
    wanted = sum(end <= q or not order for q in range(length) for end in last)
    (softmax,) = own.softmaxes(Phase.TRAIN)
    assert own.pairs(softmax) == Number(wanted)


@pytest.mark.parametrize("length, published", [(8192, 2046), (16384, 2558), (32768, 3582), (65536, 5630)])
def test_the_paper_has_one_entry_less(length: int, published: int) -> None:
    """(s - l) / d + n l' + w of arXiv 2502.11089, section 3."""
    assert (length - 32) // 16 + 16 * 64 + 512 == published
    nsa = plan("nsa", (folder("patterns") / "nsa.spat").read_text())
    step = step_reads(nsa, length, shape_of(nsa.pattern))
    assert step.keys == Number(published + 1)
    assert step.bytes == Number((published + 1) * 4 * (192 + 128) * 2)


@pytest.mark.parametrize("name", ["document", "block_sparse", "big_bird", "prefix_lm"])
def test_what_tensors_tell_is_counted_at_most(name: str) -> None:
    found = plan(name)
    with pytest.raises(DependsOnData):
        Count(found, 4096, Shape()).pairs(found.softmaxes[0])
    keys = step_reads(found, 4096, Shape()).keys
    assert not keys.exact
    assert 0 < keys.value <= 4096
    works = [one for one in kernels(found, Stage.FORWARD, 4096, Shape(), MACHINE) if one.flops.value]
    assert [one.flops.exact for one in works] == [False] * len(found.softmaxes)


def test_a_threshold_is_counted_at_most() -> None:
    text = text_of("nsa").replace("top_k(count,", "threshold(0.5, most = count,")
    keys = step_reads(plan("nsa", text), 4096, Shape(heads=HEADS, kv_heads=KV_HEADS)).keys
    assert keys == Number((4096 - 32) // 16 + 1 + 1024 + 512, exact=False)


def test_as_many_at_least_as_at_most_are_counted_as_the_best() -> None:
    text = text_of("nsa").replace("top_k(count,", "threshold(0.5, least = count, most = count,")
    shape = Shape(heads=HEADS, kv_heads=KV_HEADS)
    found, best = (plan("nsa", one) for one in (text, text_of("nsa")))
    keys = Number((4096 - 32) // 16 + 1 + 1024 + 512)
    assert step_reads(found, 4096, shape).keys == step_reads(best, 4096, shape).keys == keys
    assert kernels(found, Stage.FORWARD, 4096, shape, MACHINE) == kernels(best, Stage.FORWARD, 4096, shape, MACHINE)


def test_work_follows_from_the_pairs() -> None:
    """Forward two products, backward five; every tensor once in each kernel."""
    found, own = count("streaming_llm", 40)
    (ahead,) = kernels(found, Stage.FORWARD, 40, own.shape, MACHINE)
    back = kernels(found, Stage.BACKWARD, 40, own.shape, MACHINE)
    pairs = int(masks(meaning("streaming_llm"), 40)["attend"].sum())
    assert ahead.flops == Number(pairs * 2 * (DIM + DIM))
    assert added(one.flops for one in back) == Number(pairs * 2 * (3 * DIM + 2 * DIM))
    rows, keys = 40 * HEADS * (2 * DIM * 2 + 4), 40 * KV_HEADS * 2 * DIM * 2
    assert ahead.bytes == Number(rows + keys)
    assert {one.name: one.bytes.value for one in back} == {
        "row_delta": rows, "attend_dq": 2 * rows + keys, "attend_dkdv": rows + 2 * keys,
    }  # fmt: skip
