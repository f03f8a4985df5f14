"""tile_choices: how much of a set lies in choices for tiles of queries, of which only the lists' room is known.

A set of several is at most the sum of its parts: each choice with what must hold beside it, and what needs no choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import to_nnf

from spdsl.ir.pattern import Choice, Pattern
from spdsl.ir.symbols import Boolean, is_membership, lookup_name, lookups


@dataclass(frozen=True, slots=True)
class InTiles:
    """`chosen`: choices, and the test that masks the pairs of each; `rest`: pairs that need to be in none of them."""

    chosen: tuple[tuple[Choice, Boolean], ...]
    rest: Boolean


def in_tiles(pattern: Pattern, test: Boolean) -> InTiles | None:
    """The parts of a test that reads choices for tiles; other reads are taken as true. None: it reads no such choice.

    What is not in a choice is anywhere.
    """
    tiled = {found.name: found for found in pattern.inputs if isinstance(found, Choice) and found.tiled}
    if not any(lookup_name(read) in tiled for read in lookups(test)):
        return None
    parts = list(_parts(to_nnf(test, simplify=False), tiled))
    chosen = tuple((choice, without_lookups(rest)) for choice, rest in parts if choice is not None)
    return InTiles(chosen, sympy.Or(*(without_lookups(rest) for choice, rest in parts if choice is None)))


def without_lookups(test: Boolean) -> Boolean:
    """The test with every atom that reads a tensor taken as true, negated ones too."""
    return _true_where_read(to_nnf(test, simplify=False))


def _parts(test: Boolean, tiled: dict[str, Choice]) -> Iterator[tuple[Choice | None, Boolean]]:
    """Choices with what holds beside them; None: a part in none."""
    if isinstance(test, sympy.Or):
        for part in test.args:
            yield from _parts(part, tiled)
    elif isinstance(test, sympy.And):
        yield from _shared(test, tiled)
    else:
        read = lookups(test)
        choice = tiled.get(lookup_name(read[0])) if len(read) == 1 and is_membership(read[0]) else None
        if choice is not None and test == sympy.Ne(read[0], 0):
            yield choice, sympy.true
        else:
            yield None, test


def _shared(test: sympy.And, tiled: dict[str, Choice]) -> Iterator[tuple[Choice | None, Boolean]]:
    """One condition of several, that with the most of its parts in choices, and the others beside each part."""
    parts = {condition: list(_parts(condition, tiled)) for condition in test.args}
    best = max(test.args, key=lambda condition: _share(parts[condition]))
    if not _share(parts[best]):
        yield None, test
        return
    others = sympy.And(*(other for other in test.args if other is not best))
    yield from ((choice, sympy.And(rest, others)) for choice, rest in parts[best])


def _share(parts: list[tuple[Choice | None, Boolean]]) -> float:
    return sum(choice is not None for choice, _ in parts) / len(parts)


def _true_where_read(test: Boolean) -> Boolean:
    if not lookups(test):
        return test
    if isinstance(test, sympy.And | sympy.Or):
        return test.func(*(_true_where_read(part) for part in test.args))
    return sympy.true
