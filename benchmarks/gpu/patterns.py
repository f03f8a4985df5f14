"""The patterns and their arguments: shapes, values, slices of rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import spdsl

FOLDER = Path(__file__).parents[2] / "patterns"
SELECTED = ("infllm_v2", "moba", "msa_minimax", "nsa", "seer_attention")  # choices or results of their own kind
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.spat") if path.stem not in SELECTED))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES_PER_ROW = 16  # of the block-sparse lists: 2048 keys a row
DOCUMENTS = 12

Inputs = dict[str, Tensor]
Case = dict[str, Any]


def load(case: Case) -> ModuleType:
    return spdsl.load(FOLDER / f"{case['pattern']}.spat", **case.get("params", {}))


def inputs(module: ModuleType, case: Case, tokens: int | None = None) -> Inputs:
    """Random arguments of `attention`, the same for a case in every process; `tokens` in place of the case's."""
    torch.manual_seed(0)
    count, dim = tokens or case["tokens"], case["dim"]
    found: Inputs = module.example_inputs(
        case["batch"], count, heads=case["heads"], kv_heads=case["kv_heads"], qk_dim=dim,
        v_dim=case.get("v_dim", dim), dtype=getattr(torch, case["dtype"]), device=DEVICE,
    )  # fmt: skip
    if "tiles" in found:
        found["tiles"] = tile_lists(found["tiles"], -(-count // module.PARAMS["block"]))
    if "doc" in found:
        found["doc"] = documents(found["doc"])
    return found


def tile_lists(like: Tensor, tiles: int) -> Tensor:
    """int32 [batch, heads, row tiles, most]: different tiles drawn at random for each head and row tile."""
    chances = torch.rand(*like.shape[:3], tiles, device=like.device)
    return chances.topk(min(TILES_PER_ROW, tiles), -1).indices.sort(-1).values.int()


def documents(like: Tensor) -> Tensor:
    """Document numbers [batch, tokens] of documents of random lengths."""
    starts = torch.rand(like.shape, device=like.device) < DOCUMENTS / like.shape[-1]
    return starts.cumsum(-1).to(like.dtype)


def part(given: Inputs, first: int, end: int, tokens: int) -> Inputs:
    """The arguments of rows [first, end) over all keys: queries and lists are cut (at row tiles), the rest is whole."""
    found = dict(given)
    for name, x in given.items():
        if x.dim() == 4 and x.is_floating_point() and name.startswith("q"):
            found[name] = x[:, :, first:end]
        elif x.dim() == 4 and not x.is_floating_point():
            rows = list_rows(x, tokens)
            found[name] = x[:, :, first // rows : -(-end // rows)]
    return found


def new_tokens(given: Inputs, first: int, end: int, tokens: int) -> Inputs:
    """The arguments of `prefill` and `decode` for the tokens [first, end): keys, values, token tensors cut too."""
    found = part(given, first, end, tokens)
    for name, x in given.items():
        if x.dim() == 4 and x.is_floating_point():
            found[name] = x[:, :, first:end]
        elif x.dim() == 2 and x.shape[1] == tokens:
            found[name] = x[:, first:end]
    return found


def list_rows(lists: Tensor, tokens: int) -> int:
    """Rows of a row tile: the power of two that gives this many tiles."""
    return next(rows for rows in (2**i for i in range(31)) if -(-tokens // rows) == lists.shape[2])


def differentiable(given: Inputs) -> list[str]:
    """Names of the queries, keys and values."""
    return [name for name, x in given.items() if x.dim() == 4 and x.is_floating_point()]


def cache(module: ModuleType, case: Case, capacity: int, **options: Any) -> Any:
    dims = {"kv_heads": case["kv_heads"], "qk_dim": case["dim"], "v_dim": case.get("v_dim", case["dim"])}
    dtype = getattr(torch, case["dtype"])
    return module.Cache(case["batch"], capacity, **dims, dtype=dtype, device=DEVICE, **options)
