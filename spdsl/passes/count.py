"""count: how many keys the queries of a plan see, exactly, and what that costs in FLOPs and bytes.

Numbers of the algorithm, not of a machine: every tensor is read and written once, a product of n x d and d x m numbers
is 2 n d m FLOPs, and only visible pairs count. `exact` is false where scores decide: then the number is the most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import sympy

from spdsl.ir.pattern import Case, Choice, Pattern, Phase, Query, Softmax, Stream, Values
from spdsl.ir.plan import ChoicePlan, Plan, Role, SoftmaxPlan
from spdsl.ir.symbols import K_FIRST, K_LAST, LENGTH, Boolean, K
from spdsl.passes.visible import DependsOnData, Visible, bits


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
class Step:
    """A decode step at a length, and the bytes that dense attention reads there."""

    length: int
    reads: tuple[Read, ...]
    dense_bytes: int

    @property
    def keys(self) -> Number:
        return sum((read.keys for read in self.reads), Number(0))

    @property
    def bytes(self) -> Number:
        return sum((read.bytes for read in self.reads), Number(0))


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
        self._sets = cache(self._sets_of)
        self.pairs = cache(self._pairs)

    # ---- sizes of parts

    def heads(self, softmax: Softmax) -> int:
        query = self.plan.pattern.input(softmax.query)
        assert isinstance(query, Query)
        return query.heads or self.shape.heads

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
        """Whole cells of a sequence; tokens for a stream of tokens."""
        grid, tokens = stream.grid, self.length if tokens is None else tokens
        return tokens if grid.is_tokens else max(0, (tokens - grid.width) // grid.stride + 1)

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

    def softmaxes(self, phase: Phase) -> list[SoftmaxPlan]:
        names = {step.name for step in self.plan.pattern.steps(self.case(phase)) if isinstance(step, Softmax)}
        return [found for found in self.plan.softmaxes if found.name in names]

    def choices(self, phase: Phase) -> list[ChoicePlan]:
        steps = self.plan.pattern.steps(self.case(phase))
        return [found for found in self.plan.choices if found.choice in steps]

    def _see(self, test: Boolean, cells: int) -> Visible:
        return Visible(test.xreplace({LENGTH: sympy.Integer(self.length)}), cells)

    def keys(self, softmax: SoftmaxPlan, q: int, heads: range) -> Number:
        """Different keys that some of the heads see, over all streams; of lists those of one."""
        if softmax.units is not None:
            return self._listed(softmax, softmax.units, q, heads)
        total = 0
        for sweep in softmax.sweeps:
            seen = self._visible(sweep.test, self.entries(sweep.stream))
            union = 0
            for head in heads if seen.by_head else heads[:1]:
                union |= seen.keys(q, head)
            total += union.bit_count()
        return Number(total)

    def _pairs(self, softmax: SoftmaxPlan) -> Number:
        """Visible (query, key) pairs of a whole sequence, over all query heads."""
        heads = self.heads(softmax.softmax)
        by_head = softmax.units is None and any(
            self._visible(sweep.test, self.entries(sweep.stream)).by_head for sweep in softmax.sweeps
        )
        groups = [range(h, h + 1) for h in range(heads)] if by_head else [range(1)]
        counts = [self.keys(softmax, q, group) for group in groups for q in range(self.length)]
        total = Number(sum(one.value for one in counts), all(one.exact for one in counts))
        return total if by_head else total * heads

    def _listed(self, softmax: SoftmaxPlan, choice: Choice, q: int, heads: range) -> Number:
        """Tokens of the units of one list that the rest of the test lets the query see.

        Which units of those with a score are taken is not known. Units that are seen in part (the query's own) make a
        difference only if they are not forced.
        """
        forced, free, room = self._units(choice, q, heads.start)
        seen = self._visible(softmax.sweeps[0].test, self.length).keys(q, heads.start)
        whole, part = self._seen_units(seen, choice.unit)
        number = Number(sum(_tokens(seen, unit, choice.unit) for unit in _places(forced, room)))
        room -= min(room, forced.bit_count())
        taken = min(room, free.bit_count())
        most = sorted((_tokens(seen, unit, choice.unit) for unit in _places(free & part)), reverse=True)
        full = min(taken, (free & whole).bit_count())
        best = full * choice.unit + sum(most[: taken - full])
        exact = taken == free.bit_count() or not (free & ~whole)
        return number + Number(best, exact and choice.rule == "top_k")

    @staticmethod
    def _seen_units(seen: int, unit: int) -> tuple[int, int]:
        """Units that are seen whole, and in part."""
        if not seen & (seen + 1):  # a prefix
            count = seen.bit_length()
            return bits(0, count // unit), bits(count // unit, -(-count // unit))
        tokens = [_tokens(seen, i, unit) for i in range(-(-seen.bit_length() // unit))]
        return (
            sum(1 << i for i, n in enumerate(tokens) if n == unit),
            sum(1 << i for i, n in enumerate(tokens) if 0 < n < unit),
        )

    def _units(self, choice: Choice, q: int, head: int) -> tuple[int, int, int]:
        """Units that are forced, those that a score may choose, and how many a list holds."""
        plan, allowed_units, forced_units, entries = self._sets(choice)
        allowed = allowed_units.keys(q, head)
        forced = forced_units.keys(q, head) & allowed
        room = allowed_units.length if choice.capacity is None else choice.capacity
        return forced, self._scored(plan, entries.keys(q, head)) & allowed & ~forced, room

    def _sets_of(self, choice: Choice) -> tuple[ChoicePlan, Visible, Visible, Visible]:
        """Units that are allowed and forced, and the entries that have a score."""
        plan = next(found for found in self.plan.choices if found.choice == choice)
        assert choice.score is not None
        units = -(-self.length // choice.unit)
        allowed, forced = (self._see(_of_units(test, choice.unit), units) for test in (plan.allowed, plan.forced))
        (term,) = choice.score.softmax.terms
        return plan, allowed, forced, self._see(term.test, self.entries(self._scorer(choice)))

    def _scorer(self, choice: Choice) -> Stream:
        assert choice.score is not None
        stream = self.plan.pattern.input(choice.score.stream)
        assert isinstance(stream, Stream)
        return stream

    def _scored(self, plan: ChoicePlan, seen: int) -> int:
        """Units with a seen entry."""
        each, first = plan.choice.unit // self._scorer(plan.choice).grid.stride, plan.first
        units = -(-self.length // plan.choice.unit)
        if not seen & (seen + 1):  # a prefix: a unit has an entry if the first that touches it is seen
            return bits(0, min(units, -(-(seen.bit_length() - first) // each))) if seen else 0
        spans = ((max(0, u * each + first), u * each + first + len(plan.weights)) for u in range(units))
        return sum(1 << u for u, span in enumerate(spans) if seen & bits(*span))

    # ---- a decode step

    def step(self) -> Step:
        """What one new token at the end of the sequence reads."""
        reads = tuple(self._read(softmax) for softmax in self.softmaxes(Phase.DECODE))
        row = self.shape.kv_heads * (self.shape.qk + self.shape.v) * self.shape.size
        return Step(self.length, reads, self.shape.batch * self.length * row)

    def _read(self, softmax: SoftmaxPlan) -> Read:
        streams = [sweep.stream for sweep in softmax.sweeps]
        heads, qk, v = self.stream(streams[0])
        row = qk + (v if softmax.role is Role.BRANCH and streams[0].value is Values.OWN else 0)
        query_heads = self.heads(softmax.softmax)
        lists = heads if softmax.units is None else self.lists(softmax.units, softmax.softmax)
        group = max(1, query_heads // lists)
        counts = [self.keys(softmax, self.length - 1, range(i * group, (i + 1) * group)) for i in range(lists)]
        most = max(counts, key=lambda one: one.value)
        total = sum(counts, Number(0))
        return Read(softmax.name, most, total * (self.shape.batch * row * self.shape.size))


def _of_units(test: Boolean, unit: int) -> Boolean:
    """A test over the first and last key of a unit as one over its number."""
    return test.xreplace({K_FIRST: unit * K, K_LAST: unit * K + unit - 1})


def _tokens(seen: int, unit: int, size: int) -> int:
    return ((seen >> (unit * size)) & ((1 << size) - 1)).bit_count()


def _places(found: int, most: int | None = None) -> list[int]:
    """Numbers of the set bits, the lowest `most` of them."""
    places: list[int] = []
    while found and (most is None or len(places) < most):
        low = found & -found
        places.append(low.bit_length() - 1)
        found ^= low
    return places
