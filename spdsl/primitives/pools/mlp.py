"""mlp: gelu(flatten(tokens + position) @ up) @ down, as in Native Sparse Attention (arXiv 2502.11089, 3.3.1)."""

from __future__ import annotations

from spdsl.ir.pool import Closing, Pool


def _flops(width: int, dim: int, hidden: int) -> int:
    return 2 * width * dim * hidden + 2 * hidden * dim


POOL = Pool(
    "mlp",
    weights=(
        ("position", ("heads", "width", "dim")),
        ("up", ("heads", "width", "dim", "hidden")),
        ("down", ("heads", "hidden", "dim")),
    ),
    closing=Closing.NETWORK,
    flops=_flops,
    twice=("up",),  # tokens and positions are multiplied apart
)  # fmt: skip
