"""One softmax without kernels: on the CPU path, over a cache, and as the float64 meaning.

A module says of a softmax what its pattern says, as a `Form`; everything here follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spdsl.runtime.cache.storage import Storage
from spdsl.runtime.call.lists import tiles_of
from spdsl.runtime.call.reference import dense_softmax
from spdsl.runtime.cpu.cpu import sparse_backward, sparse_forward
from spdsl.runtime.cpu.cpu_step import sparse_step, step_of_units
from spdsl.runtime.cpu.cpu_tiles import Logits, Part
from spdsl.runtime.cpu.cpu_units import units_backward, units_forward
from spdsl.runtime.cpu.visits import CPU_BLOCK, visits_of_blocks, visits_of_ranges
from spdsl.runtime.entries.entries import Cells
from spdsl.runtime.entries.entry_corners import entry_corners
from spdsl.runtime.launch.launch import empty_rows, gradient_room, is_step, wide
from spdsl.runtime.select.products import PRODUCTS
from spdsl.runtime.select.scores import unit_products
from spdsl.runtime.sequences import Corner, Layout, corners
from spdsl.runtime.skip.rule import SkipRule
from spdsl.runtime.units.units import unit_mask

KeyValues = Sequence[tuple[Tensor, Tensor]]
Ranges = list[tuple[int, int, int, int]]


class BiasRead(NamedTuple):
    """A read of the tensor `name` in a bias, on (q, k, heads, length, tensors).

    slope: the derivative of the bias by it. element: what is read; of a tensor of numbers it is the element's.
    """

    name: str
    slope: Callable[..., Tensor | float]
    element: Callable[..., Tensor]


class Sweep(NamedTuple):
    """The keys of one stream. All take the tensors that the softmax reads last, where it reads any.

    mask: the element test (q, k, heads, length). visits: key ranges (first, end, full_first, full_end) of the rows
    q_first..q_last at a length; `decode` of one row. tiles: of a tile map, (may, must) of tiles and heads.
    """

    mask: Callable[..., Tensor]
    visits: Callable[[int, int, int], Ranges] | None = None
    decode: Callable[[int, int], Ranges] | None = None
    tiles: Callable[..., tuple[Tensor, Tensor]] | None = None


class Form(NamedTuple):
    """What the pattern says of one softmax. scale None: that of the call. cells: of its entries; None: tokens.

    bias: added to logits, of (q, k, heads, length). reads_of: of all tensors that it reads, those of some sequences.
    bias_reads: what of it has a gradient.
    by_row: some of them have a number for each row of the call, which `row_shift` finds.
    unit: tokens of the units of the choice that it walks, 0: none.
    product: of a query and a key, `dot` where it attends; else it has no output, and its log-sum-exp may be asked for.
    skip: the tiles that it leaves out: functions of `runtime/skip` compute it.
    """

    sweeps: tuple[Sweep, ...]
    scale: float | None = None
    softcap: float | None = None
    bias: Callable[..., Tensor] | None = None
    bias_reads: tuple[BiasRead, ...] = ()
    cells: Cells | None = None
    reads_of: Callable[..., Any] | None = None
    by_row: bool = False
    unit: int = 0
    product: str = "dot"
    skip: SkipRule | None = None

    def logits(self, q: Tensor, corner: Corner) -> Logits:
        return Logits(self.scale_of(q, corner), self.softcap, corner.q_origin)

    def scale_of(self, q: Tensor, corner: Corner) -> Any:
        """A number; a tensor of it where PyTorch traces a call that says one."""
        if self.scale is not None:
            return self.scale
        return float(q.shape[-1] ** -0.5) if corner.scale is None else corner.scale

    def corners(self, q: Tensor, layout: Layout, in_cache: bool = False) -> Iterator[Corner]:
        return iter(corners(q, layout) if self.cells is None else entry_corners(q, layout, self.cells, in_cache))

    def own(self, t: Any, corner: Corner, layout: Layout) -> tuple[Any, ...]:
        """What the functions of the sweeps take last."""
        if self.reads_of is None:
            return ()
        found = self.reads_of(t, corner.sequences, None if layout.q_spans is None else corner.tokens)
        return (found._replace(row_shift=corner.rows.start - corner.q_origin) if self.by_row else found,)


def streams_of(form: Form, heads: int, keys: KeyValues, corner: Corner, own: tuple[Any, ...]) -> list[Part]:
    """The streams for the CPU engine; `keys` and `own` belong to the corner's sequences."""
    h = torch.arange(heads).view(1, -1, 1, 1)
    return [_part(form, sweep, pair, h, corner, own) for sweep, pair in zip(form.sweeps, keys, strict=True)]


