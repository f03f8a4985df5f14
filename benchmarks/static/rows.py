"""One row of the results: where a kernel is from, its code, and what follows from both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.static import bounds
from benchmarks.static.bounds import Cost
from benchmarks.static.code import Code, from_dict
from benchmarks.static.demand import Demand
from spdsl.targets import Target

AGREEMENTS = (1.0, 0.8, 0.5, 0.0)
"""How far neighbouring queries choose alike."""


@dataclass(frozen=True)
class Row:
    of: str
    """`ours`, or whose it is."""
    pattern: str
    """Of ours; of a peer the pattern that it stands beside."""
    kernel: str
    heads: tuple[int, int]
    """Of queries and keys."""
    dims: tuple[int, int]
    dtype: str
    phase: str = "train"
    digest: str = ""
    """Of the text and the configuration of the kernel, or of the peer; empty for recorded figures."""
    also: tuple[str, ...] = ()
    """Other patterns with the same kernel."""
    beside: str = ""
    """The kernel of ours that does what a peer's does."""
    gathers: bool = False
    per_pair: int = 0
    code: Code | None = None
    demand: Demand | None = None
    error: str = ""
    kept: bool = False
    """Of an earlier run: the peer is not at hand in this one."""
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """Figures that were written down once, of a peer that never was at hand."""

    @property
    def form(self) -> str:
        return self.demand.form if self.demand else ""

    @property
    def cost(self) -> Cost | None:
        """Of a multiplied pair."""
        if self.code is None or self.demand is None:
            return None
        return bounds.cost_of(self.code, self.per_pair, self.demand.masked, self.demand.turns)

    def stands_beside(self, ours: Row) -> bool:
        """Of a peer: whether that kernel of ours does the same, in training and in bf16."""
        same = self.beside == ours.kernel and self.pattern in (ours.pattern, *ours.also)
        return same and self.dims == ours.dims and (ours.phase, ours.dtype) == ("train", "bf16")

    def waste(self, agreement: float) -> float:
        """Multiplied pairs for each useful one. Rows of one query, or of queries that chose the unit, waste none."""
        assert self.demand is not None
        return self.demand.waste(1.0 if self.gathers else agreement)

    def bounds(self, agreement: float, target: Target) -> dict[str, float] | None:
        """Seconds at TOKENS tokens."""
        cost, asked = self.cost, self.demand
        if cost is None or asked is None or self.dtype not in ("bf16", "fp16"):
            return None
        return bounds.bounds(cost, asked.useful * self.waste(agreement), asked.moved, target)

    def least(self, target: Target) -> float:
        """Seconds that the call needs whatever the kernel: useful pairs, each product once, or each tensor once."""
        assert self.demand is not None
        products = self.demand.useful * self.demand.per_pair * 2 / target.rate("bf16")
        return max(products, self.demand.moved / target.bandwidth)


def as_dict(row: Row) -> dict[str, Any]:
    found = {name: getattr(row, name) for name in Row.__dataclass_fields__}
    found |= {name: value.as_dict() for name in ("code", "demand") if (value := found[name]) is not None}
    return {name: value for name, value in found.items() if value not in (None, "", (), {}, False, 0)}


def from_data(data: Mapping[str, Any]) -> Row:
    """KeyError or TypeError for data of another form."""
    found = dict(data)
    found |= {name: tuple(found.get(name, ())) for name in ("heads", "dims", "also")}
    if "code" in found:
        found["code"] = from_dict(found["code"])
    if "demand" in found:
        found["demand"] = Demand(**found["demand"])
    return Row(**found)
