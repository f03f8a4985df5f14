"""Masks in small: how many pairs of each tile are visible, found row block by row block, never as one N x N matrix.

An entry of a compressed stream is drawn as `stride` of its tokens, from its place on if it reaches so far. Of a
selected set no score is computed: example lists stand in, the forced units and random ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import sympy
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from spdsl.ir.pattern import Case, Choice, Grid, Pattern, Phase, Softmax, Stream, Term
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
    seen: int  # visible pairs of a query and an entry
    stride: int = 1  # columns of one entry
    example: Tensor | None = None  # of `mask`: seen only because an example list says so

    def states(self) -> Tensor:
        """0 empty, 1 partial, 2 full, per tile."""
        return (self.counts > 0).long() + (self.counts == self.pairs).long()

    def coarser(self, factor: int) -> Sketch:
        """Tiles of `factor` times the side."""
        counts, pairs = (_summed(x, factor) for x in (self.counts, self.pairs))
        return replace(self, tile=self.tile * factor, counts=counts, pairs=pairs)

    @property
    def sparsity(self) -> float:
        """The share of the dense pairs that is hidden."""
        return 1 - self.seen / self.possible


@lru_cache(maxsize=8)  # who looks for a length that shows something draws that one afterwards
def sketches(pattern: Pattern, length: int) -> tuple[list[Sketch], list[str]]:
    """A sketch per softmax, stream and differing head (two at most), and notes on what is drawn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # blocks are small: handing them to threads costs more than they do
    try:
        return _sketches(pattern, length)
    finally:
        torch.set_num_threads(threads)


def _sketches(pattern: Pattern, length: int) -> tuple[list[Sketch], list[str]]:
    heads = pattern.query_heads or 2 * (pattern.kv_heads or 2)
    kv_heads = pattern.kv_heads or max(1, heads // 2 if heads % 2 == 0 else heads)
    sizes = Sizes(1, heads, kv_heads, length, length, 0, 0)
    inputs, notes = example_inputs(pattern, sizes, choices=True, weights=False)
    forced, _ = example_inputs(pattern, sizes, choices=True, weights=False, forced_only=True)
    sketches_of_terms = []
    for softmax in pattern.softmaxes():
        for term in softmax.terms:
            around = environment(pattern, inputs, sizes, term.stream)
            certain = environment(pattern, forced, sizes, term.stream) if _is_example(pattern, term) else None
            name = _name(pattern, softmax, term)
            for head in _heads(pattern, term, around, length):
                sketches_of_terms.append(_sketch(pattern, term, name, head, around, certain, length))
    return sketches_of_terms, [*(f"example values, {note}" for note in notes), *_grid_notes(pattern)]


def _grid_notes(pattern: Pattern) -> Iterator[str]:
    for name in dict.fromkeys(term.stream for softmax in pattern.softmaxes() for term in softmax.terms):
        stream = pattern.input(name)
        if isinstance(stream, Stream) and stream.compress:
            width, stride = stream.grid.width, stream.grid.stride
            which = "" if stream.grid.before else "the first "
            drawn = f", drawn at {which}{stride} of them" if stride < width else ""
            yield f"an entry of `{name}` stands for {width} tokens{drawn}"


def _name(pattern: Pattern, softmax: Softmax, term: Term) -> str:
    several = len(pattern.softmaxes()) > 1
    used = [case for case in pattern.cases if softmax.name in pattern.outputs(case)]
    parts = [softmax.name if used else f"score {softmax.name}"] if several else []
    parts += [f"stream {term.stream}"] if len(softmax.terms) > 1 or term.stream != "kv" else []
    parts += _conditions(pattern, used)
    return ", ".join(parts)


def _conditions(pattern: Pattern, used: Sequence[Case]) -> list[str]:
    """When a softmax is asked, if only one of several results has it."""
    if len(used) != 1 or len(pattern.cases) == 1:
        return []
    (case,) = used
    phases = [phase.value for phase in Phase if phase in case.phases]
    texts = [] if len(phases) == len(Phase) else [" or ".join(phases)]
    texts += [] if case.condition is None else [str(case.condition)]
    return [f"if {' and '.join(texts)}"] if texts else []


def _is_example(pattern: Pattern, term: Term) -> bool:
    """Whether a set is selected by a score, so that only what is forced is certain."""
    choices = [pattern.choice(lookup_name(read)) for read in lookups(term.test)]
    return any(choice is not None and choice.selected for choice in choices)


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
    mask = evaluate(test, replace(around, symbols=symbols))
    return mask.expand(1, 1, len(rows), around.symbols["k"].shape[3])[0, 0]


def _sketch(
    pattern: Pattern, term: Term, name: str, head: int | None, around: Environment, certain: Environment | None,
    length: int,
) -> Sketch:  # fmt: skip
    stream = pattern.input(term.stream)
    grid = stream.grid if isinstance(stream, Stream) else Grid()
    step, tile = _power_of_two(-(-length // _PIXELS)), min(64, max(1, _power_of_two(length // 16 + 1) // 2))
    masks, counts, known, seen = [], [], [], 0
    for first in range(0, length, _ROWS):
        rows = torch.arange(first, min(length, first + _ROWS))
        end = -(-(first + len(rows) + grid.before) // grid.stride) if pattern.causal else length
        entries = _block(term.test, _first_keys(around, end), rows, head or 0)
        seen += int(entries.sum())
        block = _spread(entries, grid, length)
        masks.append(max_pool2d(block, step, ceil_mode=True)[0, 0] > 0)
        counts.append(avg_pool2d(block, tile, ceil_mode=True, divisor_override=1)[0, 0].long())
        if certain is not None:
            block = _spread(_block(term.test, _first_keys(certain, end), rows, head or 0), grid, length)
            known.append(max_pool2d(block, step, ceil_mode=True)[0, 0] > 0)
    mask = torch.cat(masks)
    side = _summed(torch.ones(length, 1, dtype=torch.long), tile)[:, 0]
    possible = length * (length + 1) // 2 if pattern.causal else length * length
    example = mask & ~torch.cat(known) if known else None
    pairs = side[:, None] * side
    return Sketch(name, head, mask, step, tile, torch.cat(counts), pairs, possible, seen, grid.stride, example)


def _first_keys(around: Environment, end: int) -> Environment:
    """With `causal` no row sees an entry from `end` on."""
    return replace(around, symbols={**around.symbols, "k": around.symbols["k"][..., :end]})


def _spread(block: Tensor, grid: Grid, length: int) -> Tensor:
    """Entries as columns of tokens: bool [rows, entries] -> float32 [1, 1, rows, length], for pooling."""
    early = max(0, grid.before + grid.stride - grid.width)  # so much less than a stride begins at the place
    columns = (block.repeat_interleave(grid.stride, 1) if grid.stride > 1 else block)[:, early : early + length]
    whole = torch.zeros(1, 1, len(block), length)
    whole[..., : columns.shape[1]] = columns
    return whole


def _power_of_two(x: int) -> int:
    """The least power of two that is at least x."""
    return 1 << (x - 1).bit_length()


def _summed(x: Tensor, side: int) -> Tensor:
    """Sums over squares of side x side, the last ones cut at the edge."""
    rows, columns = (-(-size // side) * side for size in x.shape)
    padded = torch.nn.functional.pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0]))
    return padded.view(rows // side, side, columns // side, side).sum((1, 3))
