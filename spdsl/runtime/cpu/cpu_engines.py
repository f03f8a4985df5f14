"""Two engines for the tiles of a softmax on CPU tensors, forward and backward, which agree.

The flash kernel of torch, and plain matrix products for what that kernel lacks (softcap, a gradient of the lse) and for
tiles with NaN or infinity, which must reach only the rows that see them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spdsl.runtime.cpu.cpu_tiles import TileData


def flash_forward(x: TileData) -> tuple[Tensor, Tensor]:
    """Output and lse [.., rows, 1]; columns of zeros change nothing."""
    q, k, v = _for_flash(x.q, x.k, x.v)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, False, attn_mask=x.added, scale=x.form.scale)
    lse = lse.unsqueeze(-1)
    if x.added is not None:  # the kernel says 0 for the lse of an empty row
        lse = lse.masked_fill(x.added.amax(-1, keepdim=True) == -torch.inf, -torch.inf)
    return out[..., : x.v.shape[3]], lse


def flash_backward(x: TileData, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    dout, q, k, v, out = _for_flash(dout, x.q, x.k, x.v, out)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = flash(dout, q, k, v, out, lse.squeeze(-1), 0.0, False, attn_mask=x.added, scale=x.form.scale)
    return tuple(grad[..., : like.shape[3]] for grad, like in zip(found, x[:3], strict=True))


def _for_flash(*tensors: Tensor) -> Iterator[Tensor]:
    """Of one head dim, and with a last stride of 1: the kernel asks for the one and takes the other for granted.

    Only here is that sure: folding, converting and padding each may keep or choose other strides.
    """
    width = max(x.shape[-1] for x in tensors)
    for x in tensors:
        same = x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))
        yield same if same.stride(-1) == 1 else same.contiguous()


def plain_forward(x: TileData) -> tuple[Tensor, Tensor]:
    scores, _ = scores_of(x)
    lse = scores.logsumexp(-1, keepdim=True)
    return seen_product(share_of(scores, lse), x.v), lse


def plain_backward(x: TileData, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    scores, slope = scores_of(x)
    p = share_of(scores, lse)
    dp = _of_shares(x, dout, out, dlse)
    ds = (p * dp * slope * x.form.scale).masked_fill(scores == -torch.inf, 0.0)
    return seen_product(ds, x.k), seen_product(ds.transpose(2, 3), x.q), seen_product(p.transpose(2, 3), dout)


def logit_gradients(x: TileData, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor) -> Tensor:
    """The gradients of the logits [.., rows, keys], which a bias has, too: 0 where hidden whatever a value holds."""
    scores, _ = scores_of(x)
    return (share_of(scores, lse) * _of_shares(x, dout, out, dlse)).masked_fill(scores == -torch.inf, 0.0)


def _of_shares(x: TileData, dout: Tensor, out: Tensor, dlse: Tensor) -> Tensor:
    return dout @ x.v.transpose(2, 3) - ((dout * out).sum(-1, keepdim=True) - dlse)


def scores_of(x: TileData) -> tuple[Tensor, Tensor | float]:
    """Logits, -inf where hidden whatever the key holds, and the slope of the cap."""
    slope: Tensor | float = 1.0
    scores = (x.q @ x.k.transpose(2, 3)).mul_(x.form.scale)
    if x.form.softcap is not None:
        bent = torch.tanh(scores / x.form.softcap)
        scores, slope = bent * x.form.softcap, 1 - bent * bent
    if x.added is not None:
        scores = (scores + x.added).masked_fill_(x.added == -torch.inf, -torch.inf)
    return scores, slope


def seen_product(weights: Tensor, x: Tensor) -> Tensor:
    """weights @ x where a weight of 0 hides even NaN and infinity; a row that sees one becomes NaN."""
    if x.sum().isfinite():
        return weights @ x
    odd = ~x.isfinite()
    seen = (weights != 0).to(x.dtype) @ odd.to(x.dtype)
    product: Tensor = weights @ x.masked_fill(odd, 0.0)
    return product.masked_fill(seen > 0, torch.nan)


def share_of(part: Tensor, total: Tensor) -> Tensor:
    """The share of the denominator that one of its terms has, 0 for an empty one and of an empty one."""
    share: Tensor = torch.exp(part - total.masked_fill(total == -torch.inf, torch.inf))
    return share.masked_fill(part == -torch.inf, 0.0)


def with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(lse, sink)
    return out * share_of(lse, total).unsqueeze(-1), total
