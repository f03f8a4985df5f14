"""Scores: numbers for a query and an entry, for choices and as further results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from spdsl.diagnostics import Span
from spdsl.ir.branch import Softmax
from spdsl.ir.inputs import Grid


@dataclass(frozen=True, slots=True)
class Grain:
    """What a score has numbers for: each head of `query`, each cell of `rows` queries, each entry of `stream`, or each
    cell of `cells` of its tokens.
    """

    query: str
    rows: int
    stream: str
    cells: int = 1

    def grid(self, stream: Grid) -> Grid:
        """Where the score's entries lie, on a stream with this grid. A short last cell of tokens counts."""
        return stream if self.cells == 1 else Grid(self.cells, self.cells, partial=True)


@dataclass(frozen=True, slots=True)
class Logits:
    """A score: the logits of a softmax, which stands here alone (only they are computed, no output) or is a branch."""

    softmax: Softmax
    probability: ClassVar[bool] = False

    @property
    def grain(self) -> Grain:
        return grain_of(self.softmax)


@dataclass(frozen=True, slots=True)
class Mass:
    """A score: the probabilities of a softmax, exp(logit - lse). One that is no branch is computed for its lse only."""

    softmax: Softmax
    probability: ClassVar[bool] = True

    @property
    def grain(self) -> Grain:
        return grain_of(self.softmax)


@dataclass(frozen=True, slots=True)
class Combined:
    """A score: the sum of scores of one grain, each times its weight."""

    parts: tuple[Score, ...]
    weights: tuple[float, ...]

    @property
    def probability(self) -> bool:
        """A multiple of probabilities is one, but for its total; a sum of them is none."""
        return len(self.parts) == 1 and self.weights[0] > 0 and self.parts[0].probability

    @property
    def grain(self) -> Grain:
        return self.parts[0].grain

    @property
    def softmax(self) -> Softmax:
        return self.parts[0].softmax


@dataclass(frozen=True, slots=True)
class Relative:
    """A score: less the greatest of the row's candidates. Of the rows and heads of a list together."""

    score: Score
    probability: ClassVar[bool] = False

    @property
    def grain(self) -> Grain:
        return self.score.grain

    @property
    def softmax(self) -> Softmax:
        return self.score.softmax


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A score: `mean` or `max` of the `width` entries around each. Of the rows and heads of a list together."""

    score: Score
    width: int
    by: str

    @property
    def probability(self) -> bool:
        return self.score.probability

    @property
    def grain(self) -> Grain:
        return self.score.grain

    @property
    def softmax(self) -> Softmax:
        return self.score.softmax


Score = Logits | Mass | Combined | Relative | Smoothed


def grain_of(softmax: Softmax) -> Grain:
    """Rows are those of the query, which may be cells, or what the product makes one number of."""
    step = softmax.product.step
    return Grain(softmax.query, softmax.rows * step, softmax.terms[0].stream, step)


def leaves_of(score: Score) -> Iterator[Logits | Mass]:
    """The logits and probabilities that a score is made of, in the order in which they are written."""
    match score:
        case Logits() | Mass():
            yield score
        case Combined():
            for part in score.parts:
                yield from leaves_of(part)
        case Relative() | Smoothed():
            yield from leaves_of(score.score)


def softmaxes_of(score: Score) -> tuple[Softmax, ...]:
    """Those whose logits it is made of, each once."""
    return tuple(dict.fromkeys(leaf.softmax for leaf in leaves_of(score)))


def in_memory(score: Score) -> bool:
    """Whether the numbers of rows stand in memory before they are reduced; else kernels reduce as they multiply."""
    return not isinstance(score, Logits | Mass) or score.softmax.product.step > 1


def of_lists(score: Score) -> bool:
    """Whether some part of it is of the heads and rows of a list together."""
    match score:
        case Relative() | Smoothed():
            return True
        case Combined():
            return any(map(of_lists, score.parts))
    return False


@dataclass(frozen=True, slots=True)
class Pooled:
    """A score as a further result: float [B, heads, row tiles, units], heads and reductions as in `Choice`."""

    score: Score
    unit: int
    rows: int
    share: str
    heads_by: str | None = None
    rows_by: str | None = None
    unit_by: str | None = None
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Kl:
    """KL(target || score) per (head, row) as a further result, [B, heads, N]; its gradient reaches the score only.

    Both are taken as distributions over the entries that the target's softmax sees.
    """

    target: Pooled
    score: Pooled
    span: Span | None = field(default=None, compare=False)
