"""The exact merge of the splits of a decode step."""

from __future__ import annotations

import triton.language as tl

from spdsl.device.kernel import LN2, LOG2E, jit


@jit
def combine_splits(
    partial, partial_lse, sink, out, lse, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Grid (S, Hq): partial [S, Hq, SPLITS, DIM] and partial_lse [S, Hq, SPLITS] (base 2) -> out, natural-log lse.

    The sink enters here, so once for any number of splits.
    """
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, SPLITS_PADDED)
    part = tl.load(partial_lse + row * SPLITS + splits, mask=splits < SPLITS, other=float("-inf"))
    top = tl.max(part, 0)
    if sink is not None:
        sink_logit = tl.load(sink + tl.program_id(1)).to(ACC) * LOG2E
        top = tl.maximum(top, sink_logit)
    origin = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(part - origin), 0)
    if sink is not None:
        total += tl.exp2(sink_logit - origin)

    dims = tl.arange(0, DIM_PADDED)
    acc = tl.zeros([DIM_PADDED], ACC)
    for split in range(SPLITS):
        weight = tl.exp2(tl.load(partial_lse + row * SPLITS + split) - origin)
        acc += weight * tl.load(partial + (row * SPLITS + split) * DIM + dims, mask=dims < DIM, other=0.0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * DIM + dims, acc.to(out.dtype.element_ty), mask=dims < DIM)
    tl.store(lse + row, (origin + tl.log2(total)) * LN2)
