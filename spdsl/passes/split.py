"""split: a softmax over selected units and other keys as an exact merge of softmaxes over one kind each.

A kernel that walks the units of a list sees one term, `chosen & rest`. In `chosen | rest` the keys that pass `rest` are
left to a second softmax, so that no key is in both; log-sum-exps merge exactly. Streams of different grids part, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import sympy

from spdsl.ir.pattern import Branch, Extra, Gate, Grid, Merge, Pattern, Softmax, Stream, Term
from spdsl.ir.symbols import Boolean, is_membership, lookup_name, lookups
from spdsl.passes.disjuncts import TooComplex, disjuncts


def split(pattern: Pattern) -> Pattern:
    """The pattern with every softmax of mixed terms taken apart. No score may read such a softmax."""
    cases = tuple(
        replace(
            case,
            branch=_branch(pattern, case.branch),
            extras=tuple(_extra(pattern, extra) for extra in case.extras),
        )
        for case in pattern.cases
    )
    return replace(pattern, cases=cases)


def _extra(pattern: Pattern, extra: Extra) -> Extra:
    return _branch(pattern, extra) if isinstance(extra, Softmax | Gate | Merge) else extra


def _branch(pattern: Pattern, branch: Branch) -> Branch:
    if isinstance(branch, Gate | Merge):
        return replace(branch, branches=tuple(_branch(pattern, inner) for inner in branch.branches))
    found = parts(pattern, branch)
    return found[0] if len(found) == 1 else Merge(found, branch.span)


def parts(pattern: Pattern, softmax: Softmax) -> tuple[Softmax, ...]:
    """The softmaxes over disjoint keys, each of one grid, whose merge is `softmax`; itself alone if it stays whole.

    Chosen keys that the other sets hold anyway are no part: (c & sliding(3)) | sliding(64) is sliding(64).
    """
    listed: list[Term] = []
    rest: list[Term] = []
    for term in softmax.terms:
        found = _listed(pattern, term)
        if found is None:
            rest.append(term)
            continue
        own, other = found
        if not _is_empty(own):
            listed.append(term if other is sympy.false else replace(term, test=own))
        if not _is_empty(other):
            rest.append(replace(term, test=other))
    lists = [(term,) for term in listed]
    others = _by_grid(pattern, rest)
    if len(lists) + len(others) == 1:
        return (replace(softmax, terms=(*lists, *others)[0]),)
    taken = {one.name for one in pattern.softmaxes()}
    kinds = [*_numbered(f"{softmax.name}_listed", lists, taken), *_numbered(f"{softmax.name}_rest", others, taken)]
    last = len(kinds) - 1  # the sink counts once
    return tuple(
        replace(softmax, name=name, terms=terms, sink=softmax.sink if i == last else None)
        for i, (name, terms) in enumerate(kinds)
    )


def _by_grid(pattern: Pattern, terms: list[Term]) -> list[tuple[Term, ...]]:
    """The terms of each grid together: their entries lie side by side."""
    grids: dict[Grid, list[Term]] = {}
    for term in terms:
        stream = pattern.input(term.stream)
        assert isinstance(stream, Stream)
        grids.setdefault(stream.grid, []).append(term)
    return [tuple(together) for together in grids.values()]


def _numbered(name: str, groups: Sequence[tuple[Term, ...]], taken: set[str]) -> Iterator[tuple[str, tuple[Term, ...]]]:
    free = (text for number in count(1) if (text := name if number == 1 else f"{name}_{number}") not in taken)
    yield from zip(free, groups, strict=False)


def _listed(pattern: Pattern, term: Term) -> tuple[Boolean, Boolean] | None:
    """The test as (choice and ..., what does not ask the choice), disjoint; None where no list can be walked.

    A test that grows with the membership m is `m & test[m = true] | test[m = false]`.
    """
    reads = [read for read in lookups(term.test) if is_membership(read)]
    chosen = [(read, found) for read in reads if (found := pattern.choice(lookup_name(read))) and found.listed]
    if len(chosen) != 1:
        return None
    member = sympy.Ne(chosen[0][0], 0)
    if sympy.Not(member) in sympy.to_nnf(term.test, simplify=False).atoms(sympy.Eq):
        return None
    where_in = term.test.xreplace({member: sympy.true})
    where_out = term.test.xreplace({member: sympy.false})
    new = sympy.And(where_in, sympy.Not(_without(where_out, where_in)))
    return sympy.And(member, new), where_out


def _is_empty(test: Boolean) -> bool:
    try:
        return not disjuncts(test)
    except TooComplex:
        return False


def _without(test: Boolean, known: Boolean) -> Boolean:
    """`test` where `known` holds: without the conditions that both have."""
    shared = set(sympy.And.make_args(known))
    return sympy.And(*(part for part in sympy.And.make_args(test) if part not in shared))
