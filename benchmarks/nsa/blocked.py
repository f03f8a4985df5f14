"""NSA written out in torch a block of rows at a time: no buffer of N x N, products and sums in any dtype.

Written from the definition (arXiv 2502.11089, section 3.3), apart from the module. Entries and lists are handed in, so
that both sides attend to the same; `entries` makes the entries.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.gpu.patterns import Inputs

ROWS = 64  # of a block: the gathered keys of a row are count * unit
STREAMS = ("k_entries", "v_entries", "k_picked", "v_picked", "k_recent", "v_recent")
Grads = dict[str, Tensor]


def entries(given: Inputs, side: str, width: int, stride: int) -> Tensor:
    """[B, heads, E, dim] of the cells of k_rough or v_rough: by mean, or by a gelu network if its weights are given."""
    x = given[f"{side}_rough"]
    if x.shape[2] < width:
        return x[:, :, :0]
    cells = x.unfold(2, width, stride).transpose(-1, -2)
    if f"entries_{side}_up" not in given:
        return cells.mean(3)
    position, up, down = (given[f"entries_{side}_{role}"] for role in ("position", "up", "down"))
    hidden = torch.einsum("bhewd,hwdn->bhen", cells + position.unsqueeze(1), up)
    return torch.einsum("bhen,hnd->bhed", torch.nn.functional.gelu(hidden), down)


def attention(
    module: ModuleType, given: Inputs, made: Inputs, chosen: Tensor, dout: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Grads]:
    """Output [1, Hq, N, v] and gradients of q, gates, the entries and the token streams, in float32 or wider.

    `made` has the streams of STREAMS; products are taken in `dtype`, the rest in float32 at least.
    """
    sums = torch.promote_types(dtype, torch.float32)
    leaves = {name: made[name].detach().to(sums).requires_grad_() for name in STREAMS}
    tokens, outs = given["q"].shape[2], []
    rows: dict[str, list[Tensor]] = {"q": [], "gates": []}
    for first in range(0, tokens, ROWS):
        span = slice(first, min(first + ROWS, tokens))
        own = {name: given[name][:, :, span].detach().to(sums).requires_grad_() for name in rows}
        out = block(module.PARAMS, own, leaves, chosen[0, :, span], first, dtype)
        out.backward(dout[:, :, span].to(out.dtype))
        outs.append(out.detach().to(sums))
        for name, found in rows.items():
            grad = own[name].grad
            assert grad is not None
            found.append(grad)
    grads = {name: torch.cat(found, 2) for name, found in rows.items()}
    return torch.cat(outs, 2), grads | {name: _grad(leaf) for name, leaf in leaves.items()}


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def block(
    params: dict[str, int], own: Inputs, leaves: Inputs, chosen: Tensor, first: int, dtype: torch.dtype
) -> Tensor:
    """The rows from `first` on: the gated sum of the three branches."""
    q = own["q"][0]
    at = torch.arange(first, first + q.shape[1], device=q.device)
    scale, cast = q.shape[-1] ** -0.5, lambda x: x.to(dtype)
    kv_heads = leaves["k_picked"].shape[1]
    q = cast(q).view(kv_heads, -1, *q.shape[1:])
    parts = [
        coarse(q, *(cast(leaves[name][0]) for name in STREAMS[:2]), at, params, scale),
        fine(q, *(leaves[name][0] for name in STREAMS[2:4]), chosen, at, params["block"], scale, cast),
        near(q, *(leaves[name][0] for name in STREAMS[4:]), at, params["window"], scale, cast),
    ]
    gates = cast(own["gates"][0])
    weighted = [gates[..., i, None] * cast(part).flatten(0, 1) for i, part in enumerate(parts)]
    return torch.stack(weighted).sum(0).unsqueeze(0)


def coarse(q: Tensor, k: Tensor, v: Tensor, at: Tensor, params: dict[str, int], scale: float) -> Tensor:
    """q [Hk, G, R, D] over entries [Hk, E, D] that are closed."""
    end = params["stride"] * torch.arange(k.shape[1], device=q.device) + params["width"] - 1
    s = q @ k.transpose(-1, -2).unsqueeze(1)
    return weighed(s, scale, end <= at[:, None], v.unsqueeze(1))


def fine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    at: Tensor,
    unit: int,
    scale: float,
    cast: Callable[[Tensor], Tensor],
) -> Tensor:
    """q [Hk, G, R, D] over the tokens of the units chosen [Hk, R, n]; -1 is none."""
    tokens = (chosen.unsqueeze(-1).long() * unit + torch.arange(unit, device=q.device)).flatten(2)
    seen = (chosen >= 0).repeat_interleave(unit, 2) & (tokens <= at[:, None]) & (tokens < k.shape[1])
    place = (
        tokens.clamp(0, k.shape[1] - 1) + torch.arange(k.shape[0], device=q.device).view(-1, 1, 1) * k.shape[1]
    ).flatten()
    k, v = (cast(x.flatten(0, 1).index_select(0, place)).view(*tokens.shape, -1) for x in (k, v))
    s = torch.einsum("hgrd,hrtd->hgrt", q, k)
    p = probabilities(s, scale, seen.unsqueeze(1))
    return torch.einsum("hgrt,hrtd->hgrd", p, v)


def near(
    q: Tensor, k: Tensor, v: Tensor, at: Tensor, window: int, scale: float, cast: Callable[[Tensor], Tensor]
) -> Tensor:
    """q [Hk, G, R, D] over the last `window` tokens."""
    first, end = max(0, int(at[0]) - window + 1), int(at[-1]) + 1
    k, v = cast(k[:, first:end]), cast(v[:, first:end])
    distance = at[:, None] - torch.arange(first, end, device=q.device)
    s = q @ k.transpose(-1, -2).unsqueeze(1)
    return weighed(s, scale, (distance >= 0) & (distance < window), v.unsqueeze(1))


def weighed(s: Tensor, scale: float, seen: Tensor, v: Tensor) -> Tensor:
    return probabilities(s, scale, seen) @ v


def probabilities(s: Tensor, scale: float, seen: Tensor) -> Tensor:
    """The softmax of s * scale over what is seen, 0 where nothing is; taken in float32 at least."""
    some = seen.any(-1, keepdim=True)
    wide = s.to(torch.promote_types(s.dtype, torch.float32)) * scale
    p = torch.softmax(wide.masked_fill(~seen & some, -torch.inf), -1).masked_fill(~some, 0.0)
    return p.to(s.dtype)
