"""Reading SASS: the loops of a small listing by hand, and of random jumps by the definition."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from spdsl.machine.sass import Instruction, innermost, instructions, loops

LISTING = instructions(Path(__file__, "..", "sass", "nested.sass").resolve().read_text(encoding="utf-8"))
MATRIX = frozenset(one.place for one in LISTING if "MMA" in one.stem)


def places(*spans: tuple[int, int]) -> frozenset[int]:
    """The addresses from the first to the last of each span."""
    return frozenset(place for first, last in spans for place in range(first, last + 1, 16))


FIRST = places((0x40, 0xD0), (0x190, 0x1B0))
"""With the three instructions behind the end, which come back into the middle of it."""
SECOND = places((0xF0, 0x110))


def test_instructions() -> None:
    assert len(LISTING) == 0x1D
    assert LISTING[8] == Instruction(0x80, "BRA", "0x190", guarded=True)
    assert (LISTING[4].stem, LISTING[8].goal, LISTING[9].goal) == ("LDGSTS", 0x190, None)
    assert [one.goes_on for one in LISTING[7:10]] == [True, True, True]
    assert [one.goes_on for one in LISTING[-6:]] == [False, False, True, True, False, False]


def test_conditions_among_the_operands() -> None:
    """`BRA UP0, 0x20` may go on, `BRA 0x20` may not; `@P0 EXIT` may."""
    text = "/*0000*/ BRA UP0, 0x20 ;\n/*0010*/ BRA.DIV UR4, 0x20 ;\n/*0020*/ BRA 0x20 ;\n/*0030*/ @P0 EXIT ;"
    assert [one.goes_on for one in instructions(text)] == [True, True, False, True]
    assert [one.goal for one in instructions(text)] == [0x20, 0x20, 0x20, None]


def test_nested_loops() -> None:
    """Two in one; a jump to itself that nothing reaches is none, nor is the jump back from behind the end."""
    found = loops(LISTING)
    assert [loop.head for loop in found] == [0x30, 0x40, 0xF0]
    assert [loop.places for loop in found] == [places((0x30, 0x140), (0x190, 0x1B0)), FIRST, SECOND]


def test_innermost_loops() -> None:
    assert [loop.places for loop in innermost(loops(LISTING), MATRIX)] == [FIRST, SECOND]
    shuffles = frozenset({0x130})
    assert [loop.head for loop in innermost(loops(LISTING), shuffles)] == [0x30]


def test_no_instructions() -> None:
    assert loops(instructions("no code")) == ()


@st.composite
def listings(draw: st.DrawFn) -> tuple[Instruction, ...]:
    """Moves, ends and jumps to anywhere, of which the first instruction is reached."""
    count = draw(st.integers(1, 9))
    kinds = draw(st.lists(st.sampled_from(["MOV", "EXIT", "BRA", "BRA"]), min_size=count, max_size=count))
    goals = draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
    guards = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return tuple(
        Instruction(16 * i, kind, hex(16 * goal) if kind == "BRA" else "", guard)
        for i, (kind, goal, guard) in enumerate(zip(kinds, goals, guards, strict=True))
    )


@settings(max_examples=300, deadline=None)
@given(listings())
def test_loops_of_random_jumps(listing: tuple[Instruction, ...]) -> None:
    """By the definition: a back edge goes to an instruction without which its own is not reached any more."""
    edges = {(a.place, b.place) for a, b in pairwise(listing) if a.goes_on}
    edges |= {(one.place, one.goal) for one in listing if one.goal is not None}

    def reached(start: int, without: int | None = None) -> set[int]:
        found, waiting = set(), [start] if start != without else []
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.add(place)
                waiting += [b for a, b in edges if a == place and b != without]
        return found

    alive, wanted = reached(0), {}
    for last, head in edges:
        if last in alive and last not in reached(0, without=head):
            inside = {place for place in alive - {head} if last in reached(place, without=head)}
            wanted.setdefault(head, {head}).update(inside)
    assert {loop.head: set(loop.places) for loop in loops(listing)} == wanted
