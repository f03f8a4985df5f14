"""The curves of some layers: margins at several lengths, which are the first tokens of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spdsl.calibration.fit import Curve
from spdsl.calibration.margins import Rule, margins
from spdsl.ir.pattern import Pattern, Phase, Softmax

_HALVES = 3  # lengths by default: all tokens, half of them, a quarter
_LEAST = 8  # tiles of keys that a length has at least: the first of a run is never left out
_STEPS = 64  # last queries of a length that stand for decode steps at it


def rule_of(pattern: Pattern, phase: str) -> Rule:
    """The tiles of the skip that the phase answers with. Raises ValueError if it has none."""
    for case in pattern.cases_of(Phase(phase)):
        for step in pattern.steps(case):
            if isinstance(step, Softmax) and step.skip is not None:
                skip, scale = step.skip, None if step.scale is None else float(step.scale)
                return Rule(skip.rows, skip.unit, skip.restart, skip.share == "group", pattern.causal, scale)
    raise ValueError(f"{pattern.name}: no `attend(.., skip = below(..))` answers in the phase {phase}")


@dataclass(frozen=True, slots=True)
class Part:
    """Queries and keys of one layer at one length."""

    length: int
    q: Tensor
    k: Tensor


def lengths_of(rule: Rule, q: Tensor, k: Tensor, wanted: Sequence[int] | None) -> list[int]:
    """Those that the data have: with queries of the last tokens alone there is one. Raises ValueError."""
    whole = k.shape[2]
    if wanted is None:
        every = [whole >> i for i in range(_HALVES) if whole >> i >= _LEAST * rule.unit]
        return sorted(every if q.shape[2] == whole else every[:1]) or [whole]
    for length in wanted:
        if length > whole or (length < whole and q.shape[2] != whole):
            raise ValueError(
                f"lengths: the data have {whole:,} keys and {q.shape[2]:,} queries, not {length:,} of both"
            )
    return sorted(set(wanted))


def part(phase: str, q: Tensor, k: Tensor, length: int) -> Part:
    """The first `length` tokens; in decode the last queries of them."""
    first = q.shape[2] - k.shape[2]
    q = q[:, :, : first + length]
    return Part(length, q[:, :, -_STEPS:] if phase == "decode" else q, k[:, :, :length])


def curves(rule: Rule, phase: str, parts: Sequence[Part]) -> Iterator[tuple[int, Curve | None]]:
    """How many parts are done; at the end of a length, its curve over all layers."""
    rule = replace(rule, rows=1) if phase == "decode" else rule
    by_length: Mapping[int, list[Part]] = {one.length: [] for one in parts}
    for one in parts:
        by_length[one.length].append(one)
    done = 0
    for length, own in by_length.items():
        found = []
        for one in own:
            found.append(margins(rule, one.q, one.k))
            done += 1
            yield done, None
        yield done, Curve.of(length, torch.cat(found).tolist())
