"""What a forward notes of the tiles that it keeps: int32 [B, Hq, slots, 2 + words].

A slot is a tile of rows: how many tiles of keys it kept, how many it saw, then a bit for each tile of keys. Sequence
s of a packed or padded call has its slots from `first row // rows + 2 s` on; else slot 0 is that of the first query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spdsl.runtime.sequences import Corner, Layout

COUNTS = 2  # numbers before the bits
_BITS = 32


def note_room(q: Tensor, layout: Layout, rows: int, unit: int, most_keys: int) -> Tensor:
    """Nothing kept, nothing seen; a sequence has `most_keys` keys or less."""
    return q.new_zeros(note_shape(q, layout, rows, unit, most_keys), dtype=torch.int32)


def note_shape(q: Tensor, layout: Layout, rows: int, unit: int, most_keys: int) -> tuple[int, ...]:
    """Its sizes, from those of the call alone. Rows that begin within a tile, and end so, fill two tiles more."""
    sequences = 1 if layout.q_spans is None else max(1, len(layout.q_spans))
    words = -(-most_keys // (unit * _BITS))
    return (*q.shape[:2], q.shape[2] // rows + 2 * sequences, COUNTS + words)


def most_keys_of(layout: Layout) -> int:
    """Of a sequence of a call without a cache."""
    return layout.keys if layout.k_spans is None else layout.longest


def part_and_notes(found: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(out, lse), notes of what an operator gives."""
    out, lse, notes = found
    return (out, lse), notes


def first_slot(corner: Corner, layout: Layout, rows: int) -> int:
    """Where the slots of a sequence begin."""
    return 0 if layout.q_spans is None else corner.rows.start // rows + 2 * corner.sequences.start


def noted(kept: Tensor, seen: Tensor, tiles: Tensor, width: int) -> Tensor:
    """[B, Hq, width] of the tiles `kept` and `seen` [B, Hq, n], whose numbers are `tiles` [n]."""
    bits = torch.zeros(*kept.shape[:2], (width - COUNTS) * _BITS, dtype=torch.int64, device=kept.device)
    bits[..., tiles] = kept.long()
    words = (bits.unflatten(-1, (-1, _BITS)) << torch.arange(_BITS, device=kept.device)).sum(-1)
    words = torch.where(words >= 2 ** (_BITS - 1), words - 2**_BITS, words)
    return torch.cat([kept.sum(-1, keepdim=True), seen.sum(-1, keepdim=True), words], -1).int()


def bits_of(notes: Tensor, tiles: int) -> Tensor:
    """Notes [.., 2 + words] -> bool [.., tiles]: which tiles of keys are kept."""
    words = notes[..., COUNTS:].unsqueeze(-1)
    bits = (words >> torch.arange(_BITS, device=notes.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :tiles].bool()
