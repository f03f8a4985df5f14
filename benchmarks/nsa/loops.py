"""Attention to the same lists by both loops: queries outermost (the union of neighbours), or keys (parts of outputs).

The compiler decides by who shares a list: several heads, or none. Lists of a group given to each of its heads are the
same attention, so both loops can be timed for any number of heads.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

import spdsl
from benchmarks.gpu.patterns import DEVICE, Case
from benchmarks.nsa.inputs import lists

OUTERMOST = ("queries", "keys")
PATTERN = """pattern loops {{
    heads  query = {heads}, kv = {kv_heads}
    dim    qk = {dim}, v = {v_dim}
    causal
    means  = compress({unit}, by = mean)
    chosen = top_k({count}, score = dot(means), share = {share}, force = last(1))
    return attend(chosen)
}}"""


@cache
def _loaded(text: str) -> ModuleType:
    return spdsl.load(text)


def load(case: Case) -> ModuleType:
    """`outer`: queries or keys."""
    unit, count = _sizes(case)
    names = ("heads", "kv_heads", "dim", "v_dim")
    share = "head" if case["outer"] == "keys" else "max(group)"
    return _loaded(PATTERN.format(unit=unit, count=count, share=share, **{name: case[name] for name in names}))


def arguments(module: ModuleType, case: Case) -> tuple[list[Tensor], Tensor]:
    """q, k and v, and the lists; the same for both loops."""
    torch.manual_seed(0)
    given = module.example_inputs(1, case["tokens"], dtype=getattr(torch, case["dtype"]), device=DEVICE)
    chosen = lists(case["tokens"], case["kv_heads"], *_sizes(case), clustered=case["lists"] == "clustered")
    if case["outer"] == "keys":
        chosen = chosen.repeat_interleave(case["heads"] // case["kv_heads"], 1)
    return [given["q"], given["k"], given["v"]], chosen


def _sizes(case: Case) -> tuple[int, int]:
    """Keys of a unit and units of a list."""
    params = case.get("params", {})
    return params.get("block", 64), params.get("count", 16)
