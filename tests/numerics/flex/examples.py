"""FlexAttention's published examples: what its user writes (`mask`, `score`), and what a module of ours is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

BATCH, HEADS, TOKENS = 2, 4, 48


@dataclass(frozen=True)
class Example:
    mask: MaskMod | None = None
    score: ScoreMod | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of `attention`, beside q, k and v
    learned: str = ""  # the argument that a gradient is wanted of
    batch: int = BATCH


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _sliding_window() -> Example:
    return Example(lambda b, h, q, k: (q >= k) & (q - k <= 6))


def _prefix_lm() -> Example:
    lengths = torch.tensor([5, 30])
    return Example(lambda b, h, q, k: (k < lengths[b]) | (q >= k), arguments={"prefix_length": lengths})


def _document() -> Example:
    ids = torch.tensor([[0] * 10 + [1] * 25 + [2] * 13, [0] * 47 + [1]])
    return Example(lambda b, h, q, k: causal(b, h, q, k) & (ids[b, q] == ids[b, k]), arguments={"document_id": ids})


def _jagged() -> Example:
    """A mask over positions within a sequence becomes one over the row of all sequences by their offsets."""
    offsets = torch.tensor([0, 10, 11, 40, TOKENS])
    ids = torch.repeat_interleave(torch.arange(4), offsets.diff())

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inner_q, inner_k = q - offsets[ids[q]], k - offsets[ids[k]]
        return (ids[q] == ids[k]) & (inner_q >= inner_k) & (inner_q - inner_k < 9)

    return Example(mask, arguments={"cu_seqlens": offsets.int(), "max_seqlen": 29}, batch=1)


def _softcap() -> Example:
    return Example(causal, lambda score, b, h, q, k: 20 * torch.tanh(score / 20))


def _alibi() -> Example:
    slopes = torch.exp2(-(torch.arange(HEADS, dtype=torch.float64) + 1) * 8 / HEADS)
    return Example(
        causal, lambda score, b, h, q, k: score + slopes[h] * (k - q), {"alibi_bias": slopes}, learned="alibi_bias"
    )


def _relative() -> Example:
    return Example(None, lambda score, b, h, q, k: score + (q - k))


def _relative_table() -> Example:
    table = torch.randn(HEADS, 2 * TOKENS - 1, generator=_drawn(), dtype=torch.float64)
    return Example(
        None, lambda score, b, h, q, k: score + table[h, q - k + TOKENS - 1], {"table": table}, learned="table"
    )


def _pair_bias() -> Example:
    pair = torch.randn(1, HEADS, TOKENS, TOKENS, generator=_drawn(), dtype=torch.float64)
    return Example(None, lambda score, b, h, q, k: score + pair[0, h, q, k], {"pair": pair}, learned="pair")


def _tree() -> Example:
    """Each token hangs on an earlier one, and sees those on the way to the root."""
    made = _drawn()
    seen = torch.eye(TOKENS, dtype=torch.bool).repeat(BATCH, 1, 1)
    for sequence in seen:
        for token in range(1, TOKENS):
            sequence[token] |= sequence[int(torch.randint(token, (), generator=made))]
    return Example(lambda b, h, q, k: seen[b, q, k], arguments={"ancestor": seen})


def _neighbourhood() -> Example:
    width, height, reach = 6, 8, 1

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        x, y = (q % width).clamp(reach, width - 1 - reach), (q // width).clamp(reach, height - 1 - reach)
        return ((x - k % width).abs() <= reach) & ((y - k // width).abs() <= reach)

    return Example(mask)


def _dilated_window() -> Example:
    return Example(lambda b, h, q, k: (q >= k) & (q - k <= 12) & ((q - k) % 3 == 0))


EXAMPLES: dict[str, Callable[[], Example]] = {
    "causal": lambda: Example(causal),
    "sliding_window": _sliding_window,
    "prefix_lm": _prefix_lm,
    "document": _document,
    "jagged": _jagged,
    "softcap": _softcap,
    "alibi": _alibi,
    "relative": _relative,
    "relative_table": _relative_table,
    "pair_bias": _pair_bias,
    "tree": _tree,
    "neighbourhood": _neighbourhood,
    "dilated_window": _dilated_window,
}
