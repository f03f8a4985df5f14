"""The meaning of each phase: whole sequences at once, or at decode every row as the last token of its sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.call.cases import finish
from spdsl.runtime.call.table import Arguments, Inputs, changed_in, prepared, with_choices
from spdsl.runtime.sequences import Corner, Layout, corners, expect, expect_flag

PHASES = ("train", "prefill", "decode")

Answer = Callable[[Any, Tensor | None, Layout], Any]  # of inputs and gates: lists by name, a part, or several


def expect_phase(phase: object, covered: Sequence[str]) -> None:
    """One of the phases, and one that a result of the pattern covers."""
    known = isinstance(phase, str) and phase in PHASES
    expect(known, "phase", '"train", "prefill" or "decode"', repr(phase))
    expect(phase in covered, "phase", f"one that a result covers, {' or '.join(covered)}", repr(phase))


def reference_in(
    phase: str,
    answer: Callable[..., Any],
    arguments: Arguments,
    inputs: Any,
    gates: Tensor | None,
    layout: Layout,
    return_lse: bool,
) -> Any:
    """The results of `answer(inputs, gates, layout, return_lse)`; at decode those of every row by itself."""
    if phase != "decode":
        return answer(inputs, gates, layout, return_lse)
    found = _by_row(lambda *alone: answer(*alone, True), arguments, inputs, gates, layout)
    if isinstance(found[0], Tensor):
        return finish(found, return_lse)
    return tuple(part if isinstance(part, Tensor) else finish(part, return_lse) for part in found)


def choices_in(
    phase: str,
    answer: Callable[[Any, Layout], dict[str, Tensor]] | None,
    arguments: Arguments,
    inputs: Any,
    layout: Layout,
    return_counts: bool = False,
) -> Any:
    """The lists by name, int32 [B, heads, N, most], that `answer` gives; at decode those of every row by itself.

    return_counts: and how many units each has, int32 [B, heads, N]. answer None: nothing is chosen in this phase.
    """
    expect_flag("return_counts", return_counts)
    found: dict[str, Tensor] = {}
    if answer is not None and phase != "decode":
        found = answer(inputs, layout)
    elif answer is not None:
        found = _by_row(lambda alone, _, place: answer(alone, place), arguments, inputs, None, layout)
    if not return_counts:
        return found
    return found, {name: (units >= 0).sum(-1, dtype=torch.int32) for name, units in found.items()}


def _by_row(answer: Answer, arguments: Arguments, inputs: Any, gates: Tensor | None, layout: Layout) -> Any:
    """What `answer` says of every row by itself, put together."""
    whole = prepared(arguments, inputs, layout)  # checks that no row alone could make
    if arguments.chosen:
        with_choices(arguments, whole, layout)
    q = arguments.q(inputs)
    sequences = list(corners(q, layout))
    if not sequences:  # a batch of none
        return answer(inputs, gates, layout._replace(q_spans=None, k_spans=None))
    rows = [(corner, *row) for corner in sequences for row in _rows(corner)]
    found = [answer(*_alone(arguments, inputs, gates, layout, *row)) for row in rows]
    places = None if layout.k_spans is None else [(corner.batch, slice(first, end)) for corner, first, end in rows]
    return _together(found, q, places)


def _rows(corner: Corner) -> list[tuple[int, int]]:
    """(first, end) of every row; of none, one of no row, which knows the shapes."""
    first, end = corner.rows.start, corner.rows.stop
    return [(row, row + 1) for row in range(first, end)] or [(first, first)]


def _alone(
    arguments: Arguments, inputs: Inputs, gates: Tensor | None, layout: Layout, corner: Corner, first: int, end: int
) -> tuple[Inputs, Tensor | None, Layout]:
    """The call in which row `first` of a sequence is its last token: what lies behind does not exist."""
    position = corner.q_origin + first - corner.rows.start
    tokens = max(0, position + end - first)
    keys = min(max(0, tokens - corner.k_origin), corner.keys.stop - corner.keys.start)
    start = 0 if layout.k_spans is None else corner.tokens.start
    batch, rows = corner.batch, slice(first, end)
    axes = {"token": slice(start, start + tokens)}
    columns = slice(corner.keys.start, corner.keys.start + keys)
    changed = {x.name: getattr(inputs, x.name)[batch, :, rows] for x in arguments.queries}
    for stream in arguments.streams:
        changed |= {name: getattr(inputs, name)[batch, :, columns] for name in (stream.k, stream.v) if name}
    for tensor in arguments.tensors:
        x = getattr(inputs, tensor.name)
        if x is not None and not tensor.sink:
            known = {"query": rows} if tensor.by_row else axes  # a row brings its own tokens, whatever it sees
            parts = [known.get(str(axis), slice(None)) for axis in tensor.axes]
            whole = x.dim() == len(parts)  # without a batch
            changed[tensor.name] = x[tuple(parts)] if whole else _own(x, batch)[(slice(None), *parts)]
    for units in arguments.maps:
        x = getattr(inputs, units.name)
        if x is not None:
            tile = position // units.rows - corner.q_origin // units.rows
            changed[units.name] = _own(x, corner.sequences)[:, :, tile : tile + 1]
    for name in (*(x.name for x in arguments.lists), *(x.name for x in arguments.chosen)):
        x = getattr(inputs, name)
        changed[name] = None if x is None else _own(x, batch)[:, :, rows]
    place = Layout(None, None, position, corner.k_origin, end - first, keys, layout.scale, layout.traced_scale)
    return changed_in(inputs, changed), None if gates is None else gates[batch, :, rows], place


def _own(x: Tensor, sequences: slice) -> Tensor:
    """Of some sequences; what all share stays."""
    return x if x.shape[0] == 1 else x[sequences]


def _together(found: list[Any], q: Tensor, places: list[tuple[slice, slice]] | None) -> Any:
    """The answers of single rows as one: lists by name, a part (out, lse), or several parts."""
    if isinstance(found[0], dict):
        return {name: _placed([x[name] for x in found], q, places, -1) for name in found[0]}
    if isinstance(found[0], Tensor):
        return _placed(found, q, places, 0)
    if isinstance(found[0][0], Tensor):
        out, lse = zip(*found, strict=True)
        return _placed(list(out), q, places, 0.0), _placed(list(lse), q, places, -torch.inf)
    return tuple(_together(list(part), q, places) for part in zip(*found, strict=True))


def _placed(rows: list[Tensor], q: Tensor, places: list[tuple[slice, slice]] | None, nothing: float) -> Tensor:
    """Rows [.., 1, ..] at their places (batch, row) in [B, heads, N, ..], `nothing` elsewhere; None: one by one."""
    rows = list(_alike(rows))
    if places is None:
        return torch.cat(rows, 2)
    found = rows[0].new_full((q.shape[0], rows[0].shape[1], q.shape[2], *rows[0].shape[3:]), nothing)
    for (batch, row), x in zip(places, rows, strict=True):
        found[batch, :, row] = x
    return found


def _alike(rows: list[Tensor]) -> Iterator[Tensor]:
    """Of one shape: a short list ends with -1, an lse that is one stands for every branch of a gate."""
    dims = max(x.dim() for x in rows)
    rows = [x if x.dim() == dims else x[..., None] for x in rows]
    width = max(x.shape[-1] for x in rows)
    for x in rows:
        if x.dtype == torch.int32:
            yield torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1)
        else:
            yield x if dims == 3 else x.expand(*x.shape[:-1], width)
