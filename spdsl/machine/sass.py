"""Reading SASS, the text that cuobjdump prints of a cubin: instructions, and the loops that their jumps make.

A loop is a natural one: a jump back to an instruction that every way to the jump goes through, with all that lies on
ways from there to the jump. Addresses alone do not tell: ptxas moves code that is rarely run behind the end, and its
jump back is no loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

# CUDA Binary Utilities, instruction set reference. A mnemonic stands after the address and an optional predicate.
_LINE = re.compile(
    r"^\s*/\*(?P<place>[0-9a-f]{4,})\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)(?P<operands>[^;\n]*)",
    re.MULTILINE,
)
_GOAL = re.compile(r"\b0x([0-9a-f]+)\s*$")
_JUMPS, _ENDS = ("BRA", "JMP"), ("EXIT", "RET", "BRX", "JMX", "KILL")


@dataclass(frozen=True, slots=True)
class Instruction:
    place: int
    """Its address in bytes."""
    op: str
    """With its modifiers: `LDGSTS.E.BYPASS.128`."""
    operands: str = ""
    guarded: bool = False
    """Whether a predicate stands in front, so that threads may skip it."""

    @property
    def stem(self) -> str:
        return self.op.split(".", 1)[0]

    @property
    def goal(self) -> int | None:
        """Where a jump goes on."""
        found = _GOAL.search(self.operands) if self.stem in _JUMPS else None
        return int(found[1], 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.stem in _ENDS:
            return self.guarded
        if self.stem not in _JUMPS:
            return True
        # `BRA UP0, 0x120` and `BRA.DIV UR4, 0x120` have their condition among the operands.
        return self.guarded or "," in self.operands


@dataclass(frozen=True, slots=True)
class Loop:
    head: int
    """The address of its first instruction."""
    places: frozenset[int]
    """The addresses of its instructions."""


def instructions(sass: str) -> tuple[Instruction, ...]:
    """In the order of their addresses. One function: a cubin of Triton has no other."""
    return tuple(
        Instruction(int(match["place"], 16), match["op"], match["operands"].strip(), match["guard"] is not None)
        for match in _LINE.finditer(sass)
    )


def loops(listing: Sequence[Instruction]) -> tuple[Loop, ...]:
    """Every loop, by the address of its head; jumps back to one head are one loop."""
    blocks = list(_blocks(listing))
    followers = _followers(blocks)
    dominators = _dominators(followers)
    members: dict[int, set[int]] = {}
    for block in dominators:
        for head in followers[block]:
            if head in dominators[block]:
                members.setdefault(head, {head}).update(_between(head, block, followers, dominators))
    return tuple(
        Loop(blocks[head][0].place, frozenset(one.place for block in inside for one in blocks[block]))
        for head, inside in sorted(members.items())
    )


def innermost(found: Sequence[Loop], wanted: frozenset[int]) -> tuple[Loop, ...]:
    """The loops with wanted addresses in which no smaller loop has some."""
    having = [loop for loop in found if loop.places & wanted]
    return tuple(loop for loop in having if not any(other.places < loop.places for other in having))


def _blocks(listing: Sequence[Instruction]) -> Iterator[Sequence[Instruction]]:
    """Runs of instructions that are entered at the first one and left behind the last one alone."""
    goals = {one.goal for one in listing}
    starts = [0] + [
        i for i in range(1, len(listing)) if listing[i].place in goals or _leaves(listing[i - 1])
    ]  # fmt: skip
    for start, end in pairwise([*starts, len(listing)]):
        yield listing[start:end]


def _leaves(one: Instruction) -> bool:
    return one.goal is not None or one.stem in _ENDS


def _followers(blocks: Sequence[Sequence[Instruction]]) -> list[list[int]]:
    """The blocks that may follow each block, by number."""
    number = {block[0].place: i for i, block in enumerate(blocks) if block}
    found = []
    for i, block in enumerate(blocks):
        last = block[-1] if block else None
        next_ones = [number[last.goal]] if last is not None and last.goal in number else []
        if last is not None and last.goes_on and i + 1 < len(blocks):
            next_ones.append(i + 1)
        found.append(next_ones)
    return found


def _dominators(followers: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Of each block that is reached the blocks that every way to it goes through, itself among them."""
    order, waiting, reached = [], [0], {0}
    while waiting:
        block = waiting.pop()
        order.append(block)
        new = [one for one in followers[block] if one not in reached]
        reached.update(new)
        waiting += new
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for follower in followers[block]:
            before[follower].append(block)
    found = {block: set(order) for block in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            through = set.intersection(*(found[one] for one in before[block])) | {block}
            changed, found[block] = changed or through != found[block], through
    return found


def _between(
    head: int, last: int, followers: Sequence[Sequence[int]], reached: dict[int, set[int]]
) -> set[int]:  # fmt: skip
    """The blocks on ways from `head` to `last`: those that lead to `last` and do not go through `head`."""
    inside, waiting = {head, last}, [last] if last != head else []
    while waiting:
        block = waiting.pop()
        new = [one for one in reached if block in followers[one] and one not in inside]
        inside.update(new)
        waiting += new
    return inside
