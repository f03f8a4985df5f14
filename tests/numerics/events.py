"""Random sequences of everything that may happen to a cache, beside a model of it: a list of tokens for each row.

After each call the answers are those of the meaning on the row's own tokens, whatever happened before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from types import ModuleType
from typing import Any

import torch

from spdsl.ir.pattern import Choice, Pattern, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle import dense
from tests.numerics.cases import Found, Inputs, Shape, assert_same, inputs_of, nan_cache, parts_of

POOL = 400  # tokens of which all sequences are made, each used once


@dataclass
class Events:
    """A cache and its model. `inputs` are tokens in a row; a sequence is a list of their numbers."""

    module: ModuleType
    pattern: Pattern
    inputs: Inputs
    cache: Any
    random: Random
    held: list[list[int]]
    used: int = 0
    shape: Shape = field(default_factory=Shape)
    max_seqlen: bool = False  # whether packed calls must say it
    log: list[str] = field(default_factory=list)

    def fresh(self, counts: Sequence[int]) -> list[list[int]]:
        """New tokens for each sequence of a call."""
        found = []
        for count in counts:
            self.used = self.used if self.used + count <= POOL else 0
            found.append(list(range(self.used, self.used + count)))
            self.used += count
        return found

    def some_rows(self) -> list[int] | None:
        rows = self.random.sample(range(len(self.held)), self.random.randint(1, len(self.held)))
        return rows if self.random.random() < 0.5 else None

    def keep(self, row: int, tokens: list[int]) -> int:
        """Appends to the model; -> how many find room."""
        kept = min(len(tokens), self.cache.capacity - len(self.held[row]))
        self.held[row] += tokens[:kept]
        return kept

    # Calls ---------------------------------------------------------------------------------------------------------

    def decode(self) -> None:
        rows = self.some_rows()
        self.call(self.module.decode, rows, [1] * len(rows if rows is not None else self.held), "dense")

    def prefill(self) -> None:
        self.call(self.module.prefill, *self.several())

    def append(self) -> None:
        self.call(None, *self.several())

    def several(self) -> tuple[list[int] | None, list[int], str]:
        rows, form = self.some_rows(), self.random.choice(["dense", "padded", "packed"])
        sequences = len(rows if rows is not None else self.held)
        counts = [self.random.randint(0, 12) for _ in range(sequences)]
        return rows, [max(counts)] * sequences if form == "dense" else counts, form

    def call(self, step: Callable[..., Any] | None, rows: list[int] | None, counts: list[int], form: str) -> None:
        named = list(range(len(self.held))) if rows is None else rows
        if all(len(self.held[row]) + counts[0] > self.cache.capacity for row in named) and form == "dense":
            return  # refused where the host knows it
        tokens = self.fresh(counts)
        given, places = self.arguments(tokens, form)
        how: dict[str, Any] = (
            {} if rows is None else {"rows": rows if self.random.random() < 0.5 else torch.tensor(rows)}
        )
        if form == "padded":
            how["lengths"] = torch.tensor(counts)
        if form == "packed":
            how["cu_seqlens"] = torch.tensor([0, *counts]).cumsum(0)
            if self.max_seqlen or self.random.random() < 0.5:
                how["max_seqlen"] = max(counts)
        if step is None:
            wanted = {
                *self.pattern_streams(),
                *(name for name in given if name in self.learned() | self.over_tokens().keys()),
            }
            self.cache.append(**{name: x for name, x in given.items() if name in wanted}, **how)
            for row, own in zip(named, tokens, strict=True):
                self.keep(row, own)
            return
        found = parts_of(step(**given, cache=self.cache, return_lse=True, **how))
        for i, (row, own) in enumerate(zip(named, tokens, strict=True)):
            self.check(row, own, [part_of(part, places[i]) for part in found])

    def check(self, row: int, tokens: list[int], found: list[Any]) -> None:
        kept = self.keep(row, tokens)
        for out, lse in found:
            assert (out[:, :, kept:] == 0).all(), "a dropped token has out 0"
            assert (lse[:, :, kept:] == -torch.inf).all(), "a dropped token has lse -inf"
        if kept:
            wanted = dense.results(self.pattern, self.taken([self.held[row]]), "prefill")
            own = [(out[:, :, :kept], lse[:, :, :kept]) for out, lse in found]
            assert_same(Found(own), Found([(out[:, :, -kept:], lse[:, :, -kept:]) for out, lse in wanted]))

    def arguments(self, tokens: list[list[int]], form: str) -> tuple[Inputs, list[tuple[int, slice]]]:
        """The arguments of a call, and where each sequence lies in them: batch row, tokens."""
        longest = max(map(len, tokens))
        if form == "packed":
            ends = [sum(map(len, tokens[:i])) for i in range(len(tokens) + 1)]
            places = [(0, slice(a, b)) for a, b in pairwise(ends)]
            return self.taken([[token for own in tokens for token in own]]), places
        padded = [[0] * (longest - len(own)) + own for own in tokens]
        return self.taken(padded), [(i, slice(longest - len(own), longest)) for i, own in enumerate(tokens)]

    def taken(self, tokens: list[list[int]]) -> Inputs:
        """The inputs of sequences of one length."""
        index, whole = torch.tensor(tokens, dtype=torch.long), self.learned() | self.plain()
        axes = self.over_tokens() | self.of_rows()
        found = {}
        for name, x in self.inputs.items():
            if name in whole:
                found[name] = x
            else:
                axis = axes.get(name, 1)
                found[name] = x[0].movedim(axis, 0)[index].movedim(1, axis + 1).contiguous()
        return found

    def learned(self) -> set[str]:
        return {found.name for found in self.pattern.inputs if isinstance(found, Weight)}

    def over_tokens(self) -> dict[str, int]:
        """Tensors over tokens: which of their axes, beside the batch, that is."""
        found = (x for x in self.pattern.inputs if isinstance(x, TensorInput) and x.by_token)
        return {x.name: x.axes.index("token") for x in found}

    def of_rows(self) -> dict[str, int]:
        """The same of tensors that a call brings for its rows: here each token has its own."""
        found = (x for x in self.pattern.inputs if isinstance(x, TensorInput) and x.by_row)
        return {x.name: x.axes.index("query") for x in found}

    def plain(self) -> set[str]:
        found = (x for x in self.pattern.inputs if isinstance(x, TensorInput))
        return {x.name for x in found if not x.by_token and not x.by_row}

    def pattern_streams(self) -> set[str]:
        return {name for name in self.inputs if name == "k" or name == "v" or name.startswith(("k_", "v_"))}

    # What is kept ----------------------------------------------------------------------------------------------------

    def truncate(self) -> None:
        wanted = [self.random.randint(0, self.cache.capacity) for _ in self.held]
        if self.random.random() < 0.4:
            wanted = [wanted[0]] * len(wanted)
        form = self.random.choice(["number", "list", "tensor"]) if len(set(wanted)) == 1 else "tensor"
        given = {"number": wanted[0], "list": wanted, "tensor": torch.tensor(wanted, dtype=torch.int32)}[form]
        self.cache.truncate(given)
        self.held = [own[:length] for own, length in zip(self.held, wanted, strict=True)]

    def select(self) -> None:
        number = len(self.held) if self.random.random() < 0.6 else self.random.randint(1, 4)
        rows = [self.random.randrange(len(self.held)) for _ in range(number)]
        self.cache.select(rows if self.random.random() < 0.5 else torch.tensor(rows))
        self.held = [list(self.held[row]) for row in rows]

    def reset(self) -> None:
        rows = self.some_rows() or [0]
        self.cache.reset(rows)
        self.held = [[] if i in rows else own for i, own in enumerate(self.held)]

    def move(self) -> None:
        """All states into another cache."""
        states, old = self.cache.export_states(), self.cache
        self.cache = self.other(len(self.held), old.capacity)
        self.cache.import_states(states)

    def other(self, batch: int, capacity: int) -> Any:
        return nan_cache(self.module, replace(self.shape, batch=batch), capacity, self.random.choice([None, 16]))

    def copy(self) -> None:
        self.cache = copy.deepcopy(self.cache)

    def run(self, steps: int, names: Sequence[str]) -> None:
        for _ in range(steps):
            name = self.random.choice(names)
            self.log.append(name)
            getattr(self, name)()
            assert self.cache.lengths.tolist() == [len(own) for own in self.held], self.log
            assert self.cache.batch == len(self.held)


@dataclass
class RingEvents(Events):
    """A cache that keeps what the pattern can see alone, 12 new tokens of a call, and takes as many back."""

    reached: list[int] = field(default_factory=list)  # how long each sequence has been

    def other(self, batch: int, capacity: int) -> Any:
        return ring_cache(self.module, batch, capacity)

    def keep(self, row: int, tokens: list[int]) -> int:
        kept = super().keep(row, tokens)
        self.reached[row] = max(self.reached[row], len(self.held[row]))
        return kept

    def truncate(self) -> None:
        """By one number where all sequences have been about as long; by a tensor each as it has been."""
        wanted = [self.random.randint(max(0, most - 12), most + 1) for most in self.reached]
        if self.random.random() < 0.5 and max(self.reached) - min(map(len, self.held)) < 12:
            wanted = [max(wanted)] * len(wanted)
            self.cache.truncate(self.random.choice([wanted[0], wanted]))
        else:
            self.cache.truncate(torch.tensor(wanted))
        self.held = [own[:length] for own, length in zip(self.held, wanted, strict=True)]

    def select(self) -> None:
        number = len(self.held) if self.random.random() < 0.6 else self.random.randint(1, 4)
        rows = [self.random.randrange(len(self.held)) for _ in range(number)]
        self.cache.select(torch.tensor(rows))
        self.held, self.reached = [list(self.held[row]) for row in rows], [self.reached[row] for row in rows]

    def reset(self) -> None:
        super().reset()
        self.reached = [most if own else 0 for own, most in zip(self.held, self.reached, strict=True)]

    def move(self) -> None:
        """The other cache does not know what was taken back in this one."""
        super().move()
        self.reached = [len(own) + 12 for own in self.held]


def ring_cache(module: ModuleType, batch: int, capacity: int) -> Any:
    sizes = {"kv_heads": 1, "qk_dim": 16, "v_dim": 16, "page": 16, "dtype": torch.float64}
    cache = module.Cache(batch, capacity, ring=12, **sizes)
    for store in (*cache.k.values(), *cache.v.values()):
        store.fill_(torch.nan)
    return cache


def units_of(pattern: Pattern, name: str, capacity: int) -> int:
    """And one past the end."""
    return next(-(-capacity // x.unit) + 1 for x in pattern.inputs if isinstance(x, Choice) and x.name == name)


def part_of(part: Any, place: tuple[int, slice]) -> Any:
    row, tokens = place
    return tuple(x[row : row + 1, :, tokens] for x in part)


CALLS = ["decode", "prefill", "append"]
CHANGES = ["truncate", "select", "reset", "move", "copy"]
NAMES = [*CALLS, *CALLS, *CHANGES, "select", "truncate"]


def ring_events(module: ModuleType, pattern: Pattern, capacity: int, seed: int) -> RingEvents:
    inputs = inputs_of(pattern, Shape(POOL, POOL, 1, seed=seed))
    return RingEvents(
        module,
        pattern,
        inputs,
        ring_cache(module, 2, capacity),
        Random(seed),
        [[], []],
        max_seqlen=True,
        reached=[0, 0],
    )


def events_of(module: ModuleType, pattern: Pattern, shape: Shape, page: int | None, capacity: int, seed: int) -> Events:
    inputs = inputs_of(pattern, Shape(POOL, POOL, 1, shape.heads, shape.kv_heads, shape.qk, shape.v, seed=seed))
    lists = {found.name for found in pattern.inputs if isinstance(found, Choice)}
    for name, x in inputs.items():
        if name in lists:  # units of a query, wherever it stands in a sequence
            inputs[name] = torch.where(x >= 0, x % units_of(pattern, name, capacity), -1)
        elif x.dtype == torch.int64:  # documents that end within a few tokens, whatever their order
            inputs[name] = torch.randint(0, 3, x.shape, generator=torch.Generator().manual_seed(seed))
    cache = nan_cache(module, shape, capacity, page)
    return Events(module, pattern, inputs, cache, Random(seed), [[] for _ in range(shape.batch)], shape=shape)
