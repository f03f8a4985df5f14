"""softmax_text: what the templates print of a softmax, every expression as text and every decision made."""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.codegen.bias_text import BiasText
from spdsl.codegen.spelling import camel
from spdsl.ir.pattern import Choice, Grid, Stream, Tensor
from spdsl.ir.plan import Role
from spdsl.runtime.tuning.configs import row_of_table


@dataclass(frozen=True, slots=True)
class RangeText:
    """A range in one dialect; the condition is empty where it always holds."""

    first: str
    end: str
    condition: str
    full_first: str
    full_end: str
    full: str  # "True": whenever visited, "False": never, else a condition


@dataclass(frozen=True, slots=True)
class SweepText:
    name: str  # prefix of its functions
    stream: Stream
    ranges: bool  # else lists
    line: int
    visible: str
    by_head: bool  # whether heads, or the tensors that are read, see other keys
    mask: str
    keys: tuple[RangeText, ...]
    rows: tuple[RangeText, ...]
    visits: tuple[RangeText, ...]
    decode: tuple[RangeText, ...]
    decode_visits: tuple[RangeText, ...]
    may: str
    must: str
    extremes: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class SkipText:
    """What a softmax leaves out: its level in Triton and in torch, and the sizes of a tile."""

    level: str
    level_of: str
    rows: int
    unit: int
    restart: int
    by_group: bool  # all query heads of a kv head vote together

    @property
    def by_row(self) -> bool:
        """Whether each row of a program votes for itself: they are heads."""
        return self.rows == 1 and not self.by_group


@dataclass(frozen=True, slots=True)
class SoftmaxText:
    name: str
    query: str
    sweeps: tuple[SweepText, ...]
    reads: tuple[Tensor | Choice, ...]
    scale: str
    scaled_first: bool  # a scale that would not keep the order of scores, nor -inf, were it left to the end
    softcap: float
    product: str
    sink: str | None
    bias: str
    bias_mask: str
    bias_floats: tuple[str, ...]  # float tensors that the bias reads
    learned_reads: tuple[BiasText, ...]  # what of them has a gradient that some call takes
    skip_empty: bool  # decode tests a block's mask before it loads the block
    step: int
    of_class: SoftmaxText | None
    is_class: bool  # over one residue class: for `attention` only
    role: Role
    learns: bool  # some call takes its gradient
    units: Choice | None  # the choice that its one sweep walks
    unwanted: str  # the lengths at which another result answers; empty: none
    pairs: bool  # each unit meets the queries that chose it
    grid: Grid
    skip: SkipText | None = None

    @property
    def cells(self) -> str:
        """The cells of its entries; empty: tokens."""
        return "" if self.grid.is_tokens else cells_of(self.grid)

    @property
    def grains(self) -> str:
        """The same, tokens as cells of one."""
        return cells_of(self.grid)

    @property
    def reads_class(self) -> str:
        """The name of the tuple of tensors that it reads."""
        return camel(self.name) + "Reads"

    @property
    def by_row(self) -> bool:
        """Whether it reads numbers of the rows of a call."""
        return any(isinstance(source, Tensor) and source.by_row for source in self.reads)

    def own_reads(self, reads: str) -> str:
        """Of the tensors that it reads, the part of the sequences of a `corner`."""
        if self.by_row:
            return f"{self.name}_form.own({reads}, corner, layout)[0]"
        return f"{self.name}_reads_of({reads}, corner.sequences, None if layout.q_spans is None else corner.tokens)"

    @property
    def row(self) -> str:
        """What the rows of its tables are called, behind the kernel."""
        by_pair = any(isinstance(source, Tensor) and source.by_pair for source in self.reads)
        return row_of_table("", bool(self.bias), by_pair)

    @property
    def multiply(self) -> str:
        """The device function of its product, in kernels of its own."""
        return "rt.dot_rows" if self.product == "dot" else f"{self.name}_product"

    @property
    def lists(self) -> bool:
        return self.units is None and any(not sweep.ranges for sweep in self.sweeps)

    @property
    def is_branch(self) -> bool:
        return self.role is Role.BRANCH

    @property
    def is_computed(self) -> bool:
        """Whether it has kernels of its own."""
        return self.role is not Role.LOGITS

    @property
    def keys(self) -> tuple[str, ...]:
        """The K and V arguments of its streams; where no output is made, K alone."""
        arguments = [(sweep.stream.key_argument, sweep.stream.value_argument) for sweep in self.sweeps]
        return tuple(name for k, v in arguments for name in (k, v if self.is_branch else None) if name)

    @property
    def read_arguments(self) -> tuple[str, ...]:
        """The tensors that it reads; a choice comes as its map and the row tile that the map starts with."""
        names = [(x.name, f"{x.name}_first") if isinstance(x, Choice) else (x.name,) for x in self.reads]
        return tuple(name for pair in names for name in pair)

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensor arguments of its operator, in order."""
        return (*self.learned, *self.looked_up)

    @property
    def learned(self) -> tuple[str, ...]:
        """Those that get a gradient."""
        return (self.query, *self.keys, *((self.sink,) if self.sink else ()))

    @property
    def looked_up(self) -> tuple[str, ...]:
        return (*self.read_arguments, *((self.units.name,) if self.units else ()))

    @property
    def bias_learned(self) -> tuple[str, ...]:
        """The tensors of these, each once: they get a gradient where they want one."""
        return tuple(dict.fromkeys(read.tensor.name for read in self.learned_reads))

    @property
    def parts(self) -> tuple[SoftmaxText, ...]:
        """What an operator computes, as a `JointText` has it."""
        return (self,)


@dataclass(frozen=True, slots=True)
class JointText:
    """Softmaxes that are merged within one operator."""

    name: str
    parts: tuple[SoftmaxText, ...]

    @property
    def learns(self) -> bool:
        return any(part.learns for part in self.parts)

    @property
    def learned(self) -> tuple[str, ...]:
        """The tensors that get a gradient, each once."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.learned))

    @property
    def looked_up(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.looked_up))

    @property
    def bias_learned(self) -> tuple[str, ...]:
        """The tensors in biases that get a gradient where they want one."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.bias_learned))

    @property
    def tensors(self) -> tuple[str, ...]:
        return (*self.learned, *self.looked_up)


def cells_of(grid: Grid) -> str:
    """A grid as the module writes it."""
    more = [f"before={grid.before}"] * bool(grid.before) + ["partial=True"] * grid.partial
    return f"rt.Cells({', '.join([str(grid.width), str(grid.stride), *more])})"
