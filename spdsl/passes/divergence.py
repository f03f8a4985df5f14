"""divergence: whether that of two scores needs the keys of a list alone."""

from __future__ import annotations

from spdsl.ir.pattern import Choice, Kl
from spdsl.ir.plan import SoftmaxPlan


def list_of(kl: Kl, target: SoftmaxPlan, score: SoftmaxPlan) -> Choice | None:
    """The choice whose units hold all that the target sees: of other entries nothing counts.

    None where all entries are scored: heads that are added up have lists of their own, or each has its own total
    over what it sees, or entries are not tokens.
    """
    choice = target.units
    sides = ((kl.target, target), (kl.score, score))
    plain = all(side.unit_by is None and side.rows == 1 and _of_tokens(plan) for side, plan in sides)
    if choice is None or not plain:
        return None
    by_head = kl.target.share == "head"
    same_heads = by_head or choice.share != "head"
    shift_cancels = by_head or not kl.score.score.probability
    return choice if same_heads and shift_cancels else None


def _of_tokens(plan: SoftmaxPlan) -> bool:
    return all(sweep.stream.grid.is_tokens for sweep in plan.sweeps)
