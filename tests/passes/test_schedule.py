"""Schedules: each step reads what is there, and the printed form says all of it in 80 columns."""

from __future__ import annotations

from fractions import Fraction

import pytest

from spdsl.compiler import emit, plan_of
from spdsl.diagnostics import Source
from spdsl.ir.plan import Plan
from spdsl.ir.schedule import Buffer, Kind, Lifetime, Schedule, Stage, When
from spdsl.machine.counts import tables
from spdsl.passes.schedule import schedule, stages
from spdsl.resources import folder

PATTERNS = sorted(path.stem for path in folder("patterns").glob("*.spat"))
TEXTS = {
    "merged": "pattern p { causal a = attend(sliding(8)) return merge(a, attend(sink(2) - sliding(8))), a }",
    "classes": "pattern p { causal return gate(attend(dilated(5, 3)), attend(all)) }",
    "chosen by torch": """
        pattern p {
            causal
            x = attend(all)
            c = top_k(500, score = mass(x), share = sum(group), unit = max(16))
            return attend(c)
        }
    """,
    "numbers of the call": """
        pattern p {
            causal
            n = tensor(int)
            x = tensor(head)
            a = top_k(n, score = dot(compress(64)), share = sum(group), most = 8)
            b = threshold(x[h], score = dot(compress(64)), share = head, least = n)
            return gate(attend(a), attend(b))
        }
    """,
    "lists of the caller": """
        pattern p {
            causal
            a = given(most = 9)
            b = given(unit = 6, share = head)
            tiles = given(rows = 32, unit = 32)
            return gate(attend(a), attend(b | sliding(9)), attend(tiles)) if length < 100 | train
            return attend(a)
        }
    """,
    "keys are values": "pattern p { causal latent = stream(heads = 1, v = 32, value = key) return attend(latent) }",
    "read twice": "pattern p { causal a = attend(sliding(8)) b = attend(all) return gate(a, b), gate(b, a), a }",
    "a sink": "pattern p { causal s = tensor(head) return attend(sliding(8), sink_logit = s) }",
    "entries": """
        pattern p {
            causal
            z = stream(value = none)
            a = compress(32, 16, by = weighted)
            b = compress(32, 16, by = max)
            c = compress(32, 16, by = mlp)
            d = compress(32, 16, by = softmax(z))
            return gate(attend(a), attend(b), attend(c), attend(d)) if length < 100 | train
            return attend(a)
        }
    """,
}


def plan(name: str) -> Plan:
    text = TEXTS.get(name) or (folder("patterns") / f"{name}.spat").read_text()
    return plan_of(Source(text), None, dict[str, Fraction]())


def written(found: Schedule) -> set[str]:
    return {buffer.name for step in found.steps for buffer in step.writes}


@pytest.mark.parametrize("name", [*PATTERNS, *TEXTS])
def test_a_step_reads_what_is_there(name: str) -> None:
    """Arguments, the cache, and what earlier steps of the same result wrote; backward also what the forward left."""
    found = plan(name)
    for stage in stages(found):
        own = schedule(found, stage)
        known = {None: written(schedule(found, Stage.FORWARD)) if stage is Stage.BACKWARD else set[str]()}
        for step in own.steps:
            there = known[None] | known.setdefault(step.case, set())
            if step.kind is Kind.SETTLE:
                there |= set().union(*known.values())

            def missing(buffer: Buffer, there: set[str] = there, stage: Stage = stage) -> bool:
                # autograd gives the gradients of results, and adds up those of what several steps read
                given = stage is Stage.BACKWARD and buffer.name.rpartition(".")[2] in ("dout", "dlse", "dkl")
                return buffer.lifetime is Lifetime.CALL and buffer.name not in there and not given

            assert [buffer.name for buffer in step.reads if missing(buffer)] == [], (stage, step.name)
            assert {buffer.name for buffer in step.filled} <= {buffer.name for buffer in step.writes}
            known[step.case] |= {buffer.name for buffer in step.writes}


@pytest.mark.parametrize("name", [*PATTERNS, *TEXTS])
def test_a_buffer_has_one_form_in_a_stage(name: str) -> None:
    found = plan(name)
    for stage in stages(found):
        buffers = {buffer for step in schedule(found, stage).steps for buffer in (*step.reads, *step.writes)}
        names = [buffer.name for buffer in buffers]
        assert len(set(names)) == len(names), sorted(name for name in set(names) if names.count(name) > 1)


def test_only_what_one_query_closes_is_closed_in_a_step() -> None:
    kinds = {stage: {step.kind: step.when for step in schedule(plan("nsa"), stage).steps} for stage in Stage}
    assert Kind.TAKE_CELLS in kinds[Stage.PREFILL]
    assert Kind.TAKE_CELLS not in kinds[Stage.DECODE]
    assert kinds[Stage.PREFILL][Kind.CLOSE_HIDDEN] is When.ONE_ENTRY
    assert kinds[Stage.DECODE][Kind.CLOSE_HIDDEN] is When.ALWAYS


def test_a_list_is_made_once_for_all_results() -> None:
    text = """
        pattern p {
            causal
            c = top_k(4, score = dot(compress(16, by = mean)), share = sum(group), unit = max(16))
            return attend(c) if length < 100
            return gate(attend(c), attend(sliding(8)))
        }
    """
    found = schedule(plan_of(Source(text), None, {}), Stage.DECODE)
    made = [(step.case, step.when) for step in found.steps if step.kind is Kind.SELECT]
    assert made == [(0, When.ALWAYS), (1, When.NOT_MADE)]


@pytest.mark.parametrize("name", [*PATTERNS, *TEXTS])
def test_the_printed_form_names_every_step(name: str) -> None:
    text = TEXTS.get(name) or (folder("patterns") / f"{name}.spat").read_text()
    printed = emit(Source(text), None, {}, "steps")
    found = plan(name)
    assert max(map(len, printed.splitlines())) <= 80
    for stage in stages(found):
        for step in schedule(found, stage).steps:
            assert f"    {step.kernel}:" in printed if step.kernel else f"    torch: {step.name}" in printed


OVERFLOW = "beyond it the lowest scores are left out, forced units last"


@pytest.mark.parametrize(
    "rule, bound",
    [
        ("top_k(4, {})", f"n <= 4: {OVERFLOW}"),
        ("top_k(300, {})", f"n <= 300: {OVERFLOW}"),
        ("top_k(length / 64, {}, most = 12)", f"n <= 12: {OVERFLOW}"),
        ("threshold(0.2, {}, most = 24)", f"n <= 24: {OVERFLOW}"),
        ("threshold(0.2, {})", "n <= M / 64"),
    ],
)
def test_a_list_says_what_its_bound_leaves_out(rule: str, bound: str) -> None:
    """In the steps of every phase, and in the report; a list with room for all units leaves out none."""
    c = rule.format("score = dot(compress(64)), share = head")
    source = Source(f"pattern p {{ causal c = {c} return attend(c) }}")
    text = " ".join(emit(source, None, {}, "steps").split())
    assert text.count(f"int32 [B, Hq, N, n], {bound} ") == 3
    assert text.count(f"int32 [B, Hq, 1, n], {bound} ") == 1
    _, forward = tables(plan_of(source, None, {}))
    assert [note.plain for note in forward.notes] == ([f"c, {bound}"] if OVERFLOW in bound else [])
