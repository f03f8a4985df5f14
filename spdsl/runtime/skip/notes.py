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


def kept_counts(notes: Tensor, q: Tensor, layout: Layout, rows: int) -> Tensor:
    """Tiles kept and seen by each tile of rows, int32 [sequences, Hq, row tiles, 2], 0 behind a sequence's last one."""
    tiles, counts = row_tiles_of(q, layout, rows), notes[..., :COUNTS]
    if layout.q_spans is None:
        return counts[:, :, :tiles]
    assert layout.k_spans is not None
    (start, count), keys = layout.q_spans.long().unbind(1), layout.k_spans[:, 1].long()
    s, tile = torch.arange(len(start), device=q.device), torch.arange(tiles, device=q.device)
    origin = keys - count
    own = (
        torch.div(origin + count - 1, rows, rounding_mode="floor") - torch.div(origin, rows, rounding_mode="floor") + 1
    )
    there = (tile < own.masked_fill(count == 0, 0).unsqueeze(1)).view(len(start), 1, tiles, 1)
    slots = (start // rows + 2 * s).unsqueeze(1) + tile
    batch = s if notes.shape[0] > 1 else torch.zeros_like(s)
    found = counts[batch.unsqueeze(1), :, slots.clamp(max=notes.shape[2] - 1)].movedim(1, 2)
    return torch.where(there, found, torch.zeros_like(found))


def step_counts(counts: Tensor) -> Tensor:
    """The same of one query, [B, Hq, 1, 2], of the splits of a step, or of its notes."""
    return counts[..., :COUNTS].sum(2, keepdim=True, dtype=torch.int32)


def row_tiles_of(q: Tensor, layout: Layout, rows: int) -> int:
    """Tiles of rows of the longest sequence, as many as there may be where only the device knows where it begins."""
    if layout.q_spans is not None or layout.k_spans is not None:
        return -(-(layout.longest - 1) // rows) + 1
    first = layout.keys - q.shape[2] if layout.q_offset is None else layout.q_offset
    return (first + q.shape[2] - 1) // rows - first // rows + 1
