"""NaN and infinities in tensors that a test reads: a comparison with NaN is false, but for `!=`, and no other pair
is lost. Random tests against masks that torch makes of the same comparisons, on both paths.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import pytest
import torch
from torch import Tensor

from tests.numerics.cases import parts_of
from tests.numerics.conftest import Engine

HEADER = (
    "a = tensor(token) b = tensor(token) c = tensor(head) s = tensor() table = tensor(head, token) "
    "pair = tensor(query, token) own = tensor(query)"
)
HEADS = 2
RELATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "<": torch.lt, "<=": torch.le, ">": torch.gt, ">=": torch.ge, "==": torch.eq, "!=": torch.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Values by name; positions and heads as [N, 1], [1, N] and [H, 1, 1]."""

    values: dict[str, Tensor]
    q: Tensor
    k: Tensor
    h: Tensor

    def token(self, name: str, at: Tensor) -> Tensor:
        size = self.values[name].shape[1]
        read = self.values[name][0][at.clamp(0, size - 1)]
        return torch.where((at >= 0) & (at < size), read, 0.0)


Number = tuple[str, Callable[[Setting], Tensor]]
Mask = tuple[str, Callable[[Setting], Tensor]]

READS: list[Number] = [
    ("a[k]", lambda x: x.token("a", x.k)),
    ("a[q]", lambda x: x.token("a", x.q)),
    ("b[k]", lambda x: x.token("b", x.k)),
    ("b[q - 1]", lambda x: x.token("b", x.q - 1)),
    ("table[h][k]", lambda x: x.values["table"][0][x.h, x.k]),
    ("pair[q][k]", lambda x: x.values["pair"][0]),
    ("pair[q][k - 2]", lambda x: torch.nn.functional.pad(x.values["pair"][0], (2, 0))[:, :-2]),
    ("own[q]", lambda x: x.values["own"][0][:, None]),
    ("c[h]", lambda x: x.values["c"][x.h]),
    ("s", lambda x: x.values["s"]),
]


def number(make: random.Random) -> Number:
    """A read, or two different ones joined: of one and the same, `x - x` is 0 before anything is computed."""
    (left, first) = make.choice(READS[:8])  # of each tile: Triton's interpreter keeps a single truth as a number
    (right, second) = make.choice([read for read in READS if read[0] != left])
    n = make.randint(1, 3)
    ways: list[Number] = [
        (left, first),
        (left, first),
        (f"-{left} + {n}", lambda x: n - first(x)),
        (f"abs({left} - {n})", lambda x: (first(x) - n).abs()),
        (f"{left} / {n}", lambda x: first(x) / n),
        (f"{left} % {n}", lambda x: torch.remainder(first(x), n)),
        (f"{left} * k", lambda x: first(x) * x.k),
        (f"{left} + {right}", lambda x: first(x) + second(x)),
        (f"{left} - {right}", lambda x: first(x) - second(x)),
        (f"{left} * {right}", lambda x: first(x) * second(x)),
        (f"min({left}, {right})", lambda x: torch.minimum(*torch.broadcast_tensors(first(x), second(x)))),
        (f"max({left}, {n})", lambda x: torch.maximum(first(x), torch.tensor(float(n)))),
    ]
    return make.choice(ways)


def condition(make: random.Random) -> Mask:
    (left, first), sign = number(make), make.choice(list(RELATIONS))
    right, second = make.choice([number(make), number(make), ("2", lambda x: torch.tensor(2.0)), (left, first)])
    return f"{left} {sign} {right}", lambda x: RELATIONS[sign](first(x), second(x))


def test_of(make: random.Random, depth: int) -> Mask:
    """A set as text and its mask."""
    if depth == 0:
        text, mask = condition(make)
        return f"where({text})", mask
    (left, first), (right, second) = test_of(make, depth - 1), test_of(make, make.randrange(depth))
    return make.choice(
        [
            (f"(all - {left})", lambda x: ~first(x)),
            (f"(~{left})", lambda x: ~first(x)),
            (f"({left} | {right})", lambda x: first(x) | second(x)),
            (f"({left} & {right})", lambda x: first(x) & second(x)),
            (f"({left} & sliding(9))", lambda x: first(x) & (x.q - x.k < 9)),
        ]
    )


test_of.__test__ = False  # type: ignore[attr-defined]


