"""Random set expressions as `.spat` text, each with the mask it means, worked out here on plain tensors.

Nothing of the compiler is used for the masks but the hash behind `random`, so that text and mask are two accounts of
one set. Values of tensors, lists and sizes are small, so that every case of a word meets every other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spdsl.ir import rule
from spdsl.ir.pattern import Choice
from spdsl.oracle.sets import drawn

HEADER = """
    param three = 3, five = 5
    doc = tensor(token, int)
    mark = tensor(token, bool)
    style = tensor(head, int)
    team = tensor(kv_head, int)
    level = tensor(head, token)
    pair = tensor(query, token, int)
    near = tensor(query, int)
    start = tensor(int)
    units = given(unit = 3, rows = 4)
    tiles_in = given(unit = 4, rows = 8, share = head)
    dice = random(2, unit = 4, rows = 4, seed = 3)
"""


@dataclass(frozen=True)
class Setting:
    """One call: sizes, and the values of everything that expressions read. The last query stands at the last key."""

    rows: int
    keys: int
    causal: bool
    seed: int
    heads: int = 4
    kv_heads: int = 2

    @property
    def origin(self) -> int:
        return self.keys - self.rows

    @property
    def q(self) -> Tensor:
        return (self.origin + torch.arange(self.rows)).view(1, -1, 1)

    @property
    def k(self) -> Tensor:
        return torch.arange(self.keys).view(1, 1, -1)

    @property
    def h(self) -> Tensor:
        return torch.arange(self.heads).view(-1, 1, 1)

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """The arguments for `HEADER`, batch 1."""
        make = torch.Generator().manual_seed(self.seed)

        def whole(most: int, *shape: int) -> Tensor:
            return torch.randint(0, most, shape, generator=make)

        def lists(heads: int, unit: int, rows: int) -> Tensor:
            tiles = (self.keys - 1) // rows - self.origin // rows + 1
            return whole(-(-self.keys // unit) + 1, 1, heads, tiles, 3) - 1

        return {
            "doc": whole(3, 1, self.keys).sort(1).values + 1,
            "mark": whole(5, 1, self.keys) == 0,
            "style": whole(2, self.heads),
            "team": whole(3, self.kv_heads),
            "level": whole(5, 1, self.heads, self.keys).double() / 4,
            "pair": whole(4, 1, self.rows, self.keys),
            "near": whole(12, 1, self.rows),
            "start": whole(20, 1),
            "units": lists(self.kv_heads, 3, 4),
            "tiles_in": lists(self.heads, 4, 8),
        }

    def token(self, name: str, index: Tensor) -> Tensor:
        """[M] at any index, 0 outside."""
        data = self.values[name][0].long()
        inside = (index >= 0) & (index < self.keys)
        return torch.where(inside, data[index.clamp(0, self.keys - 1)], 0)

    def pair(self, index: Tensor) -> Tensor:
        """[N, M] of the rows of this call, 0 outside of the keys."""
        data = self.values["pair"][0]
        row, inside = torch.arange(self.rows).view(-1, 1), (index >= 0) & (index < self.keys)
        return torch.where(inside, data[row, index.clamp(0, self.keys - 1)], 0)

    def listed(self, name: str, unit: int, rows: int) -> Tensor:
        lists = self.values[name][0]
        heads = self.h // (self.heads // lists.shape[0])
        own = lists[heads, self.q // rows - self.origin // rows]  # [H, N, 1, 3]
        return (own == (self.k // unit).unsqueeze(-1)).any(-1)

    def dice(self) -> Tensor:
        choice = Choice("dice", rule.Drawn(rule.Size.of(2), 3), 4, 4, "head")
        first, last = self.origin // 4, (self.keys - 1) // 4
        found = drawn(choice, self.heads, first, last - first + 1, -(-self.keys // 4), self.causal).data[0]
        return found[self.h, self.q // 4 - first, self.k // 4]


Mask = Callable[[Setting], Tensor]


@dataclass(frozen=True)
class Drawn:
    """A set as text and its mask, bool broadcastable to [H, N, M]. `static`: reads nothing. `exact`: no `cover`."""

    text: str
    mask: Mask
    static: bool = True
    exact: bool = True

    def seen(self, s: Setting) -> Tensor:
        """The mask with `causal`."""
        found = self.mask(s).expand(s.heads, s.rows, s.keys)
        return found & (s.k <= s.q) if s.causal else found


Number = tuple[str, Callable[[Setting], Tensor], bool]  # text, value, static


class Maker:
    """Draws sets from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def small(self, least: int = 1, most: int = 9) -> int:
        return self.rng.randint(least, most)

    def written(self, n: int) -> str:
        """A size as a number, a parameter or arithmetic."""
        ways = [str(n), str(n), f"three + {n - 3}" if n >= 3 else f"three - {3 - n}", f"{2 * n} / 2"]
        ways += ["five"] * 2 * (n == 5) + ["three"] * 2 * (n == 3)
        return self.rng.choice(ways)

    def set(self, depth: int) -> Drawn:
        if depth == 0:
            return self.word()
        kind = self.rng.choice(["|", "|", "&", "-", "~", "word"])
        if kind == "word":
            return self.word()
        left = self.set(depth - 1)
        if kind == "~":
            return Drawn(f"~({left.text})", lambda s: ~left.mask(s), left.static, left.exact)
        right = self.set(depth - 1)
        join = {"|": torch.Tensor.__or__, "&": torch.Tensor.__and__, "-": lambda a, b: a & ~b}[kind]
        static, exact = left.static and right.static, left.exact and right.exact
        return Drawn(f"({left.text} {kind} {right.text})", lambda s: join(left.mask(s), right.mask(s)), static, exact)

    def word(self) -> Drawn:
        names = (
            "sink sliding sliding ahead first last dilated strided fixed open all where where where given random cover"
        )
        return getattr(self, f"_{self.rng.choice(names.split())}")()

    def _all(self) -> Drawn:
        return Drawn("all", lambda s: s.k >= 0)

    def _sink(self) -> Drawn:
        n = self.small()
        return Drawn(f"sink({self.written(n)})", lambda s: s.k < n)

    def _sliding(self) -> Drawn:
        n = self.small(most=14)
        return Drawn(f"sliding({self.written(n)})", lambda s: (s.q - s.k >= 0) & (s.q - s.k < n))

    def _ahead(self) -> Drawn:
        n, m = self.small(), self.small(0, 6)
        return Drawn(f"sliding({n}, ahead = {m})", lambda s: (s.q - s.k >= -m) & (s.q - s.k < n))

    def _first(self) -> Drawn:
        n, u = self.small(most=3), self.small(most=6)
        return Drawn(f"first({n}, unit = {self.written(u)})", lambda s: s.k // u < n)

    def _last(self) -> Drawn:
        n, u, m = self.small(most=3), self.small(most=5), self.small(0, 2)
        r = self.rng.choice([1, u, 2 * u, *(d for d in range(1, u + 1) if u % d == 0)])

        def mask(s: Setting) -> Tensor:
            own = (s.q // r * r + r - 1) // u  # the unit of the tile's last query
            return (own - n < s.k // u) & (s.k // u <= own + m)

        return Drawn(f"last({n}, unit = {u}, ahead = {m}, rows = {r})", mask)

    def _dilated(self) -> Drawn:
        n, t = self.small(most=5), self.small(most=4)
        return Drawn(f"dilated({n}, {t})", lambda s: (s.q >= s.k) & (s.q - s.k < n * t) & ((s.q - s.k) % t == 0))

    def _strided(self) -> Drawn:
        t = self.small(most=6)
        return Drawn(f"strided({t})", lambda s: (s.q - s.k) % t == 0)

    def _fixed(self) -> Drawn:
        t = self.small(most=8)
        c = self.small(most=t)
        return Drawn(f"fixed({t}, {c})", lambda s: (s.q // t == s.k // t) | (s.k % t >= t - c))

    def _open(self) -> Drawn:
        u = self.small(most=7)
        return Drawn(f"open({u})", lambda s: ((s.q + 1) // u * u <= s.k) & (s.k <= s.q))

    def _given(self) -> Drawn:
        name, unit, rows = self.rng.choice([("units", 3, 4), ("tiles_in", 4, 8)])
        return Drawn(name, lambda s: s.listed(name, unit, rows), static=False)

    def _random(self) -> Drawn:
        return Drawn("dice", lambda s: s.dice(), static=False)

    def _cover(self) -> Drawn:
        inner = self.set(1)
        while not inner.static or not inner.exact:
            inner = self.set(1)
        r, u = self.small(most=6), self.small(most=6)
        return Drawn(f"cover({inner.text}, rows = {r}, unit = {u})", inner.mask, exact=False)

    def _where(self) -> Drawn:
        text, mask, static = self.condition(self.rng.choice([0, 0, 1]))
        return Drawn(f"where({text})", mask, static)

    def condition(self, depth: int) -> tuple[str, Mask, bool]:
        if depth:
            a, b = self.condition(depth - 1), self.condition(depth - 1)
            sign = self.rng.choice("|&~")
            if sign == "~":
                return f"~({a[0]})", lambda s: ~a[1](s), a[2]
            join = torch.Tensor.__or__ if sign == "|" else torch.Tensor.__and__
            return f"({a[0]}) {sign} ({b[0]})", lambda s: join(a[1](s), b[1](s)), a[2] and b[2]
        return self.rng.choice([self._compare, self._compare, self._fraction, self._steps, self._tensors])()

    def _compare(self) -> tuple[str, Mask, bool]:
        (left, a, still), (right, b, quiet) = self.number(self.small(0, 2)), self.number(self.small(0, 1))
        sign, test = self._relation()
        return f"{left} {sign} {right}", lambda s: test(a(s), b(s)), still and quiet

    def _relation(self) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
        tests = {"<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne}
        sign = self.rng.choice(list(tests))
        return sign, tests[sign]

    def _fraction(self) -> tuple[str, Mask, bool]:
        a, b, c = self.small(0), self.small(), self.small()
        sign, test = self._relation()
        return f"(q + {a}) / {b} {sign} k / {c}", lambda s: test((s.q + a) * c, s.k * b), True

    def _steps(self) -> tuple[str, Mask, bool]:
        a, b, c, d = self.small(0), self.small(), self.small(most=3), self.small(-3, 3)
        sign, test = self._relation()
        text = (
            f"(q + {a}) // {b} {sign} {c} * (k // {b}) + {d}"
            if d >= 0
            else f"(q + {a}) // {b} {sign} {c} * (k // {b}) - {-d}"
        )
        return text, lambda s: test((s.q + a) // b, c * (s.k // b) + d), True

    def _tensors(self) -> tuple[str, Mask, bool]:
        n = self.small(most=4)
        sign, test = self._relation()
        ways: list[tuple[str, Mask]] = [
            ("doc[k] == doc[q]", lambda s: s.token("doc", s.k) == s.token("doc", s.q)),
            (f"doc[k] {sign} doc[q // {n}]", lambda s: test(s.token("doc", s.k), s.token("doc", s.q // n))),
            (f"doc[k - {n}] {sign} 2", lambda s: test(s.token("doc", s.k - n), torch.tensor(2))),
            (f"doc[q - k] {sign} 1", lambda s: test(s.token("doc", s.q - s.k), torch.tensor(1))),
            ("mark[k]", lambda s: s.token("mark", s.k) != 0),
            ("mark[q]", lambda s: s.token("mark", s.q) != 0),
            ("~mark[k]", lambda s: s.token("mark", s.k) == 0),
            (f"style[h] {sign} 1", lambda s: test(s.values["style"][s.h], torch.tensor(1))),
            (f"team[h] {sign} 1", lambda s: test(s.values["team"][s.h // (s.heads // s.kv_heads)], torch.tensor(1))),
            ("level[h][k] > 0.5", lambda s: s.values["level"][0][s.h, s.k] > 0.5),
            (f"pair[q][k] {sign} {n}", lambda s: test(s.pair(s.k), torch.tensor(n))),
            (f"pair[q][q - k] {sign} pair[q][k]", lambda s: test(s.pair(s.q - s.k), s.pair(s.k))),
            (f"q - k {sign} near[q]", lambda s: test(s.q - s.k, s.values["near"][0].view(-1, 1))),
            (f"q - k {sign} start", lambda s: test(s.q - s.k, s.values["start"][0])),
            (f"k {sign} start + {n}", lambda s: test(s.k, s.values["start"][0] + n)),
            (f"2 * k {sign} length + {n}", lambda s: test(2 * s.k, torch.tensor(s.keys + n))),
            (f"q - k < {n} * (h + 1)", lambda s: s.q - s.k < n * (s.h + 1)),
        ]
        text, mask = self.rng.choice(ways)
        read = ("doc", "mark", "style", "team", "level", "start", "pair", "near")
        return text, mask, not any(name in text for name in read)

    def number(self, depth: int) -> Number:
        if depth == 0:
            n = self.small(0)
            atoms: list[Number] = [
                ("q", lambda s: s.q, True), ("k", lambda s: s.k, True), ("q", lambda s: s.q, True),
                ("k", lambda s: s.k, True), ("h", lambda s: s.h, True), (str(n), lambda s: torch.tensor(n), True),
                ("length", lambda s: torch.tensor(s.keys), True), ("doc[k]", lambda s: s.token("doc", s.k), False),
                ("doc[q]", lambda s: s.token("doc", s.q), False),
                (f"pair[q][k - {n}]", lambda s: s.pair(s.k - n), False),
            ]  # fmt: skip
            return self.rng.choice(atoms)
        (left, a, still), n = self.number(depth - 1), self.small()
        ways: list[Number] = [
            (f"({left}) // {n}", lambda s: a(s) // n, still),
            (f"({left}) % {n}", lambda s: a(s) % n, still),
            (f"abs({left} - {n})", lambda s: (a(s) - n).abs(), still),
            (f"{n} * ({left})", lambda s: n * a(s), still),
            (f"-({left}) + {n}", lambda s: n - a(s), still),
        ]
        right, b, quiet = self.number(0)
        both = still and quiet
        ways += [
            (f"({left}) - {right}", lambda s: a(s) - b(s), both),
            (f"({left}) + {right}", lambda s: a(s) + b(s), both),
            (f"min({left}, {right})", lambda s: torch.minimum(a(s), b(s)), both),
            (f"max({left}, {right})", lambda s: torch.maximum(a(s), b(s)), both),
            (f"({left}) * ({right})", lambda s: a(s) * b(s), both),
        ]
        return self.rng.choice(ways)


def setting(seed: int) -> Setting:
    """Sizes for one seed: a third with as many queries as keys, some with more queries than keys, some with one."""
    rng = random.Random(seed)
    keys = rng.randint(1, 44)
    rows = rng.choice([keys, keys, rng.randint(1, keys), 1, keys + rng.randint(1, 6)])
    return Setting(rows, keys, rng.random() < 0.5, seed)
