"""The gradients of what a bias reads, without kernels: those of one softmax on the CPU path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.call.bias_gradient import BiasGradient
from spdsl.runtime.cpu.attention import BiasRead, Form, KeyValues, streams_of, tests_on_pairs
from spdsl.runtime.cpu.cpu_bias import ReadOnPairs, sparse_bias_backward, units_bias_backward
from spdsl.runtime.cpu.cpu_unit_tiles import UnitTests
from spdsl.runtime.sequences import Corner, Layout


def cpu_bias_backward(
    form: Form,
    wanted: Sequence[str],
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: KeyValues,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    t: Any,
    chosen: Tensor | None = None,
) -> list[Tensor]:
    """-> the gradients of the wanted tensors that the bias reads; out and lse may be those of a joint softmax."""
    grads = {name: BiasGradient(getattr(t, name)) for name in wanted}
    reads = [read for read in form.bias_reads if read.name in grads]
    add = [grads[read.name].add for read in reads]
    numbers = [t._replace(**{read.name: grads[read.name].numbers}) for read in reads]
    for corner in form.corners(q, layout):
        rows, columns = (corner.batch, slice(None), corner.rows), (corner.batch, slice(None), corner.keys)
        here, own = [(k[columns], v[columns]) for k, v in keys], form.own(t, corner, layout)
        logits, own_dlse = form.logits(q, corner), None if dlse is None else dlse[rows]
        own_numbers = [form.own(x, corner, layout) for x in numbers]
        own_reads = [_of_pairs(read, corner, own, x) for read, x in zip(reads, own_numbers, strict=True)]
        if chosen is not None:
            given = (dout[rows], own_dlse, q[rows], *here[0], out[rows], lse[rows], chosen[rows], form.unit)
            units_bias_backward(*given, UnitTests(*tests_on_pairs(form, corner, own)), own_reads, logits, add)
            continue
        h = torch.arange(q.shape[1]).view(1, -1, 1, 1)
        parts = streams_of(form, q.shape[1], here, corner, own)
        placed = [_with_heads(read, h) for read in own_reads]
        sparse_bias_backward(dout[rows], own_dlse, q[rows], parts, placed, out[rows], lse[rows], logits, add)
    return [grad.total for grad in grads.values()]


def _of_pairs(read: BiasRead, corner: Corner, own: tuple[Any, ...], numbers: tuple[Any, ...]) -> ReadOnPairs:
    """A read on query positions, key numbers and heads."""

    def at(function: Callable[..., Any], tensors: tuple[Any, ...]) -> Callable[..., Any]:
        return lambda q, k, h: function(q, k + corner.k_origin, h, corner.length, *tensors)

    return ReadOnPairs(at(read.slope, own), at(read.element, numbers))


def _with_heads(read: ReadOnPairs, h: Tensor) -> ReadOnPairs:
    """The same on positions of a tile alone."""

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k: function(q[None, None], k[None, None], h)

    return ReadOnPairs(of(read.slope), of(read.number))
