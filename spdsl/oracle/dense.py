"""dense: what a pattern means, in float64, every pair of query and key tested. Differentiable; no kernel is used.

`inputs` by name: queries [B, Hq, N, dim]; streams `k_name`, `v_name` [B, heads, M, dim] (`k`, `v` for `kv`); tensors
[B, *axes] or, without a token axis, [*axes]; given lists int [B, heads, row tiles, most], counted from the tile of
the first query; `gates` [B, Hq, N, branches].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from spdsl.ir.pattern import (
    Branch,
    Case,
    Choice,
    Gate,
    Merge,
    Pattern,
    Phase,
    Query,
    Softmax,
    Stream,
    Term,
    Values,
)  # fmt: skip
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle.evaluate import Environment, Table, evaluate
from spdsl.oracle.sets import drawn, given

Inputs = Mapping[str, Tensor]
Part = tuple[Tensor, Tensor]  # out float64 [B, Hq, N, Dv], natural-log lse [B, Hq, N] (gate: [B, Hq, N, branches])


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one call. Row i has position q_origin + i, entry j position k_origin + j; `kv_heads` of the first stream."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    q_origin: int
    k_origin: int

    @property
    def length(self) -> int:
        return max(self.k_origin + self.keys, self.q_origin + self.rows)


def sizes_of(pattern: Pattern, inputs: Inputs, q_offset: int | None = None, k_offset: int | None = None) -> Sizes:
    """The sizes of the inputs; by default the last query stands at the last key."""
    q = inputs[next(found.name for found in pattern.inputs if isinstance(found, Query))]
    k = inputs[next(found.key_argument for found in pattern.inputs if isinstance(found, Stream))]
    k_origin = k_offset or 0
    q_origin = k_origin + k.shape[2] - q.shape[2] if q_offset is None else q_offset
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q_origin, k_origin)


def environment(pattern: Pattern, inputs: Inputs, sizes: Sizes) -> Environment:
    """The symbols of element tests, and every tensor and choice that they may read."""
    symbols = {
        "q": (sizes.q_origin + torch.arange(sizes.rows)).view(1, 1, -1, 1),
        "k": (sizes.k_origin + torch.arange(sizes.keys)).view(1, 1, 1, -1),
        "h": torch.arange(sizes.heads).view(1, -1, 1, 1),
        "length": torch.tensor(sizes.length).view(1, 1, 1, 1),
    }
    tables: dict[str, Table] = {}
    for found in pattern.inputs:
        if isinstance(found, TensorInput):
            tables[found.name] = _tensor_table(found, inputs[found.name])
        elif isinstance(found, Choice):
            tables[found.name] = _choice_table(pattern, found, inputs, sizes)
    return Environment(symbols, tables, sizes.heads)


def _tensor_table(tensor: TensorInput, x: Tensor) -> Table:
    if x.dim() == len(tensor.axes) and "token" not in tensor.axes:
        x = x.unsqueeze(0)
    if x.dim() != len(tensor.axes) + 1:
        axes = ", ".join(map(str, ("batch", *tensor.axes)))
        raise ValueError(f"{tensor.name}: expected [{axes}], got {list(x.shape)}")
    data = x.double() if x.is_floating_point() else x.long()
    return Table(data, tuple(axis == "kv_head" for axis in tensor.axes), (0,) * len(tensor.axes))


def _choice_table(pattern: Pattern, choice: Choice, inputs: Inputs, sizes: Sizes) -> Table:
    first = sizes.q_origin // choice.rows
    tiles = (sizes.q_origin + sizes.rows - 1) // choice.rows - first + 1
    most = -(-(sizes.k_origin + sizes.keys) // choice.unit)
    if choice.rule == "given":
        return given(choice, inputs[choice.name], first, tiles, most)
    heads = sizes.heads if choice.share == "head" else sizes.kv_heads
    return drawn(choice, heads, first, tiles, most, pattern.causal)


def visible(pattern: Pattern, term: Term, inputs: Inputs, sizes: Sizes) -> Tensor:
    """Which entries of the term's stream each query sees: bool [B, Hq, N, M]."""
    found = evaluate(term.test, environment(pattern, inputs, sizes))
    return found.expand(sizes.batch, sizes.heads, sizes.rows, sizes.keys)


def attention(
    pattern: Pattern, inputs: Inputs, phase: str = "train", *, q_offset: int | None = None, k_offset: int | None = None
) -> Part:
    """The first result of the pattern -> out, lse. An empty row: out 0, lse -inf (its sink logit, if any).

    Raises ValueError if no result covers the phase or a row of the batch, or an input has a wrong shape.
    """
    return results(pattern, inputs, phase, q_offset=q_offset, k_offset=k_offset)[0]


