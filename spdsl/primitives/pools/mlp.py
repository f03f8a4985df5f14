"""mlp: gelu(flatten(tokens + position) @ up) @ down, as in Native Sparse Attention (arXiv 2502.11089, 3.3.1)."""

from __future__ import annotations

from spdsl.ir.pool import Closing, Operators, Pool


def _flops(width: int, dim: int, hidden: int) -> int:
    return 2 * width * dim * hidden + 2 * hidden * dim


POOL = Pool(
    "mlp",
    weights=(
        ("position", ("heads", "width", "dim")),
        ("up", ("heads", "width", "dim", "hidden")),
        ("down", ("heads", "hidden", "dim")),
    ),
    operators=Operators(
        forward=8, backward=8, clipped=14, clipped_backward=1, closing=8, closing_clipped=3,
        closing_alone=2,  # cells put heads first, a copy where both batch and entries are more than one
    ),
    closing=Closing.NETWORK,
    flops=_flops,
    twice=("up",),  # tokens and positions are multiplied apart
)  # fmt: skip
