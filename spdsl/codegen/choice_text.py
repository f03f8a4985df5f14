"""choice_text: what the templates print of a choice that is selected by a score."""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.codegen.softmax_text import SoftmaxText, cells_of, map_arguments
from spdsl.ir.pattern import (
    Choice,
    Combined,
    Grid,
    Logits,
    Mass,
    Relative,
    Score,
    Smoothed,
    Tensor,
    in_memory,
    softmaxes_of,
)
from spdsl.ir.plan import ChoicePlan
from spdsl.ir.rule import TopP
from spdsl.ir.score import of_lists
from spdsl.passes.selection import ranked


@dataclass(frozen=True, slots=True)
class UnitText:
    """The unit `reach` units behind the first that an entry overlaps, in a kernel that scores units."""

    reach: int
    plan: ChoicePlan

    @property
    def _suffix(self) -> str:
        return f"_{self.reach}" if self.reach else ""

    @property
    def score(self) -> str:
        return f"score{self._suffix}"

    @property
    def scored(self) -> str:
        return f"scored{self._suffix}"

    @property
    def seen(self) -> str:
        return f"seen{self._suffix}" if self.some else "seen"

    @property
    def some(self) -> bool:
        """Whether it shares only some of the entries that others see first."""
        return len(self.plan.weights_of(self.reach)) < len(self.plan.weights_of(0))

    @property
    def weight(self) -> float:
        """Of all its entries but the `others`."""
        return list(self.plan.weights_of(self.reach).values())[-1]

    @property
    def others(self) -> dict[int, float]:
        return {i: weight for i, weight in self.plan.weights_of(self.reach).items() if weight != self.weight}


@dataclass(frozen=True, slots=True)
class LimitsText:
    """The numbers of a choice of which the call says at least one, in torch, and what they are made of."""

    least: str
    most: str
    level: str
    heads: bool
    length: bool


@dataclass(frozen=True, slots=True)
class SetsText:
    """`force` and `within` of a choice as tests of single tokens in torch, and what they read."""

    name: str
    reads: tuple[Tensor | Choice, ...]
    forced: str
    within: str
    step: int  # tokens after which they may differ
    bias: str = ""
    by_row: bool = False

    @property
    def read_arguments(self) -> tuple[str, ...]:
        return map_arguments(self.reads)


@dataclass(frozen=True, slots=True)
class ChoiceText:
    """A selected choice: `forced` and `allowed` over q, k_first and k_last, in Triton and in torch."""

    choice: Choice
    softmax: SoftmaxText  # whose logits are the score
    probability: bool  # it needs the log-sum-exp of the softmax
    forced: str
    allowed: str
    forced_mask: str
    allowed_mask: str
    plan: ChoicePlan
    limits: LimitsText | None
    sets: SetsText | None
    softmaxes: tuple[SoftmaxText, ...]  # all of the score
    score: str  # of what all numbers stand in memory: the function that makes it, in torch; else ""
    grid: Grid  # of its entries
    step: int  # queries, and tokens, of one of its cells

    @property
    def grains(self) -> str:
        return cells_of(self.grid)

    @property
    def level(self) -> str:
        """The least score of a unit; "": any."""
        level = self.choice.level
        return "" if level is None else str(level) if isinstance(level, float) else "level"

    @property
    def by_mass(self) -> bool:
        """Whether its lists take a part of all mass."""
        return isinstance(self.choice.rule, TopP)

    @property
    def part(self) -> float:
        """That part; 1 where the call says it."""
        part = self.choice.part
        return part if isinstance(part, float) else 1.0

    @property
    def below(self) -> bool:
        """Whether the part is the most that a list may hold, or the least."""
        return isinstance(self.choice.rule, TopP) and self.choice.rule.side == "below"

    @property
    def least(self) -> int:
        """The same of units; 1 where the call says how many, for kernels that ask whether there are such."""
        return int(self.choice.least) if self.choice.least.is_number else 1

    @property
    def name(self) -> str:
        return self.choice.name

    @property
    def fields(self) -> tuple[str, ...]:
        """What a call has of it: lists, and of tiles the map that tests look up, with its first row tile."""
        return (self.name, self.choice.map_argument, f"{self.name}_first") if self.choice.tiled else (self.name,)

    @property
    def units(self) -> tuple[UnitText, ...]:
        """The units that an entry adds to: the first that it overlaps, and those behind that."""
        return tuple(UnitText(reach, self.plan) for reach in range(self.plan.reach + 1))

    @property
    def counted(self) -> bool:
        """Whether its entries are counted: a greatest score tells by itself that there is none."""
        return self.choice.unit_by in ("sum", "mean")

    @property
    def ranked(self) -> bool:
        """Whether one kernel scores and ranks its units, or two score and cut."""
        return ranked(self.choice)

    @property
    def key_argument(self) -> str:
        return self.softmax.sweeps[0].stream.key_argument


def score_text(score: Score) -> str:
    """A score whose numbers stand in memory: of logits `of`, and of `of_lists`, which puts heads and rows together."""
    if not in_memory(score):
        return ""
    order = softmaxes_of(score)

    def text(part: Score, listed: bool) -> str:
        """`listed`: of the heads and rows of a list together."""
        match part:
            case Relative():
                return f"rt.relative({text(part.score, True)})"
            case Smoothed():
                return f'rt.smoothed({text(part.score, True)}, {part.width}, "{part.by}")'
        if listed and not of_lists(part):
            return f"of_lists({text(part, False)})"
        match part:
            case Combined():
                parts = "".join(f"{text(one, listed)}, " for one in part.parts)
                return f"rt.weighted_sum({part.weights!r}, ({parts}))"
            case Mass():
                return f"rt.probabilities(of[{order.index(part.softmax)}])"
            case Logits():
                return f"of[{order.index(part.softmax)}]"

    return text(score, True)
