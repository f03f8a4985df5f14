"""The ways in which a tensor may lie in memory: each form has the numbers of its argument, or some of them repeated.

What lies between the numbers is 7.0: a finite number that is read by mistake gives no NaN, which could be noticed and
mended on the way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Form = Callable[[Tensor], Tensor]


def _gap_of(x: Tensor) -> float | int | bool:
    return 7.0 if x.is_floating_point() else True if x.dtype == torch.bool else 7


def _innermost(axis: int) -> Form:
    """The neighbours along `axis` are neighbours in memory."""

    def form(x: Tensor) -> Tensor:
        at = min(axis, x.dim() - 1)
        return x.movedim(at, -1).contiguous().movedim(-1, at)

    return form


def _repeated(*axes: int) -> Form:
    """Stride 0 along the axes: all are the first one."""

    def form(x: Tensor) -> Tensor:
        for axis in axes:
            if axis < x.dim():
                x = x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)
        return x

    return form


def dense(x: Tensor) -> Tensor:
    return x.contiguous()


def tokens_outside_heads(x: Tensor) -> Tensor:
    """[B, N, H, D], as projections give it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x


def gaps_in_rows(x: Tensor) -> Tensor:
    """Every third number."""
    storage = x.new_full((*x.shape, 3), _gap_of(x))
    storage[..., 1] = x
    return storage[..., 1]


def gaps_between_rows(x: Tensor) -> Tensor:
    """A slice of wider rows, of which every second one counts: q of a fused projection."""
    if x.dim() < 2:
        return gaps_in_rows(x)
    storage = x.new_full((*x.shape[:-1], 2, x.shape[-1] + 5), _gap_of(x))
    inner = storage[..., 1, 3 : 3 + x.shape[-1]]
    return inner.copy_(x)


def overlapping(x: Tensor) -> Tensor:
    """Neighbouring rows share all numbers but one."""
    if x.dim() < 2:
        return x
    *before, rows, columns = x.shape
    storage = torch.cat([x[..., 0], x[..., -1]], -1) if rows else x.new_zeros(*before, columns)
    storage = storage.repeat_interleave(-(-(rows + columns) // max(1, storage.shape[-1])), -1).contiguous()
    return storage.as_strided(x.shape, (*storage.stride()[:-1], 1, 1))


FORMS: dict[str, Form] = {
    "dense": dense,
    "tokens_outside_heads": tokens_outside_heads,
    "tokens_innermost": _innermost(2),
    "heads_innermost": _innermost(1),
    "batch_innermost": _innermost(0),
    "gaps_in_rows": gaps_in_rows,
    "gaps_between_rows": gaps_between_rows,
    "one_batch_row": _repeated(0),
    "one_head": _repeated(1),
    "one_token": _repeated(2),
    "one_column": _repeated(3),
    "one_number": _repeated(0, 1, 2, 3),
    "overlapping": overlapping,
}
WHOLE = frozenset(list(FORMS)[:7])  # no number is lost
# They give many keys one score: what is chosen then hangs on the last bit.
TIED = frozenset(["one_token", "one_column", "one_number", "overlapping"])
