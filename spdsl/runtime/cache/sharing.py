"""Pages that several sequences share: nobody writes to them, so who is about to write gets pages of its own first.

A page is shared by being named twice in the page table; how often it is named is its reference count. A sequence writes
to the page in which its length lies, and to those behind it: these are *open*. All is done on the device, with sizes
known from shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moved(NamedTuple):
    """A table int32 [S, width] whose open pages are named once, and what has to be copied: page source[s] to target[s].

    Both are int64 [S], and -1, the spare page, where there is nothing to copy. lengths int32 [S]: as they were, but of
    a sequence for which no page was left up to the end of what it shares.
    """

    table: Tensor
    source: Tensor
    target: Tensor
    lengths: Tensor


def references(table: Tensor, pages: int) -> Tensor:
    """How often each of `pages` pages stands in the table: int64 [pages]."""
    named = torch.where(table >= 0, table, pages).long().flatten()
    counts = torch.zeros(pages + 1, dtype=torch.int64, device=table.device)
    return counts.index_add_(0, named, torch.ones_like(named))[:pages]


def with_own_pages(table: Tensor, lengths: Tensor, page: int, owned: Tensor) -> Moved:
    """Gives pages of their own to sequences whose open pages others have, too; owned: bool [pages], which may be used.

    An open page that nobody reads stays with the first sequence that has it. Pages in no row of the table are free.
    """
    pages = len(owned)
    is_open = torch.arange(table.shape[1], device=table.device) >= (lengths // page)[:, None]
    named = torch.where(table >= 0, table, pages).long()  # what names no page names one behind all
    moves = (table >= 0) & is_open & ~_first_to_open(named, is_open, pages)
    free = owned & ~_marked(named, ~moves, pages)[:pages]
    in_order = (~free).int().argsort(stable=True)
    number = (moves.flatten().int().cumsum(0) - 1).view(table.shape)
    found = in_order[number.clamp(0, max(0, pages - 1)).long()]
    new = torch.where(moves, torch.where(number < free.sum(), found, -1).int(), table)
    return _with_copies(table, new, moves, lengths, page)


def _first_to_open(named: Tensor, is_open: Tensor, pages: int) -> Tensor:
    """Which open entries of a table are the first to name a page that no entry has full."""
    place, none = torch.arange(named.numel(), device=named.device), named.numel()
    first = torch.full((pages + 1,), none, device=named.device)
    first.scatter_reduce_(0, named.flatten(), torch.where(is_open.flatten(), place, none), "amin")
    is_full = _marked(named, ~is_open, pages)
    return ~is_full[named] & (first[named] == place.view(named.shape))


def _marked(named: Tensor, holds: Tensor, pages: int) -> Tensor:
    """Which pages some entry names for which `holds`: bool [pages + 1]."""
    found = torch.zeros(pages + 1, dtype=torch.int32, device=named.device)
    return found.index_add_(0, named.flatten(), holds.flatten().int()) > 0


def _with_copies(table: Tensor, new: Tensor, moves: Tensor, lengths: Tensor, page: int) -> Moved:
    """What lies in an open page that moves is copied; where it can move nowhere, the length ends before it."""
    last = (lengths // page).clamp(max=table.shape[1] - 1).long()[:, None]
    filled = (lengths % page > 0) & moves.gather(1, last)[:, 0]
    source, target = table.gather(1, last)[:, 0].long(), new.gather(1, last)[:, 0].long()
    copied = filled & (target >= 0)
    kept = torch.where(filled & (target < 0), lengths // page * page, lengths)
    return Moved(new, torch.where(copied, source, -1), torch.where(copied, target, -1), kept)
