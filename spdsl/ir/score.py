"""Scores: numbers that a softmax has on its way, for choices and as further results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from spdsl.diagnostics import Span
from spdsl.ir.branch import Softmax


@dataclass(frozen=True, slots=True)
class Grain:
    """What a score has numbers for: each head of `query`, each cell of `rows` queries, each entry of `stream`."""

    query: str
    rows: int
    stream: str


@dataclass(frozen=True, slots=True)
class Logits:
    """A score: the logits of a softmax, which stands here alone (only they are computed, no output) or is a branch."""

    softmax: Softmax
    probability: ClassVar[bool] = False

    @property
    def grain(self) -> Grain:
        return Grain(self.softmax.query, self.softmax.rows, self.softmax.terms[0].stream)


@dataclass(frozen=True, slots=True)
class Mass:
    """A score: the probabilities of a softmax, exp(logit - lse). One that is no branch is computed for its lse only."""

    softmax: Softmax
    probability: ClassVar[bool] = True

    @property
    def grain(self) -> Grain:
        return Grain(self.softmax.query, self.softmax.rows, self.softmax.terms[0].stream)


Score = Logits | Mass


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
