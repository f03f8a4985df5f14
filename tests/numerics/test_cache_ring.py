"""A cache that keeps the first tokens and a window: bounded bytes, and the numbers of all tokens."""

from __future__ import annotations

import pytest
import torch

from tests.module.host_reads import no_host_reads
from tests.numerics.conftest import Engine
from tests.numerics.events import NAMES, ring_cache, ring_events
from tests.numerics.patterns import pattern_of

BODIES = {
    "sink and window": "causal return attend(first(4) | sliding(20))",
    "window": "causal return attend(sliding(33))",
    "two softmaxes": "causal near = attend(sliding(9)) far = attend(first(18) - sliding(9)) return merge(near, far)",
}


@pytest.mark.parametrize("name", BODIES)
def test_any_sequence_of_events(cpu: Engine, name: str) -> None:
    for seed in range(3):
        events = ring_events(cpu(BODIES[name]), pattern_of(BODIES[name]), 170, seed)
        events.run(40, [*NAMES, "decode", "prefill", "prefill"])


def test_any_sequence_of_events_with_kernels(kernels: Engine) -> None:
    body = BODIES["sink and window"]
    events = ring_events(kernels(body), pattern_of(body), 170, 1)
    events.run(5, ["append", "prefill"])
    for change in ("truncate", "select", "move", "reset", "copy"):
        events.run(2, ["append"])
        events.run(1, [change])
        events.run(2, ["decode", "prefill"])


@pytest.mark.parametrize("name", BODIES)
def test_bytes_do_not_grow(cpu: Engine, name: str) -> None:
    """Ten times the tokens that there is room for."""
    module, pattern = cpu(BODIES[name]), pattern_of(BODIES[name])
    events = ring_events(module, pattern, 4096, 0)
    before = events.cache.kept()
    stored = events.cache.ring.pages * 16
    assert all(
        before[state].shape[0] == 2 * events.cache.ring.pages + 1 for state in before if state[:2] in ("k.", "v.")
    )
    while len(events.held[0]) < 10 * stored:
        events.call(None, None, [12, 12], "dense")
    events.run(3, ["decode"])
    assert events.cache.kept() == before


def test_what_a_ring_refuses(cpu: Engine) -> None:
    module = cpu(BODIES["sink and window"])
    cache = ring_cache(module, 2, 400)
    x = torch.zeros(2, 1, 13, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^k: expected at most 12 tokens at once"):
        module.prefill(x, x, x, cache)
    for _ in range(4):
        cache.append(x[:, :, :10], x[:, :, :10])
    for lengths in (27, [40, 27]):
        with pytest.raises(ValueError, match=r"^lengths: expected numbers from 28 on"):
            cache.truncate(lengths)
    cache.truncate([30, 32])
    for lengths in (27, [28, 27], torch.tensor([28, 27]), torch.tensor([-1, 40])):
        with pytest.raises(ValueError, match=r"^lengths: expected numbers from "):
            cache.truncate(lengths)
    assert cache.lengths.tolist() == [30, 32]
    cache.truncate(torch.tensor([28, 30]))
    assert cache.lengths.tolist() == [28, 30]
    cache.reset([0])
    cache.append(x[:, :, :10], x[:, :, :10])
    cache.truncate(torch.tensor([2, 28]))
    assert cache.lengths.tolist() == [2, 28]
    cache.lengths.add_(20)  # written by others: who knows how long they have been
    with pytest.raises(ValueError, match=r"^lengths: expected numbers from \[22, 48\] on"):
        cache.truncate(torch.tensor([21, 48]))
    sizes = {"kv_heads": 1, "qk_dim": 16, "v_dim": 16}
    for name, how in (("page", {"page": None}), ("ring", {"ring": 0}), ("ring", {"ring": 2.0})):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            module.Cache(2, 400, **{"ring": 12, **sizes, **how})
    with pytest.raises(TypeError, match="ring"):
        cpu("causal return attend(all)").Cache(2, 400, ring=12, **sizes)


@pytest.mark.interpret
@pytest.mark.parametrize("page", [16, 32])
def test_a_ring_takes_lengths_of_the_device(page: int, kernels: Engine) -> None:
    """Nothing is read: less than a ring holds counts as the least of that, and the rest goes on as before."""
    module = kernels(BODIES["sink and window"])
    sizes = {"kv_heads": 1, "qk_dim": 16, "v_dim": 16, "page": page, "dtype": torch.float64}
    cache, x = module.Cache(2, 400, ring=12, **sizes), torch.randn(2, 1, 40, 16, dtype=torch.float64)
    for first in range(0, 40, 10):
        cache.append(*[x[:, :, first : first + 10]] * 2)
    with no_host_reads():
        cache.truncate(torch.tensor([5, 33]))
        cache.truncate(torch.tensor([0, 30]))
        cache.select(torch.tensor([1, 0, 1]))
        cache.truncate(torch.tensor([33, 0, -5]))
        cache.reset(torch.tensor([False, True, False]))
    assert cache.lengths.tolist() == [30, 0, 28]
    own = torch.stack([x[1, :, 30:34], x[0, :, :4], x[1, :, 28:32]])
    found = module.prefill(own, own, own, cache)
    for row, (source, first) in enumerate(((1, 30), (0, 0), (1, 28))):
        given = x[source : source + 1, :, : first + 4]
        torch.testing.assert_close(found[row : row + 1], module.attention(given, given, given)[:, :, -4:])
