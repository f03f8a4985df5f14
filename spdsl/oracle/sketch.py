"""Masks in small: how many pairs of each tile are visible, found row block by row block, never as one N x N matrix.

An entry of a compressed stream is drawn as the `stride` tokens from its first one on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Pattern, Softmax, Stream, Term
from spdsl.ir.symbols import lookup_name, lookups
from spdsl.oracle.dense import Sizes, environment
from spdsl.oracle.evaluate import Environment, evaluate
from spdsl.oracle.examples import example_inputs

_ROWS = 64  # of a block: with 8192 keys and int64 positions, 4 MiB per intermediate
_PIXELS = 1024  # of the mask along each side


@dataclass(frozen=True, slots=True)
class Sketch:
    """The mask of one term for one head: `mask` bool [n, n], each element any of step x step pairs; per tile of
    tile x tile pairs the visible ones, `counts`, of all that exist, `pairs`, int64 [tiles, tiles]."""

    name: str
    head: int | None  # None: all heads see the same
    mask: Tensor
    step: int
    tile: int
    counts: Tensor
    pairs: Tensor
    possible: int  # pairs that a dense pattern would visit
    stride: int = 1  # columns of one entry

    def states(self) -> Tensor:
        """0 empty, 1 partial, 2 full, per tile."""
        return (self.counts > 0).long() + (self.counts == self.pairs).long()

    def coarser(self, factor: int) -> Sketch:
        """Tiles of `factor` times the side."""
        counts, pairs = (_summed(x, factor) for x in (self.counts, self.pairs))
        return replace(self, tile=self.tile * factor, counts=counts, pairs=pairs)

    @property
    def seen(self) -> int:
        """Visible pairs of a query and an entry."""
        return int(self.counts.sum()) // self.stride

    @property
    def sparsity(self) -> float:
        """The share of the dense pairs that is hidden."""
        return 1 - self.seen / self.possible


def sketches(pattern: Pattern, length: int) -> tuple[list[Sketch], list[str]]:
    """A sketch per softmax, stream and differing head (two at most), and what the example values are."""
    heads = pattern.query_heads or 2 * (pattern.kv_heads or 2)
    kv_heads = pattern.kv_heads or max(1, heads // 2 if heads % 2 == 0 else heads)
    sizes = Sizes(1, heads, kv_heads, length, length, 0, 0)
    inputs, notes = example_inputs(pattern, sizes, choices=True, weights=False)
    found = []
    for softmax in pattern.softmaxes():
        for term in softmax.terms:
            around = environment(pattern, inputs, sizes, term.stream)
            name = _name(pattern, softmax, term)
            for head in _heads(pattern, term, around, length):
                found.append(_sketch(pattern, term, name, head, around, length))
    return found, notes


def _name(pattern: Pattern, softmax: Softmax, term: Term) -> str:
    parts = [softmax.name] if len(pattern.softmaxes()) > 1 else []
    parts += [f"stream {term.stream}"] if len(softmax.terms) > 1 or term.stream != "kv" else []
    return ", ".join(parts)


def _heads(pattern: Pattern, term: Term, around: Environment, length: int) -> list[int | None]:
    """Head 0 and the first that differs from it on some sampled rows; [None] if no head differs."""
    rows = torch.linspace(0, length - 1, min(length, _ROWS)).long()
    if all(symbol.name != "h" for symbol in term.test.free_symbols):
        return [None]
    first = _block(term.test, around, rows, 0)
    for head in range(1, around.heads):
        if not torch.equal(first, _block(term.test, around, rows, head)):
            return [0, head]
    return [0] if _reads_choice(pattern, term) else [None]


def _reads_choice(pattern: Pattern, term: Term) -> bool:
    return any(isinstance(pattern.input(lookup_name(read)), Choice) for read in lookups(term.test))


def _block(test: sympy.Basic, around: Environment, rows: Tensor, head: int) -> Tensor:
    """The mask of one head for some query positions: bool [rows, entries]."""
    symbols = {**around.symbols, "q": rows.view(1, 1, -1, 1), "h": torch.tensor(head).view(1, 1, 1, 1)}
    found = evaluate(test, replace(around, symbols=symbols))
    return found.expand(1, 1, len(rows), around.symbols["k"].shape[3])[0, 0]


def _sketch(pattern: Pattern, term: Term, name: str, head: int | None, around: Environment, length: int) -> Sketch:
    stride = _stride(pattern, term)
    step, tile = _power_of_two(-(-length // _PIXELS)), min(64, max(1, _power_of_two(length // 16 + 1) // 2))
    masks, counts = [], []
    for first in range(0, length, _ROWS):
        block = _block(term.test, around, torch.arange(first, min(length, first + _ROWS)), head or 0).long()
        block = _spread(block, stride, length)
        masks.append(_summed(block, step) > 0)
        counts.append(_summed(block, tile))
    side = _summed(torch.ones(length, 1, dtype=torch.long), tile)[:, 0]
    possible = length * (length + 1) // 2 if pattern.causal else length * length
    return Sketch(name, head, torch.cat(masks), step, tile, torch.cat(counts), side[:, None] * side, possible, stride)


def _stride(pattern: Pattern, term: Term) -> int:
    stream = pattern.input(term.stream)
    return stream.grid.stride if isinstance(stream, Stream) else 1


def _spread(block: Tensor, stride: int, length: int) -> Tensor:
    """Entries as columns of tokens: [rows, entries] -> [rows, length]."""
    if block.shape[1] == length:
        return block
    columns = block.repeat_interleave(stride, 1)[:, :length]
    return torch.nn.functional.pad(columns, (0, length - columns.shape[1]))


def _power_of_two(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << (x - 1).bit_length()


def _summed(x: Tensor, side: int) -> Tensor:
    """Sums over squares of side x side, the last ones cut at the edge."""
    rows, columns = (-(-size // side) * side for size in x.shape)
    padded = torch.nn.functional.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]))
    return padded.view(rows // side, side, columns // side, side).sum((1, 3))
