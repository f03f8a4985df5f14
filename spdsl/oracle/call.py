"""One call of a pattern: streams, softmaxes, scores and selected sets, each as its definition says."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor

from spdsl.ir.pattern import (
    Branch,
    Case,
    Choice,
    Gate,
    Input,
    Kept,
    Kl,
    Merge,
    Pattern,
    Pooled,
    Softmax,
    Stream,
    Term,
    Values,
)  # fmt: skip
from spdsl.ir.pattern import Score as ScoreOf
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.ir.symbols import Boolean, Expr, lookup_name, lookups
from spdsl.oracle.compress import compressed, entries
from spdsl.oracle.evaluate import Environment, Table, evaluate
from spdsl.oracle.products import multiplied
from spdsl.oracle.selection import Limits, Scores, chosen, constant, pooled
from spdsl.oracle.sets import drawn, given
from spdsl.oracle.sizes import Inputs, Sizes
from spdsl.oracle.skip import counted, kept_tiles, without_dropped
from spdsl.oracle.softmax import Part, divergence, log_sum_exp, merged, normalised
from spdsl.oracle.tables import Tables, tensor_table

Result = Part | Tensor  # out and lse; a tensor for `Pooled` and `Kl`


@dataclass(frozen=True, slots=True)
class Call:
    pattern: Pattern
    inputs: Inputs
    sizes: Sizes
    tables: Tables = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tables", Tables(self.pattern, self.table))
        if self.sizes.k_origin and any(map(_derived, self.pattern.inputs)):
            raise ValueError("compressed streams and selected sets need the keys from position 0 on")

    def table(self, found: TensorInput | Choice) -> Table:
        if isinstance(found, TensorInput):
            return tensor_table(found, self.inputs[found.name], self.sizes.q_origin)
        sizes = self.sizes
        first, tiles, units = sizes.first_tile(found.rows), sizes.tiles(found.rows), sizes.units(found.unit)
        if found.given or found.name in self.inputs:
            return given(found, self.inputs[found.name], first, tiles, units)
        if found.selected:
            return given(found, self.lists(found), first, tiles, units)
        heads = sizes.heads if found.share == "head" else sizes.kv_heads
        return drawn(found, heads, first, tiles, units, self.pattern.causal)

    def stream(self, name: str) -> Stream:
        found = self.pattern.input(name)
        assert isinstance(found, Stream)
        return found

    def entries(self, name: str | None) -> int:
        """Entries of a stream; of the token grid without a name."""
        grid = None if name is None else self.stream(name)
        return self.sizes.keys if grid is None or grid.compress is None else entries(grid.grid, self.sizes.keys)

    def around(self, stream: str | None = None, heads: int | None = None) -> Environment:
        """The symbols of element tests on a stream, of `heads` query heads; on a compressed one `k` counts entries."""
        heads = self.sizes.heads if heads is None else heads
        symbols = {
            "q": (self.sizes.q_origin + torch.arange(self.sizes.rows)).view(1, 1, -1, 1),
            "k": (self.sizes.k_origin + torch.arange(self.entries(stream))).view(1, 1, 1, -1),
            "h": torch.arange(heads).view(1, -1, 1, 1),
            "length": torch.tensor(self.sizes.length).view(1, 1, 1, 1),
        }
        return Environment(symbols, self.tables, heads)

    def holds(self, case: Case) -> Tensor:
        """Whether the condition holds, bool [B or 1]."""
        if case.condition is None:
            return torch.ones(1, dtype=torch.bool)
        return evaluate(case.condition, self.around()).reshape(-1)

    def result(self, result: Branch | Pooled | Kl | Kept) -> Result:
        if isinstance(result, Kept):
            return self.counts(result.softmax)
        if isinstance(result, Pooled):
            values, known = self.pooled(result)
            return torch.where(known, values, 0.0 if result.score.probability else -torch.inf)
        return self.kl(result) if isinstance(result, Kl) else self.branch(result)

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
        values = [self.values(term.stream) for term in softmax.terms]
        if softmax.sink is not None:
            values.append(values[0].new_zeros(*values[0].shape[:2], 1, values[0].shape[3]))
        heads = self.inputs[softmax.query].shape[1]
        shared = [x.repeat_interleave(heads // x.shape[1], 1) for x in values]
        return normalised(self.all_logits(softmax), torch.cat(shared, 2))

    def counts(self, softmax: Softmax) -> Tensor:
        """Of each tile of rows how many tiles of keys are kept, and have a logit that a voter sees."""
        (term,), skip = softmax.terms, softmax.skip
        assert skip is not None
        return counted(skip, self.logits(softmax, term).detach(), self.kept(softmax), self.sizes)

    def kept(self, softmax: Softmax) -> Tensor:
        """The tiles that a softmax with a skip keeps: those given as `<softmax>.kept`, or by its rule. No gradient."""
        assert softmax.skip is not None
        if f"{softmax.name}.kept" in self.inputs:
            return self.inputs[f"{softmax.name}.kept"]
        (term,) = softmax.terms
        with torch.no_grad():
            logits = self.logits(softmax, term)
            level = self.of_lists(softmax.skip.level, logits.shape[1]).double()
            return kept_tiles(softmax.skip, logits, level, self.sizes)

    def all_logits(self, softmax: Softmax) -> Tensor:
        """The logits of all terms side by side, the sink last: in the denominator only."""
        logits = [self.logits(softmax, term) for term in softmax.terms]
        if softmax.skip is not None:
            logits = [without_dropped(softmax.skip, logits[0], self.kept(softmax), self.sizes)]
        if softmax.sink is not None:
            sink = self.tables[softmax.sink].data.double()[:, :, None, None]
            logits.append(sink.expand(self.sizes.batch, -1, self.sizes.rows, 1))
        return torch.cat(logits, -1)

    def logits(self, softmax: Softmax, term: Term) -> Tensor:
        """cap(scale * product of q and k) + bias, -inf where hidden: [B, heads of the query, N, M]."""
        q = self.inputs[softmax.query].double()
        scale = 1 / sqrt(q.shape[-1]) if softmax.scale is None else float(softmax.scale)
        found = self.products(softmax, q, self.keys(term.stream)) * scale
        if softmax.softcap:
            found = softmax.softcap * torch.tanh(found / softmax.softcap)
        around = self.around(term.stream, q.shape[1])
        if softmax.bias is not None:
            found = found + evaluate(softmax.bias, around)
        return torch.where(evaluate(term.test, around), found, -torch.inf)

    def products(self, softmax: Softmax, q: Tensor, k: Tensor) -> Tensor:
        """Of every query with every key: [B, heads of the query, N, M]."""
        return multiplied(softmax.product, q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))

    def keys(self, name: str) -> Tensor:
        """K of a stream in float64: [B, heads, M, qk]."""
        stream = self.stream(name)
        if stream.compress is None:
            return self.inputs[stream.key_argument].double()
        z = None if stream.compress.logits is None else self.keys(stream.compress.logits)
        return compressed(stream, "k", self.keys(stream.compress.source), z, self.inputs)

    def values(self, name: str) -> Tensor:
        """V of a stream in float64: [B, heads, M, v]."""
        stream = self.stream(name)
        if stream.value is Values.NONE:
            raise ValueError(f"stream {name} has no values to attend to")
        if stream.value is Values.KEY:
            return self.keys(name)[..., : stream.v or self.pattern.v_dim]
        if stream.compress is None:
            assert stream.value_argument is not None
            return self.inputs[stream.value_argument].double()
        logits = stream.compress.logits
        if logits is not None:
            own = self.stream(logits).value is Values.OWN
            z = self.values(logits) if own else self.keys(logits)
        return compressed(stream, "v", self.values(stream.compress.source), z if logits else None, self.inputs)

    def score(self, score: ScoreOf) -> Scores:
        """The score of every pair and whether the query sees the entry: [B, heads of the query, N, M]."""
        term = score.softmax.terms[0]
        logits = self.logits(score.softmax, term)
        seen = self.visible(score.softmax, term)
        if not score.probability:
            return torch.where(seen, logits, 0.0), seen
        lse = log_sum_exp(self.all_logits(score.softmax)).unsqueeze(-1)
        return torch.exp(torch.where(seen, logits - torch.where(lse == -torch.inf, 0.0, lse), -torch.inf)), seen

    def visible(self, softmax: Softmax, term: Term) -> Tensor:
        """Which entries of the term's stream each query sees: bool [B, heads of the query, N, M]."""
        around = self.around(term.stream, self.inputs[softmax.query].shape[1])
        shape = (self.sizes.batch, around.heads, self.sizes.rows, self.entries(term.stream))
        return evaluate(term.test, around).expand(shape)

    def pooled(self, how: Pooled | Choice) -> Scores:
        """The scores of units, [B, lists, row tiles, units]."""
        assert how.score is not None
        scores = self.score(how.score)
        return pooled(
            scores, how, self.stream(how.score.grain.stream).grid, self.heads(how, scores[0].shape[1]), self.sizes
        )

    def heads(self, how: Pooled | Choice, score_heads: int) -> int:
        """Lists: one per kv head of the stream that a choice is used on, or one per query head."""
        if isinstance(how, Pooled):
            return score_heads if how.share == "head" else self.sizes.kv_heads
        if how.share == "head":
            return self.sizes.heads
        terms = [term for softmax in self.pattern.softmaxes() for term in softmax.terms]
        used = [term.stream for term in terms if how.name in map(lookup_name, lookups(term.test))]
        return self.keys(used[0]).shape[1] if used else self.sizes.kv_heads

    def lists(self, choice: Choice) -> Tensor:
        """The units that a rule selects: int32 [B, lists, row tiles, n], ascending, -1 at the end. No gradient."""
        with torch.no_grad():
            values, known = self.pooled(choice)
            shape = (*values.shape[:3], choice.unit)
            forced, allowed = self.units(choice.force, choice, shape), self.units(choice.within, choice, shape)
            limits = Limits.of(choice, lambda number: self.of_lists(number, shape[1]))
            return chosen(choice, (values, known), forced, allowed & self.begun(choice), limits)

    def of_lists(self, number: Expr, lists: int) -> Tensor:
        """An expression without positions for each list, float64 [B or 1, lists or 1]: `h` is the list's first head."""
        if number.is_number:
            return constant(number)
        around = self.around()
        first = (torch.arange(lists) * around.heads // lists).view(1, -1, 1, 1)
        found = evaluate(number, Environment({**around.symbols, "h": first}, around.tables, around.heads))
        return found.double().flatten(1)

    def begun(self, choice: Choice) -> Tensor:
        """Units that begin at or before the last query of a tile, all without `causal`: bool [row tiles, units]."""
        starts = torch.arange(self.sizes.units(choice.unit)) * choice.unit
        found = starts <= self.last_rows(choice).unsqueeze(1)
        return found if self.pattern.causal else torch.ones_like(found)

    def last_rows(self, choice: Choice) -> Tensor:
        """The position of the last query of each tile, whether or not the call holds it: a tile sees what it sees."""
        first = self.sizes.first_tile(choice.rows)
        return (first + 1 + torch.arange(self.sizes.tiles(choice.rows))) * choice.rows - 1

    def units(self, test: Boolean, choice: Choice, shape: tuple[int, ...]) -> Tensor:
        """Units any token of which passes, for any head of a list: bool [B, lists, row tiles, units]."""
        batch, lists, tiles, unit = shape
        around = self.around()
        symbols = {**around.symbols, "q": self.last_rows(choice).view(1, 1, -1, 1)}
        passed = evaluate(test, Environment(symbols, around.tables, around.heads))
        tokens = self.sizes.tokens
        passed = passed.expand(batch, around.heads, tiles, tokens).reshape(batch, lists, -1, tiles, tokens).any(2)
        return torch.stack([part.any(3) for part in torch.split(passed, unit, 3)], 3) if tokens else passed

    def kl(self, kl: Kl) -> Tensor:
        """[B, heads, row tiles], over the units that the target's softmax sees."""
        _, seen = self.pooled(kl.target)
        return divergence(*(self.log_odds(side, seen) for side in (kl.target, kl.score)))

    def log_odds(self, side: Pooled, seen: Tensor) -> Tensor:
        """A pooled score as logits, -inf outside of `seen`."""
        values, known = self.pooled(side)
        known = known & seen & (values > 0) if side.score.probability else known & seen
        positive = torch.where(known, values, 1.0)
        return torch.where(known, torch.log(positive) if side.score.probability else positive, -torch.inf)


def _derived(found: Input) -> bool:
    """Whether it is computed from all the keys before."""
    compressed_stream = isinstance(found, Stream) and found.compress is not None
    return compressed_stream or (isinstance(found, Choice) and found.selected)
