"""The vote against plain loops, what it saves, and bugs of it that are seen."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import spdsl
from tests.library import broken, home
from tests.numerics.cases import Inputs, Shape
from tests.numerics.conftest import Engine
from tests.numerics.patterns import module_of, pattern_of, text_of
from tests.numerics.test_skip import ORDERS, uneven

RULE = "rows = 16, unit = 16"
OVER = f"causal long = attend(all, skip = below(5, {RULE})) return long, kept(long) if train"
PLAIN = f"causal long = attend(all, skip = below(0.3, {RULE})) return long, kept(long) if train"
RUNS = f"causal long = attend(all, skip = below(0.9, {RULE}, restart = 48)) return long, kept(long) if train"


def loops(inputs: Inputs, level: float, restart: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of causal attention that stay, bool [B, H, N, M]; their softmax; tiles kept [B, H, row tiles]."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    (batch, heads, n, dim), group = q.shape, q.shape[1] // k.shape[1]
    stays = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    kept = torch.zeros(batch, heads, -(-n // 16), dtype=torch.int32)
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            key, value = k[b, h // group], v[b, h // group]
            logits = (q[b, h] @ key.T / math.sqrt(dim)).tolist()
            for first in range(0, n, 16):
                rows = range(first, min(first + 16, n))
                top = dict.fromkeys(rows, -math.inf)
                for start in range(0, n, 16):
                    if restart and start % restart == 0:
                        top = dict.fromkeys(rows, -math.inf)
                    seen = {i: logits[i][start : min(start + 16, i + 1)] for i in rows}
                    if all(not own or max(own) < top[i] + math.log(level) for i, own in seen.items()):
                        continue
                    kept[b, h, first // 16] += 1
                    for i, own in seen.items():
                        stays[b, h, i, start : start + len(own)] = True
                        top[i] = max([top[i], *own])
            hidden = torch.tensor(logits, dtype=torch.float64).masked_fill(~stays[b, h], -torch.inf)
            out[b, h] = hidden.softmax(-1) @ value
    return stays, out, kept


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "body, level, restart", [(PLAIN, 0.3, 0), (RUNS, 0.9, 48), (OVER, 1, 0)], ids=["once", "runs", "over 1"]
)
def test_tiles_and_gradients_of_plain_loops(engine: Engine, body: str, level: float, restart: int, order: str) -> None:
    """The same tiles; the output and the gradients of the softmax over what they hold, within 1e-10."""
    inputs = uneven(pattern_of(body), Shape(90, 90, 1, 4, 2, seed=3), order)
    stays, wanted, kept = loops(inputs, level, restart)
    asked = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, counts = engine(body).attention(**asked)
    assert torch.equal(counts[..., 0], kept)
    assert int(kept.sum()) < 4 * 21 or order == "rising"
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    plain = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    k, v = (plain[name].repeat_interleave(2, 1) for name in "kv")
    share = (plain["q"] @ k.mT / 4).masked_fill(~stays, -torch.inf).softmax(-1)
    ((share @ v) * weights).sum().backward()
    for name, x in asked.items():
        torch.testing.assert_close(x.grad, plain[name].grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"d{n}: {m}")


def published(q: Tensor, k: Tensor, v: Tensor, scale_factor: float, rows: int, unit: int) -> Tensor:
    """BLASST as it was published (arXiv 2512.12087, algorithm 1), one head: lambda = scale factor / length.

    A tile is skipped if of all its rows (maximum of the tile) - (maximum with it) < log(lambda).
    """
    n, level = len(q), math.log(min(1.0, scale_factor / len(k)))
    origin = len(k) - n
    out = torch.zeros(n, v.shape[1], dtype=q.dtype)
    for first in range(-(origin % rows), n, rows):
        own = torch.arange(max(0, first), min(n, first + rows))
        m = torch.full((len(own),), -torch.inf, dtype=q.dtype)
        total, acc = torch.zeros_like(m), torch.zeros(len(own), v.shape[1], dtype=q.dtype)
        for start in range(0, int(own[-1]) + origin + 1, unit):
            keys = torch.arange(start, min(start + unit, len(k)))
            s = q[own] @ k[keys].T / math.sqrt(q.shape[1])
            s = s.masked_fill(keys > own[:, None] + origin, -torch.inf)
            local = s.amax(1)
            new = torch.maximum(m, local)
            if bool(((local - new < level) | (local == -torch.inf)).all()):
                continue
            p, decay = torch.exp(s - new[:, None]), torch.exp(m - new)
            total, acc, m = total * decay + p.sum(1), acc * decay[:, None] + p @ v[keys], new
        out[own] = acc / total[:, None]
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_blasst_is_the_published_rule(cpu: Engine, order: str) -> None:
    """Prefill in tiles of rows, and a step."""
    module = cpu("blasst", restart=4096)
    inputs = uneven(pattern_of("blasst"), Shape(150, 150, 1, 4, 2), order)
    q, k, v = (inputs[name][0] for name in "qkv")
    out = module.reference(**inputs, phase="prefill")[0]
    step = module.reference(**{**inputs, "q": inputs["q"][:, :, -1:]}, phase="decode")[0]
    for h in range(4):
        torch.testing.assert_close(out[h], published(q[h], k[h // 2], v[h // 2], 20, 16, 16))
        torch.testing.assert_close(step[h], published(q[h, -1:], k[h // 2], v[h // 2], 20, 1, 16))


@pytest.mark.parametrize("capacity", [160, 640, 4096])
def test_splits_change_nothing(kernels: Engine, capacity: int) -> None:
    """A larger cache has more programs for a step: tiles are the same, and outputs but for the order of sums."""
    body = "causal step = attend(all, skip = below(0.4, unit = 16, restart = 32)) return step, kept(step) if decode"
    module = kernels(body)
    inputs = uneven(pattern_of(body), Shape(150, 150, 1, 4, 2))
    cache = module.Cache(1, capacity, kv_heads=2, qk_dim=16, v_dim=16, page=16, dtype=torch.float64)
    cache.append(inputs["k"][:, :, :-1], inputs["v"][:, :, :-1])
    last = {name: x[:, :, -1:].contiguous() for name, x in inputs.items()}
    out, counts = module.decode(**last, cache=cache)
    wanted, wanted_counts = module.reference(**{**inputs, "q": last["q"]}, phase="decode")
    torch.testing.assert_close(out, wanted)
    assert torch.equal(counts, wanted_counts)
    assert counts[..., 0].sum() < counts[..., 1].sum()


def values_loaded(module: ModuleType, inputs: Inputs, patch: pytest.MonkeyPatch) -> tuple[int, Tensor]:
    """How often the forward loads a block of values, and what it counts of tiles."""
    loads, load = [0], module.rt.load_values

    def counted(*args: Any) -> Any:
        loads[0] += 1
        return load(*args)

    patch.setattr(module.rt, "load_values", counted)
    _, counts = module.attention(**inputs)
    return loads[0], counts


def test_values_of_kept_tiles_alone_are_loaded(kernels: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    module = kernels(PLAIN)
    loads, counts = values_loaded(module, uneven(pattern_of(PLAIN), Shape(90, 90, 1, 4, 2, seed=3)), monkeypatch)
    assert loads == int(counts[..., 0].sum()) < int(counts[..., 1].sum())


def test_products_are_those_of_kept_tiles(kernels: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of all visited tiles, and values of the kept ones: two products of 16 x 16 x 16 for each."""
    module = kernels(PLAIN)
    inputs = uneven(pattern_of(PLAIN), Shape(90, 90, 1, 4, 2, seed=3))
    found = {"dot": 0, "dot_rows": 0}
    file = home(module, "dot_rows")

    def counting(name: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            found[name] += 1
            return function(*args)

        return run

    adding = home(module, "add_values")
    monkeypatch.setattr(adding, "dot", counting("dot", adding.dot))
    monkeypatch.setattr(module.rt, "dot_rows", counting("dot_rows", file.dot_rows))
    _, counts = module.attention(**inputs)
    assert found == {"dot": int(counts[..., 0].sum()), "dot_rows": int(counts[..., 1].sum())}


class Bug(NamedTuple):
    what: str
    old: str
    new: str
    body: str = PLAIN
    level: float = 0.3
    restart: int = 0


BUGS = [
    Bug("a padding row votes to keep", "tl.where(inside, votes, 0)", "tl.where(inside, votes, 2)"),
    Bug("a level above 1 asks for more than the maximum", "tl.minimum(level, 1.0)", "level", OVER, 1),
    Bug("one row that is below drops a tile", "tl.max(votes[:, None])", "tl.min(votes[:, None])"),
    Bug("each tile is a run", "tl.where(own_run == run, top", "tl.where(own_run < 0, top", RUNS, 0.9, 48),
    Bug("dQ and dK read the bit of the tile before", "tile = key // UNIT", "tile = (key + UNIT) // UNIT"),
    Bug("bits of a word are lost", "tl.where(own == held, word, 0)", "tl.where(own == held, 0, 0)"),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_bug_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    module = kernels(broken(spdsl.compile(text_of(bug.body)).text, bug.old, bug.new, tmp_path))
    inputs = uneven(pattern_of(bug.body), Shape(90, 90, 1, 4, 2, seed=3))
    _, wanted, kept = loops(inputs, bug.level, bug.restart)
    asked = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, counts = module.attention(**asked)
    out.sum().backward()
    right = module_of(bug.body)
    again = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    right.attention(**again)[0].sum().backward()
    same = torch.equal(counts[..., 0], kept) and torch.allclose(out, wanted, rtol=1e-10, atol=1e-10)
    assert not (same and all(torch.allclose(x.grad, again[name].grad, rtol=1e-9) for name, x in asked.items()))


def test_values_loaded_too_early_are_seen(kernels: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = "        v0, v1 = rt.load_values(keys, block, True, C)\n"
    text = spdsl.compile(text_of(PLAIN)).text
    vote = "    if votes == 2:\n"
    module = kernels(broken(text.replace(load, ""), vote, f"{load[4:]}{vote}", tmp_path))
    loads, counts = values_loaded(module, uneven(pattern_of(PLAIN), Shape(90, 90, 1, 4, 2, seed=3)), monkeypatch)
    assert loads == int(counts[..., 1].sum()) > int(counts[..., 0].sum())
