"""The body of a pattern, and what a pass makes of it: one file of pairs for each pass, in `pairs`.

A body stands at the margin, what is made of it is indented. `--update-golden` writes the results anew: read the
difference.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import sympy

import spdsl
from spdsl.diagnostics import Source
from spdsl.ir.pattern import Branch, Gate, Merge, Pattern, Softmax
from spdsl.ir.plan import Plan, Range, SoftmaxPlan
from spdsl.passes.aligned import aligned as shortest
from spdsl.passes.disjuncts import disjuncts as conjuncts_of
from spdsl.passes.joint import joints
from spdsl.passes.listed import listed as walked
from spdsl.passes.partition import partition as planned
from spdsl.passes.ranges import key_range, ordered, row_range
from spdsl.passes.read_lengths import read_lengths as read_at
from spdsl.passes.resident import resident as still_seen
from spdsl.passes.residues import residues as class_of
from spdsl.passes.schedule import schedule, stages
from spdsl.passes.selection import selection as choice_plan
from spdsl.passes.split import split as taken_apart
from spdsl.passes.tidy import tidy as shorter
from tests.passes.lowered import lowered

FOLDER = Path(__file__).parent / "pairs"


def _tests(softmax: Softmax) -> Iterator[str]:
    return (f"{softmax.name} {term.stream}: {term.test}" for term in softmax.terms)


def lower(body: str) -> Iterator[str]:
    for found in lowered(body).softmaxes():
        yield from _tests(found)


def check(body: str) -> Iterator[str]:
    """What `lower`, `check`, `later` and `choices` say."""
    return (f"{found.code} {found.message}" for found in spdsl.check(f"pattern p {{ {body} }}"))


def disjuncts(body: str) -> Iterator[str]:
    return (str(one.test()) for found in _terms(body) for one in conjuncts_of(found))


def tidy(body: str) -> Iterator[str]:
    return (str(shorter(found)) for found in _terms(body))


def ranges(body: str) -> Iterator[str]:
    for test in _terms(body):
        for side, solved in (("keys", key_range), ("rows", row_range)):
            found = [solved(one) for one in conjuncts_of(test)]
            order = ordered(found)
            yield from (f"{side} {_range(found[i])}" for i in order or range(len(found)))
            if order is None:
                yield f"{side} in no order that a cursor can follow"


def split(body: str) -> Iterator[str]:
    found = taken_apart(lowered(body))
    yield from (_branch(case.branch) for case in found.cases)
    for softmax in found.softmaxes():
        yield from _tests(softmax)


def residues(body: str) -> Iterator[str]:
    for softmax in lowered(body).softmaxes():
        found = class_of(softmax)
        yield from ["no classes"] if found is None else [f"step {found[0]}", *_tests(found[1])]


def listed(body: str) -> Iterator[str]:
    pattern = taken_apart(lowered(body))
    for softmax in pattern.softmaxes():
        for term in softmax.terms:
            found = walked(pattern, term)
            rest = f"walks {found[0].name}, masks {found[1]}" if found else "walks no choice"
            yield f"{softmax.name} {term.stream}: {rest}"


def selection(body: str) -> Iterator[str]:
    pattern = lowered(body)
    for choice in (choice for choice in map(pattern.choice, _names(pattern)) if choice and choice.selected):
        found = choice_plan(pattern, choice)
        yield f"{choice.name} forced: {found.forced}"
        yield f"{choice.name} allowed: {found.allowed}"
        yield f"{choice.name} weights from entry {found.first} on: {found.weights}, {found.ratio} further each unit"


def wanted(body: str) -> Iterator[str]:
    pattern = lowered(body)
    return (f"{found.name}: {read_at(pattern, found)}" for found in pattern.softmaxes())


def joint(body: str) -> Iterator[str]:
    plan = _plan(body)
    return (f"{found.name}: {', '.join(found.parts)}" for found in joints(plan.pattern, plan.softmaxes))


def partition(body: str) -> Iterator[str]:
    for found in _softmaxes(_plan(body)):
        reads = "".join(f", reads {read.name}" for read in found.reads)
        yield from (f"{found.name} {each.stream.name}: {each.form.value}{reads}" for each in found.sweeps)


def aligned(body: str) -> Iterator[str]:
    for found in _softmaxes(shortest(_plan(body))):
        yield from (f"{found.name} {each.stream.name}: {each.test}" for each in found.sweeps)


def resident(body: str) -> Iterator[str]:
    found = still_seen(_plan(body))
    yield f"the first {found[0]} and a window of {found[1]}" if found else "every token"


def steps(body: str) -> Iterator[str]:
    """For each stage the kernels in their order, and in parentheses what torch makes."""
    plan = shortest(_plan(body))
    for stage in stages(plan):
        found = schedule(plan, stage).steps
        yield f"{stage.value}: {', '.join(step.kernel or f'({step.name})' for step in found)}"


def _terms(body: str) -> list[object]:
    return [term.test for softmax in lowered(body).softmaxes() for term in softmax.terms]


def _names(pattern: Pattern) -> Iterable[str]:
    return (found.name for found in pattern.inputs)


def _plan(body: str) -> Plan:
    return planned(taken_apart(lowered(body)), Source(body))


def _softmaxes(plan: Plan) -> list[SoftmaxPlan]:
    return [one for found in plan.softmaxes for one in (found, found.of_class) if one]


def _branch(branch: Branch) -> str:
    if isinstance(branch, Merge | Gate):
        return f"{type(branch).__name__.lower()}({', '.join(map(_branch, branch.branches))})"
    return branch.name


def _range(found: Range) -> str:
    full = "none" if found.full is sympy.false else f"[{found.full_first}, {found.full_end})"
    return f"[{found.first}, {found.end}), full {full}" + f" if {found.condition}" * (found.condition is not sympy.true)


def _pair(body: str, lines: Iterable[str]) -> str:
    return f"{body}\n{textwrap.indent(chr(10).join(lines) or 'nothing', '    ')}\n"


PASSES: tuple[Callable[[str], Iterator[str]], ...] = (
    lower, check, split, disjuncts, tidy, ranges, residues, listed, selection, wanted, joint, partition, aligned,
    resident, steps,
)  # fmt: skip


@pytest.mark.parametrize("made", PASSES, ids=lambda made: made.__name__)
def test_pairs(made: Callable[[str], Iterator[str]], request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"{made.__name__}.txt"
    known = path.read_text(encoding="utf-8")
    bodies = [line for line in known.splitlines() if line and not line.startswith(" ")]
    found = "\n".join(_pair(body, made(body)) for body in bodies)
    if request.config.getoption("--update-golden"):
        path.write_text(found, encoding="utf-8")
        known = found
    assert found == known


def test_every_file_has_its_pass() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {made.__name__ for made in PASSES}
