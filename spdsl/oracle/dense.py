"""dense: what a pattern means, in float64, every pair of query and key tested. Differentiable; no kernel is used.

`inputs` by name: queries [B, Hq, N, dim]; streams `k_name`, `v_name` [B, heads, M, dim] (`k`, `v` for `kv`; none for
compressed streams, but their weights); tensors [B, *axes] or, without a token axis, [*axes]; choices int [B, heads,
row tiles, most], counted from the tile of the first query, padded with -1 (a given one must be there, any other is
used instead of being computed); `gates` [B, Hq, N, branches].
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Pattern, Phase, Term
from spdsl.oracle.call import Call, Result
from spdsl.oracle.evaluate import Environment, evaluate
from spdsl.oracle.sizes import Inputs, Sizes, sizes_of
from spdsl.oracle.softmax import Part

__all__ = ["Sizes", "attention", "choices", "environment", "results", "scores", "sizes_of", "visible"]


def environment(pattern: Pattern, inputs: Inputs, sizes: Sizes, stream: str | None = None) -> Environment:
    """The symbols of element tests on a stream (on tokens), and every tensor and choice that they may read."""
    return Call(pattern, inputs, sizes).around(stream)


def visible(pattern: Pattern, term: Term, inputs: Inputs, sizes: Sizes) -> Tensor:
    """Which entries of the term's stream each query sees: bool [B, Hq, N, M]."""
    call = Call(pattern, inputs, sizes)
    mask = evaluate(term.test, call.around(term.stream))
    return mask.expand(sizes.batch, sizes.heads, sizes.rows, call.entries(term.stream))


def attention(
    pattern: Pattern, inputs: Inputs, phase: str = "train", *, q_offset: int | None = None, k_offset: int | None = None
) -> Part:
    """The first result of the pattern -> out, lse. An empty row: out 0, lse -inf (its sink logit, if any).

    Raises ValueError if no result covers the phase or a row of the batch, or an input has a wrong shape.
    """
    first = results(pattern, inputs, phase, q_offset=q_offset, k_offset=k_offset)[0]
    assert isinstance(first, tuple)  # a case begins with a branch
    return first


def results(
    pattern: Pattern, inputs: Inputs, phase: str = "train", *, q_offset: int | None = None, k_offset: int | None = None
) -> list[Result]:
    """All results of the `return` that answers, row by row of the batch; cases must return equally many.

    A branch is (out, lse), a pooled score [B, heads, row tiles, units] (without a score: probability 0, logit -inf),
    a KL [B, heads, row tiles].
    """
    call = Call(pattern, inputs, sizes_of(pattern, inputs, q_offset, k_offset))
    cases = pattern.cases_of(Phase(phase))
    open_rows = torch.ones(call.sizes.batch, dtype=torch.bool)
    answers: list[Result] = []
    for case in cases:
        rows = open_rows & call.holds(case)
        own = [call.result(result) for result in (case.branch, *case.extras)]
        answers = [_chosen(rows, new, old) for new, old in zip(own, answers or own, strict=True)]
        open_rows = open_rows & ~rows
    if not cases or bool(open_rows.any()):
        raise ValueError(f"{pattern.name}: no result covers this call in the phase {phase}")
    return answers


def _chosen(rows: Tensor, new: Result, old: Result) -> Result:
    """`new` in the batch rows [B] that are set, else `old`."""
    if isinstance(new, Tensor):
        assert isinstance(old, Tensor)
        return _rows_of(rows, new, old)
    (out, lse), (old_out, old_lse) = new, old
    if lse.dim() != old_lse.dim():  # one is gated: the other has its own for every branch
        lse, old_lse = (x if x.dim() == 4 else x[..., None] for x in (lse, old_lse))
        branches = max(lse.shape[-1], old_lse.shape[-1])
        lse, old_lse = (x.expand(-1, -1, -1, branches) for x in (lse, old_lse))
    return _rows_of(rows, out, old_out), _rows_of(rows, lse, old_lse)


def _rows_of(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)


def choices(
    pattern: Pattern, inputs: Inputs, *, q_offset: int | None = None, k_offset: int | None = None
) -> dict[str, Tensor]:
    """The lists of every `top_k` and `threshold`, int32 [B, heads, row tiles, n]: ascending, -1 at the end.

    Computed even where `inputs` has them; those that one depends on are taken from there.
    """
    call = Call(pattern, inputs, sizes_of(pattern, inputs, q_offset, k_offset))
    return {
        an_input.name: call.lists(an_input)
        for an_input in pattern.inputs
        if isinstance(an_input, Choice) and an_input.selected
    }


def scores(
    pattern: Pattern, inputs: Inputs, *, q_offset: int | None = None, k_offset: int | None = None
) -> dict[str, Tensor]:
    """What every `top_k` and `threshold` chooses by, [B, heads, row tiles, units]; -inf for a unit without a score."""
    call = Call(pattern, inputs, sizes_of(pattern, inputs, q_offset, k_offset))
    pooled = {
        choice.name: call.pooled(choice) for choice in pattern.inputs if isinstance(choice, Choice) and choice.selected
    }
    return {name: torch.where(known, values.detach(), -torch.inf) for name, (values, known) in pooled.items()}
