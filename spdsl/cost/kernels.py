"""kernels: every kernel that one call starts, with its operations and bytes, of the algorithm and of the machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from spdsl.cost.machine import Machine, padded
from spdsl.cost.pair_products import of_algorithm, of_tiles
from spdsl.cost.upper_bound import depends, upper_bound
from spdsl.ir.pattern import Choice, Phase, Softmax, Stream, Tensor, Values
from spdsl.ir.plan import Plan, Role, SoftmaxPlan
from spdsl.ir.schedule import Kind, Stage, Step
from spdsl.passes.count import Count, Number, Shape

LSE_BYTES = 4  # float32
INDEX_BYTES = 4  # int32
NONE = Number(0)


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one kernel does in all its launches, or what torch does around kernels.

    flops, bytes: of the algorithm: visible pairs, each tensor once. machine, moved: of the tiles that are visited.
    A product of n numbers is 2 n FLOPs; `exps` are exponentials of the machine, beside the FLOPs.
    """

    name: str
    part: str  # compress, score, select, attend, backward, combine, cache, lists or extra
    rate: str  # which measured efficiency it is timed by
    launches: int = 0
    operators: int = 0  # of torch
    flops: Number = NONE
    machine: Number = NONE
    exps: Number = NONE
    bytes: Number = NONE
    moved: Number = NONE


@dataclass(frozen=True, slots=True)
class Options:
    """What is declared where tensors decide.

    density: the share of the visible pairs that is left, and of the tiles. overlap: how alike neighbours choose.
    learned: whether the tensors that biases read want gradients.
    """

    density: float = 1.0
    overlap: float = 0.0
    learned: bool = False


USUAL = Options()


@lru_cache(maxsize=512)
def count_of(plan: Plan, length: int, shape: Shape) -> Count:
    """The counts of the upper bound, shared by the stages of one length."""
    return Count(upper_bound(plan), length, shape)


class Call:
    """One call of a compiled pattern on one machine: its counts, and the sizes that kernels have in common."""

    def __init__(self, plan: Plan, stage: Stage, length: int, shape: Shape, machine: Machine, options: Options) -> None:
        self.plan, self.stage, self.phase, self.length, self.shape = plan, stage, stage.phase, length, shape
        self.machine, self.options = machine, options
        self.count = count_of(plan, length, shape)

    @cached_property
    def softmaxes(self) -> list[SoftmaxPlan]:
        names = {step.name for step in self.count.computed(self.phase) if isinstance(step, Softmax)}
        return [one for one in self.count.plan.softmaxes if one.name in names]

    @property
    def queries(self) -> int:
        """Of one sequence."""
        return 1 if self.phase is Phase.DECODE else self.length

    def rows_of(self, softmax: SoftmaxPlan) -> int:
        """Of one sequence: queries, cells of them, or the last ones."""
        return 1 if self.phase is Phase.DECODE else self.count.rows(softmax.softmax)[1]

    def rows(self, width: int) -> int:
        """Cells of `width` queries."""
        return -(-self.queries // width)

    @property
    def streams(self) -> list[Stream]:
        """Streams of tokens that the pattern takes: all of them are cached."""
        return [one for one in self.plan.pattern.inputs if isinstance(one, Stream) and one.compress is None]

    @property
    def token_tensors(self) -> list[Tensor]:
        """Tensors with a value for each token: cached, too."""
        return [one for one in self.plan.pattern.inputs if isinstance(one, Tensor) and one.by_token]

    # ---- sizes

    def dims(self, softmax: SoftmaxPlan) -> tuple[int, int]:
        """qk and v; a softmax that only scores has no values."""
        _, qk, v = self.count.stream(softmax.sweeps[0].stream)
        return qk, (v or qk) if softmax.role is Role.BRANCH else 0

    def tile_dims(self, softmax: SoftmaxPlan) -> tuple[int, int]:
        """The columns that a forward multiplies; one that only gives lse has 16 of them for values."""
        qk, v = self.dims(softmax)
        return padded(qk), padded(v or 16)

    def pair_flops(self, kind: Kind, softmax: SoftmaxPlan) -> int:
        """Of the algorithm, for a pair of a query head and a key."""
        return 2 * of_algorithm(kind, *self.dims(softmax))

    def visible_flops(self, step: Step[SoftmaxPlan]) -> Number:
        """Of the algorithm, for all visible pairs of the batch."""
        return self.pairs(step.of) * (self.pair_flops(step.kind, step.of) * self.shape.batch)

    def tile_flops(self, kind: Kind, softmax: SoftmaxPlan) -> int:
        """Of the machine, for a pair of a tile."""
        return 2 * of_tiles(kind, *self.tile_dims(softmax))

    def lists(self, choice: Choice, softmax: SoftmaxPlan) -> int:
        return self.count.lists(choice, softmax.softmax)

    def group(self, choice: Choice, softmax: SoftmaxPlan) -> int:
        """Query heads that share a list."""
        return self.count.heads(softmax.softmax) // self.lists(choice, softmax)

    def many(self, number: int, exact: bool = True) -> Number:
        """Of one sequence -> of the batch."""
        return Number(number * self.shape.batch, exact)

    # ---- counts of the upper bound, thinned

    def pairs(self, softmax: SoftmaxPlan) -> Number:
        return self.thinned(softmax, self.count.pairs(softmax))

    def thinned(self, softmax: SoftmaxPlan, number: Number) -> Number:
        """Pairs or tiles where only tensors tell: the most, or the declared share."""
        if not depends(self.plan, softmax.name.removesuffix("_class")):
            return number
        return Number(round(number.value * self.options.density), exact=False)

    # ---- bytes

    def rows_bytes(self, softmax: SoftmaxPlan, vectors: int) -> Number:
        """`vectors` numbers for each row in the dtype of the call, and its lse."""
        rows = self.rows_of(softmax) * self.count.heads(softmax.softmax)
        return self.many(rows * (vectors * self.shape.size + LSE_BYTES))

    def keys_bytes(self, softmax: SoftmaxPlan) -> Number:
        """All keys of a softmax once, and their values."""
        found = 0
        for sweep in softmax.sweeps:
            heads, qk, v = self.count.stream(sweep.stream)
            own = v if softmax.role is Role.BRANCH and sweep.stream.value is Values.OWN else 0
            found += heads * self.count.entries(sweep.stream) * (qk + own)
        return self.many(found * self.shape.size)

    def list_bytes(self, choice: Choice, softmax: SoftmaxPlan, width: int = 1) -> Number:
        """Of cells of `width` queries. The caller says how long its lists are, up to a bound."""
        lists = self.rows(choice.rows) if choice.tiled else self.rows(width)
        numbers = lists * self.lists(choice, softmax) * self.capacity(choice)
        return self.many(numbers * INDEX_BYTES, exact=not choice.given)

    def capacity(self, choice: Choice) -> int:
        return choice.capacity or max(1, -(-self.length // choice.unit))


def added(numbers: Iterable[Number]) -> Number:
    return sum(numbers, NONE)
