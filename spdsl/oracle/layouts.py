"""Packed and left-padded sequences: each sequence is a call of its own on its own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Input, Pattern, Query, Stream, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle.call import Result
from spdsl.oracle.dense import choices, results
from spdsl.oracle.sizes import Inputs


def cut(pattern: Pattern, inputs: Inputs, first: int, end: int) -> dict[str, Tensor]:
    """The inputs of the tokens [first, end) of a batch whose queries and keys are the same tokens.

    Lists of a choice for single queries are cut like its queries; those for tiles of rows stay whole.
    """
    axes = {name: axis for an_input in pattern.inputs for name, axis in _token_axes(an_input)} | {"gates": 2}
    return {
        name: x.narrow(axes[name] % x.dim(), first, end - first) if name in axes else x for name, x in inputs.items()
    }


def _token_axes(an_input: Input) -> Iterator[tuple[str, int]]:
    """The arguments of an input that run along the tokens, and their axis (from the end, where a batch may lack)."""
    if isinstance(an_input, Query):
        yield an_input.name, 2
    elif isinstance(an_input, Stream) and an_input.compress is None:
        yield an_input.key_argument, 2
        if an_input.value_argument:
            yield an_input.value_argument, 2
    elif isinstance(an_input, TensorInput):
        along = "query" if an_input.by_row else "token"  # beside rows, tokens count from the first of each sequence
        for axis, name in enumerate(an_input.axes):
            if name == along:
                yield an_input.name, axis - len(an_input.axes)
    elif isinstance(an_input, Choice) and an_input.rows == 1:
        yield an_input.name, 2


def packed(pattern: Pattern, inputs: Inputs, cu_seqlens: Sequence[int], phase: str = "train") -> list[Result]:
    """Results of sequences that lie one after the other in a batch of 1: token s of them in [cu[s], cu[s + 1]).

    Units restart with every sequence. Empty sequences have no result. Scores of units cannot be joined: ValueError.
    """
    spans = [span for span in pairwise(cu_seqlens) if span[0] < span[1]]
    answers = [results(pattern, cut(pattern, inputs, *span), phase) for span in spans]
    return [_joined(parts) for parts in zip(*answers, strict=True)]


def packed_choices(pattern: Pattern, inputs: Inputs, cu_seqlens: Sequence[int]) -> dict[str, Tensor]:
    """The lists of all sequences as modules have them: in the layout of the queries, [1, heads, N, n], one for each; of
    tiles of rows that are maps by sequence, [sequences, heads, row tiles, n].
    """
    spans = [span for span in pairwise(cu_seqlens) if span[0] < span[1]]
    by_sequence = [
        of_queries(pattern, choices(pattern, cut(pattern, inputs, *span)), range(span[1] - span[0])) for span in spans
    ]
    tiled = {found.name for found in pattern.inputs if isinstance(found, Choice) and found.tiled}
    joined = {name: [lists[name] for lists in by_sequence] for name in by_sequence[0]}
    there = [first < end for first, end in pairwise(cu_seqlens)]
    return {name: _by_sequence(parts, there) if name in tiled else _lists(parts) for name, parts in joined.items()}


def of_queries(pattern: Pattern, lists: dict[str, Tensor], positions: range) -> dict[str, Tensor]:
    """Lists [B, heads, row tiles, n] of the tiles that the queries at `positions` lie in -> one for each of them; those
    that are maps stay.
    """
    rows = {found.name: found.rows for found in pattern.inputs if isinstance(found, Choice) and not found.tiled}
    q = torch.tensor(positions, dtype=torch.long)
    place = {name: q // own - positions.start // own for name, own in rows.items()}
    return {name: x[:, :, place[name]] if name in place else x for name, x in lists.items()}


def _joined(parts: Sequence[Result]) -> Result:
    both = [part for part in parts if isinstance(part, tuple)]
    if both:
        return torch.cat([out for out, _ in both], 2), torch.cat([lse for _, lse in both], 2)
    rows = [part for part in parts if isinstance(part, Tensor)]
    if rows[0].dim() > 3:
        raise ValueError("sequences have different units: their scores are no tensor")
    return torch.cat(rows, 2)


def _lists(parts: Sequence[Tensor]) -> Tensor:
    width = max(part.shape[3] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[3]), value=-1) for part in parts], 2)


def _by_sequence(parts: Sequence[Tensor], there: Sequence[bool]) -> Tensor:
    """Lists of the sequences that are there, among those of all: an empty one chooses nothing."""
    tiles, width = (max(part.shape[axis] for part in parts) for axis in (2, 3))
    found = parts[0].new_full((len(there), parts[0].shape[1], tiles, width), -1)
    for s, part in zip(torch.tensor(there).nonzero().flatten().tolist(), parts, strict=True):
        found[s, :, : part.shape[2], : part.shape[3]] = part[0]
    return found


def padded(pattern: Pattern, inputs: Inputs, lengths: Sequence[int], phase: str = "train") -> list[list[Result] | None]:
    """Results of each row of a batch whose last `lengths[s]` tokens are real; None for a row without any."""
    size = inputs[next(query.name for query in pattern.inputs if isinstance(query, Query))].shape[2]
    answers: list[list[Result] | None] = []
    for row, length in enumerate(lengths):
        own = {name: x[row : row + 1] if _batched(pattern, name, x) else x for name, x in inputs.items()}
        answers.append(results(pattern, cut(pattern, own, size - length, size), phase) if length else None)
    return answers


def _batched(pattern: Pattern, name: str, x: Tensor) -> bool:
    """Whether the first axis is the batch: not of weights, nor of tensors without one."""
    an_input = next((other for other in pattern.inputs if other.name == name), None)
    if isinstance(an_input, TensorInput):
        return x.dim() > len(an_input.axes)
    return not isinstance(an_input, Weight)
