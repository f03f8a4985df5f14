"""The pattern at the sizes of a case, its arguments, and lists of units as NSA draws them.

A case: `tokens`, `heads`, `kv_heads`, `dim`, `v_dim`, `dtype`, `by` (how entries are made), `lists` (own, random or
clustered), and the params of the pattern.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import spdsl
from benchmarks.gpu.patterns import DEVICE, Case, Inputs

FILE = Path(__file__).parents[2] / "patterns" / "nsa.spat"
TOGETHER = 64  # neighbouring queries whose clustered lists are nearly the same
OWN_SHARE = 0.05  # of a query's own draw in a clustered list
DRAWN = 1 << 27  # random numbers at once


def text(case: Case) -> str:
    """patterns/nsa.spat with the heads, dims and compression of the case."""
    found = FILE.read_text(encoding="utf-8")
    for line, own in (
        (r"heads +query = \d+, kv = \d+", f"heads query = {case['heads']}, kv = {case['kv_heads']}"),
        (r"dim +qk = \d+, v = \d+", f"dim qk = {case['dim']}, v = {case['v_dim']}"),
        (r"by = mlp", f"by = {case['by']}"),
    ):
        found, times = re.subn(line, own, found)
        if times != 1:
            raise ValueError(f"{FILE.name}: {line} is there {times} times")
    return found


def load(case: Case) -> ModuleType:
    return _loaded(text(case), tuple(sorted(case.get("params", {}).items())))


@cache
def _loaded(pattern: str, params: tuple[tuple[str, int], ...]) -> ModuleType:
    return spdsl.load(pattern, **dict(params))


def inputs(module: ModuleType, case: Case, tokens: int | None = None, batch: int = 1) -> Inputs:
    """Random arguments of `attention`, the same in every process."""
    torch.manual_seed(0)
    found: Inputs = module.example_inputs(
        batch, tokens or case["tokens"], dtype=getattr(torch, case["dtype"]), device=DEVICE
    )
    return found


def drawn(module: ModuleType, case: Case) -> Tensor | None:
    """Lists int32 [1, kv heads, tokens, count], or None for the module's own choice."""
    if case.get("lists", "own") == "own":
        return None
    unit, count = module.PARAMS["block"], module.PARAMS["count"]
    return lists(case["tokens"], case["kv_heads"], unit, count, clustered=case["lists"] == "clustered")


def lists(tokens: int, kv_heads: int, unit: int, count: int, *, clustered: bool, seed: int = 0) -> Tensor:
    """Unit 0, the query's own, the one before, and others at random among those that have begun.

    clustered: TOGETHER neighbouring queries draw nearly the same units.
    """
    make = torch.Generator(DEVICE).manual_seed(seed)
    units = -(-tokens // unit)
    rows = max(TOGETHER, DRAWN // units // TOGETHER * TOGETHER)
    parts = [
        torch.cat(
            [_rows(q, min(q + rows, tokens), unit, units, count, clustered, make) for q in range(0, tokens, rows)]
        )
        for _ in range(kv_heads)
    ]
    return torch.stack(parts).unsqueeze(0)


def _rows(first: int, end: int, unit: int, units: int, count: int, clustered: bool, make: torch.Generator) -> Tensor:
    q = torch.arange(first, end, device=DEVICE).unsqueeze(1)
    number, own = torch.arange(units, device=DEVICE), q // unit
    chance = torch.rand(end - first, units, device=DEVICE, generator=make)
    if clustered:
        shared = torch.rand(-(-(end - first) // TOGETHER), units, device=DEVICE, generator=make)
        chance = chance.mul_(OWN_SHARE) + shared.repeat_interleave(TOGETHER, 0)[: end - first]
    chance = chance.masked_fill_((number == 0) | (number == own) | (number == own - 1), 3.0)
    best = chance.masked_fill_(number > own, -1.0).topk(min(count, units), -1)
    found = best.indices.masked_fill(best.values < 0, units).sort(-1).values
    found = torch.nn.functional.pad(found, (0, count - found.shape[1]), value=units)
    return found.masked_fill(found == units, -1).int()


def parts_of(module: ModuleType, given: Inputs, chosen: Tensor | None = None) -> tuple[Any, Any, Tensor]:
    """The inputs of the branches' operators with their entries, the layout, and the lists (by default the module's)."""
    arrays = {name: x for name, x in given.items() if name != "gates"}
    layout = module.rt.checked_layout(given["q"], given["k_rough"], module.rt.Options())
    inputs = module.rt.prepared(module.ARGUMENTS, module.Inputs(**arrays), layout)
    made = module._entries(inputs, layout)
    if chosen is None:
        _, lse = module.coarse_forward_op(made.q, made.k_entries, made.v_entries, *layout)
        chosen = select(module, made, layout, lse)
    return made, layout, chosen


def select(module: ModuleType, made: Any, layout: Any, lse: Tensor) -> Tensor:
    found: Tensor = module.chosen_op(
        made.q.detach(), made.k_entries.detach(), lse.detach(), made.k_rough.shape[1], *layout
    )
    return found
