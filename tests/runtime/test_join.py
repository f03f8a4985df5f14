"""The merge of a decode step: splits, parts and gated branches in one launch, against float64 torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import triton.language as tl
from torch import Tensor

from spdsl.runtime.launch.gating import gated
from spdsl.runtime.launch.join import lse_of, merged_lse, merged_parts
from spdsl.runtime.launch.launch import launch
from spdsl.runtime.tiles.combine import Splits
from spdsl.runtime.tiles.kernel import jit
from spdsl.runtime.units.packed import PackedRows, load_step_lse
from spdsl.runtime.units.unit_launch import step_lse

pytestmark = pytest.mark.interpret
BATCH, HEADS, DIM = 2, 3, 24


def some_splits(splits: int, *, sink: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0) -> Splits:
    """Some splits, and all of one row, are empty; what they hold is NaN."""
    at = torch.Generator().manual_seed(seed)
    out = torch.randn(BATCH, HEADS, splits, DIM, generator=at, dtype=torch.float64)
    lse = 9 * torch.randn(BATCH, HEADS, splits, generator=at, dtype=torch.float64)
    empty = torch.rand(lse.shape, generator=at) < 0.3
    empty[0, 1] = True
    out[empty], lse[empty] = torch.nan, -torch.inf
    logits = torch.randn(HEADS, generator=at, dtype=torch.float64) if sink else None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Splits(out.to(wide), lse.to(wide), None if logits is None else logits.to(dtype), dtype)


def meant(parts: list[Splits]) -> tuple[Tensor, Tensor]:
    """[B, H, D] and natural lse [B, H] by the definition of a softmax over everything."""
    logits = [part.lse.double() * math.log(2) for part in parts]
    values = [torch.where(part.lse[..., None] > -torch.inf, part.out.double(), 0) for part in parts]
    for part in parts:
        if part.sink is not None:
            logits.append(part.sink.double().view(1, -1, 1).expand(BATCH, -1, -1))
            values.append(torch.zeros(BATCH, HEADS, 1, DIM, dtype=torch.float64))
    every = torch.cat(logits, -1)
    shares = torch.softmax(every, -1).nan_to_num()
    return (shares[..., None] * torch.cat(values, 2)).sum(2), torch.logsumexp(every, -1)


PARTS = {
    "one split": [(1, False)],
    "splits": [(5, False)],
    "more than a program loads at once": [(37, False)],
    "sink": [(4, True)],
    "parts": [(3, False), (17, True), (1, False)],
    "sinks": [(2, True), (2, True)],
}


def made(name: str, dtype: torch.dtype = torch.float64) -> list[Splits]:
    return [some_splits(n, sink=sink, dtype=dtype, seed=i) for i, (n, sink) in enumerate(PARTS[name])]


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_one_softmax(name: str, poisoned: None) -> None:
    out, lse = merged_parts(made(name))
    wanted, wanted_lse = meant(made(name))
    torch.testing.assert_close(out[:, :, 0], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse[:, :, 0], wanted_lse, rtol=1e-12, atol=1e-12)
    assert not out[0, 1].any() or any(sink for _, sink in PARTS[name])


@pytest.mark.parametrize("name", ["splits", "sink"])
def test_the_log_sum_exp_alone(name: str, poisoned: None) -> None:
    (part,) = made(name)
    assert torch.equal(merged_lse(lse_of(part)), merged_parts([part])[1])


def test_branches_have_gates_of_their_own(poisoned: None) -> None:
    branches = [made(name) for name in ("splits", "parts", "sink")]
    gates = torch.randn(3, BATCH, HEADS, 1, dtype=torch.float64).permute(1, 2, 3, 0)  # strides of another order
    out, lse = gated(branches, gates)
    wanted = [meant(branch) for branch in branches]
    torch.testing.assert_close(out[:, :, 0], sum(gates[:, :, 0, i, None] * wanted[i][0] for i in range(3)))
    torch.testing.assert_close(lse[:, :, 0], torch.stack([one for _, one in wanted], -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_result_has_the_dtype_of_the_call(dtype: torch.dtype) -> None:
    out, lse = merged_parts(made("parts", dtype))
    wanted, _ = meant(made("parts", dtype))
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out[:, :, 0].double(), wanted, rtol=2e-3, atol=2e-3)


def test_what_ways_to_split_have_in_common() -> None:
    """What tuning compares: the same keys in other splits."""
    whole = some_splits(6)
    out, lse = meant([Splits(whole.out, whole.lse, None, whole.dtype)])
    torch.testing.assert_close(whole.summed()[0], out)
    torch.testing.assert_close(whole.summed()[1], lse)


def test_nan_is_not_lost() -> None:
    part = some_splits(3)
    part.lse[1, 2, 0] = torch.nan
    out, lse = merged_parts([part])
    assert out[1, 2].isnan().all()
    assert lse[1, 2].isnan().all()
    assert out[1, :2].isfinite().all()


class RowConst(NamedTuple):
    BLOCK_M: tl.constexpr
    HEADS: tl.constexpr
    ACC: tl.constexpr


@jit
def write_step_lse(lse, out, C):
    """What a program of `select` makes of the splits of its heads.  Grid (sequences,)."""
    s = tl.program_id(0)
    head = tl.arange(0, C.BLOCK_M)
    own = tl.minimum(head, C.HEADS - 1)  # rows that are no head borrow one
    rows = PackedRows(head, head, head, head, head * 0, own, head, head < C.HEADS)
    tl.store(out + s * C.HEADS + head, load_step_lse(lse, rows, s, C), mask=head < C.HEADS)


@pytest.mark.parametrize("name", ["one split", "splits", "more than a program loads at once", "sink"])
def test_a_choice_merges_the_splits_itself(name: str, poisoned: None) -> None:
    (part,) = made(name)
    found = torch.empty(BATCH, HEADS, dtype=torch.float64)
    consts = RowConst(tl.constexpr(16), tl.constexpr(HEADS), tl.constexpr(tl.float64))
    launch(write_step_lse, (BATCH,), step_lse(part), found, consts, num_warps=4, num_stages=1)
    wanted = merged_lse(part)[:, :, 0] / math.log(2)
    torch.testing.assert_close(found, wanted.masked_fill(wanted == -torch.inf, torch.inf), rtol=1e-12, atol=1e-12)
