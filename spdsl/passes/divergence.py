"""divergence: whether that of two scores needs the keys of a list alone, and whether kernels walk them."""

from __future__ import annotations

from spdsl.ir.pattern import Choice, Kl
from spdsl.ir.plan import Role, SoftmaxPlan
from spdsl.ir.symbols import H


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


def walked_by(kl: Kl, target: SoftmaxPlan, score: SoftmaxPlan) -> Choice | None:
    """The choice whose units kernels walk for the divergence; None: torch computes it.

    Kernels add the heads of a list up before they mask, so all of them see the same keys; a maximum over heads has
    a gradient of its own. They walk the units that the branch of the target walks, which leaves its log-sum-exp. The
    score is its logits alone, without a bias: a row that is not there scores 0.
    """
    added = all(side.share == "group" and side.heads_by in (None, "sum", "mean") for side in (kl.target, kl.score))
    branch = target.role is Role.BRANCH and not target.pairs
    logits = score.units is None and not kl.score.score.probability
    plain = score.softmax.bias is None and not score.reads and score.softmax.product.attended
    walked = added and branch and logits and plain and _alike(target) and _alike(score)
    return list_of(kl, target, score) if walked else None


def _alike(plan: SoftmaxPlan) -> bool:
    """Whether all heads see the same keys, those of one stream."""
    return len(plan.sweeps) == 1 and H not in plan.sweeps[0].test.free_symbols


def _of_tokens(plan: SoftmaxPlan) -> bool:
    return all(sweep.stream.grid.is_tokens for sweep in plan.sweeps)