def strewn(size: tuple[int, ...], make: torch.Generator) -> Tensor:
    """Quarters, of which some are NaN or infinite; a stretch of them is free of both."""
    x = torch.randint(-8, 17, size, generator=make, dtype=torch.float64) / 4
    drawn = torch.rand(size, generator=make)
    if x.dim() > 1:
        drawn[..., 17:] = 1.0
    for bound, value in ((0.12, torch.nan), (0.06, torch.inf), (0.03, -torch.inf)):
        x = x.masked_fill(drawn < bound, value)
    return x


def dense(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    logits = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]) @ v, lse


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(i, marks=pytest.mark.full) for i in range(2, 60))])
def test_random_tests(engine: Engine, seed: int) -> None:
    tokens, many = (35, 8) if engine.name == "cpu" else (21, 4)
    make, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sets = [test_of(make, make.choice([0, 1, 1, 2])) for _ in range(many)]
    module = engine(f"{HEADER} causal return {', '.join(f'attend({text})' for text, _ in sets)}")
    q, k, v = (torch.randn(1, HEADS, tokens, 16, generator=generator, dtype=torch.float64) for _ in "qkv")
    sizes = {"a": (1, tokens), "b": (1, tokens), "c": (HEADS,), "s": (1,), "table": (1, HEADS, tokens)}
    sizes |= {"pair": (1, tokens, tokens), "own": (1, tokens)}
    values = {name: strewn(size, generator) for name, size in sizes.items()}
    at = torch.arange(tokens)
    setting = Setting(values, at[:, None], at[None], torch.arange(HEADS)[:, None, None])
    read = {name: x for name, x in values.items() if name in signature(module.attention).parameters}
    answers = parts_of(module.attention(q, k, v, **read, return_lse=True))
    for (text, mask), (out, lse) in zip(sets, answers, strict=True):
        seen = mask(setting).expand(HEADS, tokens, tokens) & (setting.k <= setting.q)
        true_out, true_lse = dense(seen, q, k, v)
        torch.testing.assert_close(lse, true_lse, rtol=1e-10, atol=1e-10, msg=lambda m, text=text: f"{text}: {m}")
        torch.testing.assert_close(out, true_out, rtol=1e-10, atol=1e-10, msg=lambda m, text=text: f"{text}: {m}")


@pytest.mark.parametrize(
    "test, seen",
    [
        ("where(a[k] <= a[q])", [1, 2, 3, 0, 4, 5, 6, 7]),
        ("where(~(a[k] <= a[q]))", [0, 0, 0, 4, 1, 1, 1, 1]),
        ("where(a[k] == a[k])", [1, 2, 3, 3, 4, 5, 6, 7]),
        ("where(a[k] != 0)", [0, 0, 0, 1, 1, 1, 1, 1]),
        ("where(a[k])", [0, 0, 0, 1, 1, 1, 1, 1]),
        ("where(a[k] < 1) | where(a[k] >= 1)", [1, 2, 3, 3, 4, 5, 6, 7]),
        ("where(max(a[k], 1) > 0)", [1, 2, 3, 3, 4, 5, 6, 7]),
        ("where(a[k] % 3 < 5)", [1, 2, 3, 3, 4, 5, 6, 7]),
    ],
)
def test_one_nan_hides_its_own_pairs(engine: Engine, test: str, seen: list[int]) -> None:
    """Keys that each of 8 queries sees, token 3 being NaN: all logits are 0, so the lse counts them."""
    module = engine(f"causal a = tensor(token) return attend({test})")
    a, x = torch.zeros(1, 8), torch.zeros(1, 1, 8, 16)
    a[0, 3] = torch.nan
    _, lse = module.attention(x, x, x, a, return_lse=True)
    assert lse.exp().round().flatten().tolist() == seen


def test_nan_of_a_pair_hides_that_pair(engine: Engine) -> None:
    module = engine("pair = tensor(query, token) return attend(where(~(pair[q][k] > 0)))")
    pair, x = torch.ones(1, 8, 8), torch.zeros(1, 1, 8, 16)
    pair[0, 3, 5] = pair[0, 3, 6] = pair[0, 6, 0] = torch.nan
    _, lse = module.attention(x, x, x, pair, return_lse=True)
    assert lse.exp().round().flatten().tolist() == [0, 0, 0, 2, 0, 0, 1, 0]
