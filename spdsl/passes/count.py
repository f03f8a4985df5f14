"""count: how many keys the queries of a plan see, exactly, and what that costs in FLOPs and bytes.

Numbers of the algorithm, not of a machine: every tensor is read and written once, a product of n x d and d x m numbers
is 2 n d m FLOPs, and only visible pairs count. `exact` is false where scores or the caller decide: then the number is
the most. Lists of the caller are full, and hold no unit that lies behind their query where the pattern is causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import sympy

from spdsl.ir.pattern import Case, Choice, Pattern, Phase, Query, Softmax, Stream, Values
from spdsl.ir.plan import ChoicePlan, Plan, Role, SoftmaxPlan
from spdsl.ir.symbols import K_FIRST, K_LAST, LENGTH, Boolean, K, Q
from spdsl.passes.series import Trace, total
from spdsl.passes.spans import Spans, difference, intersection, lowest, size, touched, union, within
from spdsl.passes.tile_choices import InTiles, in_tiles, without_lookups
from spdsl.passes.visible import DependsOnData, Visible


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a call; `size` is bytes of an element. What a pattern fixes is used in their place by `shape_of`."""

    batch: int = 1
    heads: int = 8
    kv_heads: int = 2
    qk: int = 128
    v: int = 128
    size: int = 2


@dataclass(frozen=True, slots=True)
class Number:
    """`exact` or at most `value`."""

    value: int
    exact: bool = True

    def __add__(self, other: Number) -> Number:
        return Number(self.value + other.value, self.exact and other.exact)

    def __mul__(self, factor: int) -> Number:
        return Number(self.value * factor, self.exact)


@dataclass(frozen=True, slots=True)
class Read:
    """What one decode step reads of a stream for a softmax: `keys` per list of the most expensive kv head."""

    softmax: str
    keys: Number
    bytes: Number  # of one layer, all sequences and kv heads


@dataclass(frozen=True, slots=True)
class UnitSets:
    """The units of one query: forced, those that a score or the caller may choose, and how many a list holds."""

    forced: Spans
    free: Spans
    room: int


def shape_of(pattern: Pattern, default: Shape = Shape()) -> Shape:
    """`default` with what the pattern fixes."""
    return Shape(
        default.batch,
        pattern.query_heads or default.heads,
        pattern.kv_heads or default.kv_heads,
        pattern.qk_dim or default.qk,
        pattern.v_dim or default.v,
        default.size,
    )