def _part(
    form: Form, sweep: Sweep, pair: tuple[Tensor, Tensor], h: Tensor, corner: Corner, own: tuple[Any, ...]
) -> Part:
    def visits(first: int, end: int) -> list[tuple[int, int, bool]]:
        q_first, q_last = corner.q_origin + first, corner.q_origin + end - 1
        if sweep.visits is not None:
            return visits_of_ranges(sweep.visits(q_first, q_last, corner.length), corner)
        assert sweep.tiles is not None
        count = corner.keys.stop - corner.keys.start
        bounds = [torch.tensor([x]) for x in (q_first, end - first, corner.k_origin, count)]
        sizes = (1, end - first, -(-count // CPU_BLOCK), CPU_BLOCK)
        tiles = tiles_of(bounds[0], bounds[1], bounds[2], bounds[3], sizes)
        return visits_of_blocks(*sweep.tiles(tiles, h, *own), CPU_BLOCK, count)

    def on_pairs(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: function(q[None, None], k[None, None] + corner.k_origin, h, corner.length, *own)

    bias = None if form.bias is None else on_pairs(form.bias)
    return Part(*pair, visits, on_pairs(sweep.mask), bias)


def tests_on_pairs(form: Form, corner: Corner, own: tuple[Any, ...]) -> tuple[Any, Any]:
    """The element test and the bias on query positions, key numbers and heads, for units."""

    def on_pairs(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, h: function(q, k + corner.k_origin, h, corner.length, *own)

    return on_pairs(form.sweeps[0].mask), None if form.bias is None else on_pairs(form.bias)


def cpu_forward(
    form: Form,
    q: Tensor,
    keys: KeyValues,
    layout: Layout,
    sink: Tensor | None,
    t: Any = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> out, lse; rows in no sequence keep out = 0, lse = -inf. chosen: the units that it walks."""
    out, lse = empty_rows(q, keys[0][1].shape[3])
    for corner in form.corners(q, layout):
        rows, columns = (corner.batch, slice(None), corner.rows), (corner.batch, slice(None), corner.keys)
        here, own = [(k[columns], v[columns]) for k, v in keys], form.own(t, corner, layout)
        units = None if chosen is None else chosen[rows]
        out[rows], lse[rows] = _rows_forward(form, q[rows], here, corner, own, sink, units)
    return out, lse


def _rows_forward(
    form: Form,
    q: Tensor,
    keys: KeyValues,
    corner: Corner,
    own: tuple[Any, ...],
    sink: Tensor | None,
    chosen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of the rows and keys of one corner: out, lse."""
    q, keys = _vectors(form, q, keys)
    logits = form.logits(q, corner)
    if chosen is not None:
        return units_forward(q, *keys[0], chosen, form.unit, *tests_on_pairs(form, corner, own), logits, sink)
    return sparse_forward(q, streams_of(form, q.shape[1], keys, corner, own), logits, sink)


def _vectors(form: Form, q: Tensor, keys: KeyValues) -> tuple[Tensor, KeyValues]:
    """What dot products multiply in place of q and k."""
    if form.product == "dot":
        return q, keys
    of = PRODUCTS[form.product].vectors
    (q, _), own = of(q, keys[0][0]), [of(q, k)[1] for k, _ in keys]
    return q, [(k, v.to(q.dtype)) for k, (_, v) in zip(own, keys, strict=True)]


def cpu_backward(
    form: Form,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: KeyValues,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    t: Any = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """-> dq, (dk, dv) of each stream; out and lse may be those of a joint softmax."""
    dq, grads = gradient_room(q, keys)
    for corner in form.corners(q, layout):
        rows, columns = (corner.batch, slice(None), corner.rows), (corner.batch, slice(None), corner.keys)
        here, own = [(k[columns], v[columns]) for k, v in keys], form.own(t, corner, layout)
        logits, own_dlse = form.logits(q, corner), None if dlse is None else dlse[rows]
        if chosen is not None:
            given = (dout[rows], own_dlse, q[rows], *here[0], out[rows], lse[rows], chosen[rows], form.unit)
            dq[rows], own_dk, own_dv = units_backward(*given, *tests_on_pairs(form, corner, own), logits)
            pairs = [(own_dk, own_dv)]
        else:
            parts = streams_of(form, q.shape[1], here, corner, own)
            dq[rows], pairs = sparse_backward(dout[rows], own_dlse, q[rows], parts, out[rows], lse[rows], logits)
        for (dk, dv), pair in zip(grads, pairs, strict=True):
            dk[columns], dv[columns] = pair
    return dq, grads


def cached_attention(
    form: Form,
    q: Tensor,
    keys: KeyValues,
    held: Storage,
    layout: Layout,
    sink: Tensor | None,
    t: Any = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """New queries over the keys in a cache, or in pages: out, lse. Of one query the keys are read where they lie."""
    out, lse = empty_rows(q, keys[0][1].shape[3])
    step = is_step(q, layout) and form.product == "dot"
    for corner in form.corners(q, layout, in_cache=True):
        s, own = corner.sequences.start, form.own(t, corner, layout)
        row = (corner.batch, slice(None), corner.rows)
        logits, units = form.logits(q, corner), None if chosen is None else chosen[row]
        if form.cells is not None:
            here = [(held.entry_rows(k, s, corner.keys), held.entry_rows(v, s, corner.keys)) for k, v in keys]
            found = _rows_forward(form, q[row], here, corner, own, sink, units)
        elif step and units is not None:
            seen = tests_on_pairs(form, corner, own)
            found = step_of_units(q[row], *keys[0], units, form.unit, *seen, held.homes(s), logits, sink)
        elif step:
            parts = streams_of(form, q.shape[1], keys, corner, own)
            found = sparse_step(q[row], parts, _step_ranges(form, corner, own), held.homes(s), logits, sink)
        else:
            here = [(held.rows(k, s, corner.length), held.rows(v, s, corner.length)) for k, v in keys]
            found = _rows_forward(form, q[row], here, corner, own, sink, units)
        out[row], lse[row] = found
    return out, lse


def dense_attention(
    form: Form,
    q: Tensor,
    keys: KeyValues,
    layout: Layout,
    sink: Tensor | None,
    t: Any = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The meaning in float64: every pair of query and key is tested."""
    h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    out = q.new_zeros(*q.shape[:3], keys[0][1].shape[3], dtype=torch.float64)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for corner in form.corners(q, layout):
        rows, columns = (corner.batch, slice(None), corner.rows), (corner.batch, slice(None), corner.keys)
        count, own = corner.keys.stop - corner.keys.start, form.own(t, corner, layout)
        q_at = (corner.q_origin + torch.arange(q[rows].shape[2], device=q.device)).view(1, 1, -1, 1)
        k_at = (corner.k_origin + torch.arange(count, device=q.device)).view(1, 1, 1, -1)
        place = (q_at, k_at, h, corner.length, *own)
        bias = None if form.bias is None else form.bias(*place)
        masks = [sweep.mask(*place) for sweep in form.sweeps]
        if chosen is not None:
            masks = [masks[0] & unit_mask(chosen[rows], form.unit, count, q.shape[1])]
        asking, here = _vectors(form, q[rows].double(), [(k[columns].double(), v[columns]) for k, v in keys])
        streams = [(*pair, mask, bias) for pair, mask in zip(here, masks, strict=True)]
        found = dense_softmax(asking, streams, form.scale_of(q, corner), form.softcap, sink)
        if layout.k_spans is None:
            return found
        out[rows], lse[rows] = found
    return out, lse


def _step_ranges(form: Form, corner: Corner, own: tuple[Any, ...]) -> list[list[tuple[int, int, bool]]]:
    """For each stream the positions that one query may see."""
    decodes = [sweep.decode for sweep in form.sweeps if sweep.decode is not None]
    return [visits_of_ranges(decode(corner.q_origin, corner.length), corner) for decode in decodes]


def logits_of(
    form: Form, q: Tensor, k: Tensor, corner: Corner, own: tuple[Any, ...] = (), chosen: Tensor | None = None
) -> Callable[[int, int], Tensor]:
    """Rows first..end - 1 of the logits for one sequence, [B, Hq, rows, keys]; hidden keys are -inf."""
    q, k = PRODUCTS[form.product].vectors(q, k)
    h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    k_at = torch.arange(k.shape[2], device=q.device).view(1, 1, 1, -1) + corner.k_origin
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)

    def logits(first: int, end: int) -> Tensor:
        q_at = (corner.q_origin + torch.arange(first, end, device=q.device)).view(1, 1, -1, 1)
        found = (q[:, :, first:end] @ k).to(wide(q.dtype)) * form.scale_of(q, corner)
        found, seen = _finished(form, found, (q_at, k_at, h, corner.length, *own))
        if chosen is not None:
            seen = seen & unit_mask(chosen[:, :, first:end], form.unit, k.shape[3], q.shape[1])
        return found.masked_fill(~seen, -torch.inf)

    return logits


def logits_of_units(
    form: Form, q: Tensor, k: Tensor, corner: Corner, own: tuple[Any, ...], chosen: Tensor, unit: int
) -> Callable[[int, int], Tensor]:
    """The same on the units that each query chose, [B, Hq, rows, n * unit]."""
    q, k = PRODUCTS[form.product].vectors(q, k)
    h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)

    def logits(first: int, end: int) -> Tensor:
        q_at = (corner.q_origin + torch.arange(first, end, device=q.device)).view(1, 1, -1, 1)
        found, number = unit_products(q[:, :, first:end], k, chosen[:, :, first:end], unit)
        place = (q_at, number.clamp(min=0) + corner.k_origin, h, corner.length, *own)
        found, seen = _finished(form, found.to(wide(q.dtype)) * form.scale_of(q, corner), place)
        return found.masked_fill(~seen | (number < 0), -torch.inf)

    return logits


def _finished(form: Form, found: Tensor, place: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Scaled products -> logits, and which of them the first stream sees."""
    if form.softcap:
        found = form.softcap * torch.tanh(found / form.softcap)
    if form.bias is not None:
        found = found + form.bias(*place).to(found.dtype)
    return found, form.sweeps[0].mask(*place)