def results(
    pattern: Pattern, inputs: Inputs, phase: str = "train", *, q_offset: int | None = None, k_offset: int | None = None
) -> list[Part]:
    """All results of the `return` that answers, row by row of the batch; cases must return equally many."""
    call = _Call(pattern, inputs, sizes_of(pattern, inputs, q_offset, k_offset))
    cases = pattern.cases_of(Phase(phase))
    open_rows = torch.ones(call.sizes.batch, dtype=torch.bool)
    answers: list[Part] = []
    for case in cases:
        rows = open_rows & call.holds(case)
        own = [call.branch(branch) for branch in (case.branch, *case.extras)]
        answers = [_chosen(rows, new, old) for new, old in zip(own, answers or own, strict=True)]
        open_rows = open_rows & ~rows
    if not cases or bool(open_rows.any()):
        raise ValueError(f"{pattern.name}: no result covers this call in the phase {phase}")
    return answers


def _chosen(rows: Tensor, new: Part, old: Part) -> Part:
    """`new` in the batch rows [B] that are set, else `old`."""
    out, lse = (torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(new, old, strict=True))
    return out, lse


@dataclass(frozen=True, slots=True)
class _Call:
    pattern: Pattern
    inputs: Inputs
    sizes: Sizes

    def holds(self, case: Case) -> Tensor:
        """Whether the condition holds, bool [B or 1]."""
        if case.condition is None:
            return torch.ones(1, dtype=torch.bool)
        return evaluate(case.condition, environment(self.pattern, self.inputs, self.sizes)).reshape(-1)

    def branch(self, branch: Branch) -> Part:
        if isinstance(branch, Softmax):
            return self.softmax(branch)
        parts = [self.branch(inner) for inner in branch.branches]
        return merged(parts) if isinstance(branch, Merge) else self.gated(branch, parts)

    def gated(self, gate: Gate, parts: list[Part]) -> Part:
        """The sum of gate * out; one lse per branch."""
        gates = self.inputs["gates"].double()
        if gates.shape[-1] != len(gate.branches):
            raise ValueError(f"gates: expected {len(gate.branches)} branches, got {gates.shape[-1]}")
        out = sum((gates[..., i, None] * part for i, (part, _) in enumerate(parts)), torch.zeros(()))
        return out, torch.cat([lse if lse.dim() == 4 else lse.unsqueeze(-1) for _, lse in parts], -1)

    def softmax(self, softmax: Softmax) -> Part:
        """One normaliser over all terms, the sink in the denominator only."""
        around = environment(self.pattern, self.inputs, self.sizes)
        logits, values = [], []
        for term in softmax.terms:
            k, v = self.key_value(term.stream)
            logits.append(self.logits(softmax, term, k, around))
            values.append(v)
        if softmax.sink is not None:
            sink = around.tables[softmax.sink].data[:, :, None, None]
            logits.append(sink.expand(self.sizes.batch, -1, self.sizes.rows, 1))
            values.append(torch.zeros_like(values[0][:, :, :1]))
        return normalised(torch.cat(logits, -1), torch.cat(values, 2))

    def logits(self, softmax: Softmax, term: Term, k: Tensor, around: Environment) -> Tensor:
        """cap(scale * q @ k.T) + bias, -inf where hidden: [B, Hq, N, M]."""
        q = self.inputs[softmax.query].double()
        scale = 1 / sqrt(q.shape[-1]) if softmax.scale is None else float(softmax.scale)
        found = q @ k.transpose(2, 3) * scale
        if softmax.softcap:
            found = softmax.softcap * torch.tanh(found / softmax.softcap)
        if softmax.bias is not None:
            found = found + evaluate(softmax.bias, around)
        return torch.where(evaluate(term.test, around), found, -torch.inf)

    def key_value(self, name: str) -> tuple[Tensor, Tensor]:
        """K and V of a stream in float64, one head per query head: [B, Hq, M, dim]."""
        stream = self.pattern.input(name)
        assert isinstance(stream, Stream)
        k = self.inputs[stream.key_argument]
        if stream.value is Values.NONE:
            raise ValueError(f"stream {name} has no values to attend to")
        own = stream.value_argument
        v = self.inputs[own] if own else k[..., : stream.v or self.pattern.v_dim or k.shape[-1]]
        group = self.sizes.heads // k.shape[1]
        return k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)


def normalised(logits: Tensor, values: Tensor) -> Part:
    """Softmax over the last axis times values [.., M, Dv]; a row of -inf only gives 0 and lse -inf, no gradient."""
    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, top + torch.log(total))
    return weights / total @ values, lse.squeeze(-1)


def merged(parts: list[Part]) -> Part:
    """The exact log-sum-exp merge: every branch weighs as its share of the common denominator."""
    if any(lse.dim() == 4 for _, lse in parts):
        raise ValueError("a gate has no common denominator and cannot be merged")
    lses = torch.stack([lse for _, lse in parts], -1)  # the logits of a softmax over the branches
    out, lse = normalised(lses.unsqueeze(-2), torch.stack([out for out, _ in parts], -2))
    return out.squeeze(-2), lse.squeeze(-1)