class Count:
    """The counts of a plan for calls of one length and shape. Methods raise DependsOnData where only tensors tell."""

    def __init__(self, plan: Plan, length: int, shape: Shape) -> None:
        self.plan, self.length, self.shape = plan, length, shape
        self._visible = cache(self._see)
        self._known_sets: dict[str, tuple[ChoicePlan | None, Visible, Visible, Visible]] = {}
        self.pairs = cache(self._pairs)

    # ---- sizes of parts

    def heads(self, softmax: Softmax) -> int:
        query = self.plan.pattern.input(softmax.query)
        assert isinstance(query, Query)
        return query.heads or self.shape.heads

    def rows(self, softmax: Softmax) -> tuple[int, int]:
        """The number of its first row, and how many it has, of all queries of a sequence."""
        query = self.plan.pattern.input(softmax.query)
        assert isinstance(query, Query)
        if query.tail is None:
            return 0, -(-self.length // query.width)
        count = min(query.tail.count, self.length)
        return self.length - count, count

    def stream(self, stream: Stream) -> tuple[int, int, int]:
        """Heads, qk dim and v dim; entries have those of their source."""
        source = stream
        if stream.compress is not None:
            found = self.plan.pattern.input(stream.compress.source)
            assert isinstance(found, Stream)
            source = found
        values = 0 if source.value is Values.NONE else source.v or self.shape.v
        return source.heads or self.shape.kv_heads, source.qk or self.shape.qk, values

    def entries(self, stream: Stream, tokens: int | None = None) -> int:
        """Of a sequence; tokens for a stream of tokens."""
        return stream.grid.count(self.length if tokens is None else tokens)

    def lists(self, choice: Choice, softmax: Softmax) -> int:
        return self.heads(softmax) if choice.share == "head" else self.shape.kv_heads

    # ---- what is seen

    def case(self, phase: Phase) -> Case:
        """The result that answers at this length."""
        for case in self.plan.pattern.cases_of(phase):
            holds = case.condition is None or case.condition.xreplace({LENGTH: sympy.Integer(self.length)})
            if holds not in (True, False, sympy.true, sympy.false):
                raise DependsOnData
            if holds:
                return case
        raise DependsOnData

    def computed(self, phase: Phase) -> list[Softmax | Choice]:
        """What a call computes, in order. Lengths of a cache are known on the device alone: every case is computed."""
        if phase is Phase.TRAIN:
            return list(self.plan.pattern.steps(self.case(phase)))
        steps = [self.plan.pattern.steps(case) for case in self.plan.pattern.cases_of(phase)]
        return list(dict.fromkeys(step for found in steps for step in found))

    def softmaxes(self, phase: Phase) -> list[SoftmaxPlan]:
        names = {step.name for step in self.plan.pattern.steps(self.case(phase)) if isinstance(step, Softmax)}
        return [found for found in self.plan.softmaxes if found.name in names]

    def choices(self, phase: Phase) -> list[ChoicePlan]:
        steps = self.plan.pattern.steps(self.case(phase))
        return [found for found in self.plan.choices if found.choice in steps]

    def _see(self, test: Boolean, cells: int) -> Visible:
        return Visible(test.xreplace({LENGTH: sympy.Integer(self.length)}), cells)

    def in_tiles(self, softmax: SoftmaxPlan) -> InTiles | None:
        """What of it lies in choices for tiles of queries, and what not; None where it reads none."""
        tests = [term.test for term in softmax.softmax.terms]
        return in_tiles(self.plan.pattern, tests[0]) if len(tests) == 1 and softmax.units is None else None

    def keys(self, softmax: SoftmaxPlan, q: int, heads: range) -> Number:
        """Different keys that some of the heads see, over all streams; of lists those of one. q: of a row."""
        if softmax.units is not None:
            return self._listed(self._rest(softmax), softmax.units, q, heads.start, Trace())
        if parts := self.in_tiles(softmax):

            def passing(test: Boolean) -> int:
                return self._visible(test, self.length).keys(q, heads.start).bit_count()

            def listed(choice: Choice, rest: Visible) -> Number:
                return self._listed(rest, choice, q, heads.start, Trace())

            return self._at_most(softmax, parts, passing, listed)
        found = 0
        for sweep in softmax.sweeps:
            seen = self._visible(sweep.test, self.entries(sweep.stream))
            each = 0
            for head in heads if seen.by_head else heads[:1]:
                each |= seen.keys(q, head)
            found += each.bit_count()
        return Number(found)

    def _pairs(self, softmax: SoftmaxPlan) -> Number:
        """Visible (query, key) pairs of a whole sequence, over all query heads."""
        heads = self.heads(softmax.softmax)
        if softmax.units is not None:
            return self._listed_pairs(self._rest(softmax), softmax.units, 0) * heads
        if parts := self.in_tiles(softmax):

            def listed(choice: Choice, rest: Visible) -> Number:
                if not rest.by_head:
                    return self._listed_pairs(rest, choice, 0) * heads
                return sum((self._listed_pairs(rest, choice, head) for head in range(heads)), Number(0))

            return self._at_most(softmax, parts, lambda test: self._seen_pairs(softmax, test), listed)
        return Number(self._seen_pairs(softmax))

    def _at_most(
        self,
        softmax: SoftmaxPlan,
        parts: InTiles,
        seen: Callable[[Boolean], int],
        listed: Callable[[Choice, Visible], Number],
    ) -> Number:
        """Keys or pairs of lists and of what else there is, and no more than there are; exact for one list alone."""
        every, others = seen(without_lookups(softmax.softmax.terms[0].test)), seen(parts.rest)
        try:
            lists = [listed(choice, self._visible(rest, self.length)) for choice, rest in parts.chosen]
        except DependsOnData:
            return Number(every, exact=False)
        found = sum(lists, Number(others))
        return Number(min(every, found.value), found.exact and len(lists) == 1 and not others)

    def _seen_pairs(self, softmax: SoftmaxPlan, test: Boolean | None = None) -> int:
        """Those that its tests, or this one in their place, let pass."""
        heads = self.heads(softmax.softmax)
        tests = [(sweep.test if test is None else test, self.entries(sweep.stream)) for sweep in softmax.sweeps]
        seen = [self._visible(*one) for one in tests]
        units = [unit for one in seen for unit in one.units()]
        first, rows = self.rows(softmax.softmax)
        alike: dict[tuple[tuple[bool, ...], ...], list[int]] = {}
        for head in range(heads):
            alike.setdefault(tuple(one.signature(head) for one in seen), []).append(head)
        found = 0
        for members in alike.values():
            head = members[0]

            def size(row: int, trace: Trace, head: int = head) -> int:
                return sum(one.size(first + row, head, trace) for one in seen)

            found += len(members) * total(size, rows, units)
        return found

    def _rest(self, softmax: SoftmaxPlan) -> Visible:
        """What masks the pairs of the list that it walks."""
        return self._visible(softmax.sweeps[0].test, self.length)

    def _listed_pairs(self, rest: Visible, choice: Choice, head: int) -> Number:
        """Of one head: the pairs of a list, all queries together."""
        exact = True
        _, allowed, forced, entries = self._sets(choice)
        stride = self.stride(choice)
        units = [choice.unit, choice.unit // stride * stride, stride, choice.period, choice.grain]
        units += [unit for one in (rest, allowed, forced, entries) for unit in one.units()]

        def keys(q: int, trace: Trace) -> int:
            nonlocal exact
            found = self._listed(rest, choice, q, head, trace)
            exact = exact and bool(trace.constant(found.exact))
            return found.value

        found = total(keys, self.length, units)
        return Number(found, exact)

    def _listed(self, rest: Visible, choice: Choice, q: int, head: int, trace: Trace) -> Number:
        """Tokens of the units of one list that the rest of the test lets the query see.

        Which units of those with a score are taken is not known. Units that are seen in part (the query's own) make a
        difference only if they are not forced.
        """
        sets = self.units(choice, q, head, trace)
        seen = rest.spans(q, head, trace)
        whole, some = within(seen, choice.unit, trace), touched(seen, choice.unit, trace)
        forced = lowest(sets.forced, sets.room, trace)
        number = size(intersection(_tokens_of(forced, choice.unit), seen, trace))
        room = sets.room - size(forced)
        scored = size(sets.free)
        taken = trace.least(room, scored)
        full = trace.least(taken, size(intersection(sets.free, whole, trace)))
        part = difference(intersection(sets.free, some, trace), whole, trace)
        best = full * choice.unit + self._best(part, taken - full, seen, choice.unit, trace)
        hidden = scored - size(intersection(sets.free, whole, trace))
        exact = not trace.less(taken, scored) or not trace.less(0, hidden)
        plan, *_ = self._sets(choice)
        return Number(number + best, exact and choice.sized and not (plan is not None and plan.sets))

    @staticmethod
    def _best(units: Spans, most: int, seen: Spans, unit: int, trace: Trace) -> int:
        """Tokens of the `most` units with most seen tokens."""
        found: list[int] = []
        for first, end in units:
            for i in range(trace.constant(end - first)):
                own = (first + i) * unit
                tokens = size(intersection([(own, own + unit)], seen, trace))
                place = len(found)
                while place and trace.less(found[place - 1], tokens):
                    place -= 1
                found.insert(place, tokens)
        count = trace.constant(most if most < len(found) else len(found)) if found else 0
        return sum(found[: max(0, count)])

    def units(self, choice: Choice, q: int, head: int, trace: Trace) -> UnitSets:
        """Units that are forced, those that a score or the caller may choose, and how many a list holds."""
        plan, allowed_units, forced_units, entries = self._sets(choice)
        first = trace.floor(q, choice.rows) * choice.rows
        last = first + choice.rows - 1  # a tile sees what its last row sees, which may lie past the end
        if choice.for_all:
            first, last = 0, self.length - 1
        row = trace.floor(last, choice.grain)  # of the score
        allowed = allowed_units.spans(row, head, trace)
        forced = intersection(forced_units.spans(row, head, trace), allowed, trace)
        room = allowed_units.length if choice.capacity is None else choice.capacity
        if plan is None:
            return UnitSets([], allowed, room)
        seen = entries.spans(trace.least(last, self.length - 1), head, trace)
        if choice.rows > 1:  # its score is that of all its rows
            seen = union([*entries.spans(first, head, trace), *seen], trace)
        scored = self._scored(plan, seen, trace)
        return UnitSets(forced, difference(intersection(scored, allowed, trace), forced, trace), room)

    def _sets(self, choice: Choice) -> tuple[ChoicePlan | None, Visible, Visible, Visible]:
        """Units that are allowed and forced, and the entries that have a score; None where the caller has the list."""
        if choice.name not in self._known_sets:
            self._known_sets[choice.name] = self._sets_of(choice)
        return self._known_sets[choice.name]

    def _sets_of(self, choice: Choice) -> tuple[ChoicePlan | None, Visible, Visible, Visible]:
        units = -(-self.length // choice.unit)
        if choice.score is None:
            causal = sympy.Le(choice.unit * K, Q) if self.plan.pattern.causal else sympy.true
            allowed, none = self._see(causal, units), self._see(sympy.false, units)
            return None, allowed, none, none
        plan = next(found for found in self.plan.choices if found.choice == choice)
        allowed, forced = (self._see(_of_units(test, choice.unit), units) for test in (plan.allowed, plan.forced))
        (term,) = choice.score.softmax.terms
        return plan, allowed, forced, self._see(term.test, self.entries(self._scorer(choice)))

    def stride(self, choice: Choice) -> int:
        """Tokens between the entries that score a choice; of one by the caller a unit."""
        return choice.unit if choice.score is None else choice.score.grain.grid(self._scorer(choice).grid).stride

    def _scorer(self, choice: Choice) -> Stream:
        assert choice.score is not None
        stream = self.plan.pattern.input(choice.score.grain.stream)
        assert isinstance(stream, Stream)
        return stream

    def _scored(self, plan: ChoicePlan, seen: Spans, trace: Trace) -> Spans:
        """Units with a seen entry; of a score of cells of tokens a seen token."""
        if plan.choice.score is not None and plan.choice.score.grain.cells > 1:
            return touched(seen, plan.choice.unit, trace)
        each, before = plan.ratio, plan.first + len(plan.weights)
        units = -(-self.length // plan.choice.unit)
        parts = ((trace.floor(a - before, each) + 1, trace.ceil(b - plan.first, each)) for a, b in seen)
        return union(((trace.most(a, 0), trace.least(b, units)) for a, b in parts), trace)

    # ---- a decode step

    def read(self, softmax: SoftmaxPlan) -> Read:
        """What it reads for the last token."""
        streams = [sweep.stream for sweep in softmax.sweeps]
        heads, qk, v = self.stream(streams[0])
        row = qk + (v if softmax.role is Role.BRANCH and streams[0].value is Values.OWN else 0)
        query_heads = self.heads(softmax.softmax)
        lists = heads if softmax.units is None else self.lists(softmax.units, softmax.softmax)
        group = max(1, query_heads // lists)
        last = (self.length - 1) // softmax.softmax.rows
        counts = [self.keys(softmax, last, range(i * group, (i + 1) * group)) for i in range(lists)]
        most = max(counts, key=lambda one: one.value)
        total = sum(counts, Number(0))
        return Read(softmax.name, most, total * (self.shape.batch * row * self.shape.size))


def _of_units(test: Boolean, unit: int) -> Boolean:
    """A test over the first and last key of a unit as one over its number."""
    return test.xreplace({K_FIRST: unit * K, K_LAST: unit * K + unit - 1})


def _tokens_of(units: Spans, unit: int) -> Spans:
    return [(first * unit, end * unit) for first, end in units]
