"""entries_text: what the templates print of a compressed stream."""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.codegen.softmax_text import cells_of
from spdsl.ir.pattern import Stream
from spdsl.ir.pool import Pool
from spdsl.primitives.pools import POOLS


@dataclass(frozen=True, slots=True)
class EntriesText:
    """A compressed stream: where its keys and values come from."""

    stream: Stream
    source: Stream
    logits: Stream | None
    weights: tuple[tuple[str, ...], ...]  # of keys, of values
    has_values: bool  # some result reads them
    kept: bool  # by a cache

    @property
    def name(self) -> str:
        return self.stream.name

    @property
    def pool(self) -> Pool:
        assert self.stream.compress is not None
        return POOLS[self.stream.compress.by]

    @property
    def cells(self) -> str:
        return cells_of(self.stream.grid)

    @property
    def sides(self) -> tuple[tuple[str, str, str, str, tuple[str, ...]], ...]:
        """(k or v, argument, argument of the source, of the logits, weights) of what is computed."""
        return tuple(self._side(side) for side in "kv"[: 1 + self.has_values])

    def _side(self, side: str) -> tuple[str, str, str, str, tuple[str, ...]]:
        logits = ""
        if self.logits is not None:
            logits = (self.logits.value_argument if side == "v" else None) or self.logits.key_argument
        made = (self.stream.key_argument, self.source.key_argument)
        if side == "v":
            made = (self.stream.value_argument or "", self.source.value_argument or "")
        return side, *made, logits, self.weights[side == "v"]
