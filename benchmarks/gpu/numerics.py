"""Right or wrong: against the pattern's dense float64 meaning, beside dense attention in the same dtype.

A result passes when its largest error is at most 2 times, and its mean error at most 1.1 times, that of dense attention
in the same dtype with the same mask, plus a floor: one rounding of a value of mean size, a tenth of it for the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.patterns import DEVICE, Case, Inputs, cache, differentiable, inputs, load, new_tokens, part

ROWS = 512  # of a block of the reference; a multiple of every pattern's row tiles
Grads = dict[str, Tensor]


def numerics(case: Case) -> Case:
    """Forward and backward of one pattern; `worst` is the largest quotient of an error and its limit."""
    module = load(case)
    given = inputs(module, case)
    dout = torch.randn_like(given["q"][..., :1].expand(*given["q"].shape[:3], case.get("v_dim", case["dim"])))
    out, grads = attend(module, given, dout)
    want_out, want = reference(module, given, dout)
    with narrow(module):
        usual_out, usual = reference(module, given, dout)
    shares = {"out": share(out, usual_out, want_out)}
    shares |= {f"d{name}": share(grads[name], usual[name], want[name]) for name in grads}
    return verdict(shares)


def cached(case: Case) -> Case:
    """Prefill in two chunks, then three steps of decode, against the reference over all tokens so far."""
    module, tokens = load(case), case["tokens"]
    given = inputs(module, case)
    block = module.PARAMS.get("block", 64)
    stops = sorted({0, (tokens // 2) // block * block, tokens - 3, tokens - 2, tokens - 1, tokens})
    store = cache(module, case, tokens + 5, page=case.get("page", 64))
    shares = {}
    for first, end in pairwise(stops):
        run = module.decode if end - first == 1 else module.prefill
        out = run(**new_tokens(given, first, end, tokens), cache=store)
        seen = {name: x[:, :, :end] if x.dim() == 4 and x.is_floating_point() else x for name, x in given.items()}
        seen = {name: x[:, :end] if x.dim() == 2 and x.shape[1] == tokens else x for name, x in seen.items()}
        want, usual = rows_of(module, seen, first, end, tokens)
        shares[f"{first}:{end}"] = share(out[:, :, -ROWS:], usual, want)
    return verdict(shares)


def rows_of(module: ModuleType, seen: Inputs, first: int, end: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The last rows of [first, end) by the reference, in float64 and in the inputs' dtype."""
    start = max(first, end - ROWS)
    rows = part(seen, start, end, tokens)
    with torch.no_grad():
        want = module.reference(**rows)
        with narrow(module):
            return want, module.reference(**rows)


def attend(module: ModuleType, given: Inputs, dout: Tensor) -> tuple[Tensor, Grads]:
    names = differentiable(given)
    leaves = {name: given[name].detach().requires_grad_() for name in names}
    out = module.attention(**given | leaves)
    return out.detach(), dict(zip(names, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))


def reference(module: ModuleType, given: Inputs, dout: Tensor) -> tuple[Tensor, Grads]:
    """Output and gradients in float64, a block of rows at a time."""
    tokens, outs = given["q"].shape[2], []
    names = differentiable(given)
    total = {name: torch.zeros_like(given[name], dtype=torch.float64) for name in names}
    for first in range(0, tokens, ROWS):
        end = min(first + ROWS, tokens)
        rows = {name: x.detach() for name, x in part(given, first, end, tokens).items()}
        for name in names:
            rows[name].requires_grad_()
        out = module.reference(**rows, q_offset=first, k_offset=0)
        found = torch.autograd.grad(
            out, [rows[name] for name in names], dout[:, :, first:end].to(out.dtype), allow_unused=True
        )
        for name, grad in zip(names, found, strict=True):
            if grad is not None:
                span = slice(first, end) if name.startswith("q") else slice(None)
                total[name][:, :, span] += grad
        outs.append(out.detach().double())
    return torch.cat(outs, 2), total


@contextmanager
def narrow(module: ModuleType) -> Iterator[None]:
    """`module.reference` as dense attention in the dtype of its inputs."""
    with mock.patch.object(module.rt, "dense_softmax", usual_softmax):
        yield


def usual_softmax(
    q: Tensor, streams: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]], scale: float, softcap: Any, sink: Any
) -> tuple[Tensor, Tensor]:
    """Attention as it is usually written: products in the inputs' dtype, the softmax in fp32, an empty row 0."""
    logits, values = [], []
    for k, v, visible, bias in streams:
        group = q.shape[1] // k.shape[1]
        s = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)).float() * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if bias is None else s + bias.float()
        logits.append(s.masked_fill(~visible.expand(s.shape), -torch.inf))
        values.append(v.repeat_interleave(group, 1))
    s = torch.cat(logits, -1)
    if sink is not None:
        s = torch.cat([s, sink.float().view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
        values.append(torch.zeros_like(values[0][:, :, :1]))
    empty = (s == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    lse = s.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    return p.to(q.dtype) @ torch.cat(values, 2), lse.double()


def share(found: Tensor, usual: Tensor, want: Tensor) -> float:
    """Error over allowed error, of the largest and of the mean; above 1 is wrong, NaN is infinitely wrong."""
    floor = torch.finfo(found.dtype).eps * want.abs().mean().item()
    own, other = (found.double() - want).abs(), (usual.double() - want).abs()
    worst = own.max().item() / (2 * other.max().item() + floor)
    mean = own.mean().item() / (1.1 * other.mean().item() + floor / 10)
    quotient = max(worst, mean)
    return quotient if quotient == quotient else float("inf")


def verdict(shares: dict[str, float]) -> Case:
    worst = max(shares, key=lambda name: shares[name])
    return {"worst": shares[worst], "of": worst, "ok": shares[worst] <= 1.0, "shares": shares, "device": DEVICE}
