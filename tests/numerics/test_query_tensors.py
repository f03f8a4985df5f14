"""Tensors with a `query` axis: what a call brings for its own rows, read by sets and biases on every path."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spdsl.oracle import dense
from tests.numerics.cases import (
    Found,
    Shape,
    assert_same,
    cached,
    checked,
    generated,
    guarded,
    inputs_of,
    nan_cache,
    separate,
)
from tests.numerics.conftest import Engine
from tests.numerics.events import CHANGES, NAMES, events_of
from tests.numerics.patterns import pattern_of
from tests.numerics.test_attend_paged import check, edges, filled

BODIES = {
    "pairs": "causal m = tensor(query, token, bool) return attend(sliding(3) | where(m[q][k]))",
    "heads": "m = tensor(head, query, token, int) return attend(where(m[h][q][k] == 1) | sliding(2, ahead = 1))",
    "token first": "causal m = tensor(token, query, kv_head) return attend(where(m[k][q][h] < 0.3 & q - k < 40))",
    "rows": "causal n = tensor(query, int) c = tensor(query, head) return attend(where(q - k < n[q] | c[q][h] > 0.8))",
    "elsewhere": "causal m = tensor(query, 16, int) return attend(where(k < 9) | where(m[q][k - q + 12] > 20))",
    "two places": "m = tensor(query, token) return attend(where(m[q][k] < m[q][k + 1] & m[q][q] < 0.9))",
    "through a tensor": (
        "causal d = tensor(token, int) m = tensor(query, token, bool) return attend(where(m[q][d[k]] | d[k] == d[q]))"
    ),
    "bias": "causal b = tensor(head, query, token) return attend(sliding(30), bias = b[h][q][k] - 0.125 * (q - k))",
    "bias of everything": "b = tensor(kv_head, query, token) return attend(all, softcap = 2, bias = 2 * b[h][q][k])",
    "with tokens": (
        "causal d = tensor(token, int) m = tensor(query, token, int) s = tensor(head) "
        "return attend(where(d[k] == d[q] & m[q][k] < 2), sink_logit = s)"
    ),
    "several": (
        "causal far = stream() m = tensor(query, token, bool) b = tensor(query, token) "
        "return merge(attend(kv[sliding(9)] | far[where(m[q][k]) - sliding(9)], bias = b[q][k]), "
        "attend(sink(2) - sliding(40)))"
    ),
}
CHOSEN = {
    "chosen": (
        "causal m = tensor(query, token, int) b = tensor(query, token) "
        "c = top_k(2, score = dot(compress(16)), share = sum(group), force = last(1)) "
        "return attend(c & where(m[q][k] < 2), bias = b[q][k])"
    ),
    "chosen by heads": (
        "causal m = tensor(head, query, token, int) c = top_k(2, score = dot(compress(16)), share = head) "
        "return attend(c & where(m[h][q][k] < 2))"
    ),
    "a score with a bias": (
        "causal b = tensor(query, token) a = attend(all, bias = b[q][k]) "
        "c = top_k(2, score = mass(a), share = sum(group), unit = sum(16)) return gate(a, attend(c))"
    ),
    "a divergence": (
        "causal m = tensor(query, token, int) index = stream(value = none) "
        "c = top_k(2, score = dot(compress(16)), share = sum(group), force = last(1)) "
        "fine = attend(c & where(m[q][k] < 2)) return fine, kl(mass(fine), dot(index), share = mean(group))"
    ),
    "a long list": (
        "causal b = tensor(query, token) a = attend(all, bias = b[q][k]) "
        "c = top_k(300, score = mass(a), share = sum(group), unit = sum(16)) return gate(a, attend(c))"
    ),
    "given": "causal g = given() m = tensor(query, token, bool) return attend(g & where(m[q][k]) | sliding(2))",
}
ALL = {**BODIES, **CHOSEN}
GROUPS = {"heads": 6, "kv_heads": 2}


SIZES = [(50, 50), (19, 44), (40, 21)]


def some_of(engine: Engine, taken: bool) -> None:
    """Kernels are interpreted for a part of the product alone."""
    if engine.name == "interpreted" and not taken:
        pytest.skip("pairwise")


@pytest.mark.parametrize("rows, keys", SIZES)
@pytest.mark.parametrize("name", BODIES)
def test_attention(engine: Engine, name: str, rows: int, keys: int) -> None:
    some_of(engine, SIZES.index((rows, keys)) == list(BODIES).index(name) % 3)
    checked(ALL[name], Shape(rows, keys, batch=2, **GROUPS), module=engine(ALL[name]))


@pytest.mark.parametrize("name", CHOSEN)
def test_attention_to_chosen_units(engine: Engine, name: str) -> None:
    some_of(engine, name != "given")
    checked(ALL[name], Shape(50, 50, **GROUPS), module=engine(ALL[name]))


@pytest.mark.parametrize("name", ["pairs", "elsewhere", "bias", "with tokens"])
def test_parts_of_a_sequence(engine: Engine, name: str) -> None:
    """Rows are those of the call, tokens count from position 0 of the whole sequence."""
    some_of(engine, name in ("elsewhere", "bias"))
    checked(ALL[name], Shape(18, 33, batch=2, **GROUPS, offsets=(30, 10)), module=engine(ALL[name]))


@pytest.mark.parametrize("name", [*BODIES, "chosen", "given"])
def test_packed_sequences(engine: Engine, name: str) -> None:
    some_of(engine, name in ("pairs", "bias", "rows", "chosen"))
    ends = [0, 19, 19, 20, 37]
    pattern, module = pattern_of(ALL[name]), engine(ALL[name])
    inputs = {key: guarded(x) for key, x in inputs_of(pattern, Shape(37, 37, **GROUPS)).items()}
    call = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
    assert_same(generated(module, pattern, inputs, call), separate(pattern, inputs, list(pairwise(ends))))


@pytest.mark.parametrize("name", ["pairs", "heads", "rows", "bias", "with tokens", "chosen"])
def test_padded_sequences(engine: Engine, name: str) -> None:
    """Rows are padded in front as q is; tokens are not: they count from position 0."""
    some_of(engine, name == "heads")
    lengths, size = [21, 1, 0, 17], 21
    pattern, module = pattern_of(ALL[name]), engine(ALL[name])
    inputs = inputs_of(pattern, Shape(size, size, batch=4, **GROUPS))
    found = generated(module, pattern, inputs, {"lengths": torch.tensor(lengths)})
    for row, length in enumerate(lengths):
        if not length:
            continue
        own = {key: x[row : row + 1] if len(x) == 4 else x for key, x in inputs.items()}  # sinks and rows of all alike
        wanted = separate(pattern, own, [(size - length, size)])
        tail = [(out[row : row + 1, :, -length:], lse[row : row + 1, :, -length:]) for out, lse in found.parts]
        assert_same(Found(tail), Found(wanted.parts))


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", [*BODIES, "chosen", "chosen by heads", "a score with a bias", "given"])
def test_chunks_and_steps(engine: Engine, name: str, page: int | None) -> None:
    """Each call brings its rows, with as many tokens as it likes."""
    some_of(engine, (name, page) in (("pairs", 16), ("bias", None), ("chosen by heads", 16), ("given", None)))
    shape, pattern = Shape(44, 44, batch=2, **GROUPS), pattern_of(ALL[name])
    if "sliding(2, ahead" in ALL[name] or "k + 1" in ALL[name] or "attend(all, softcap" in ALL[name]:
        pytest.skip("a chunk does not see later ones")
    inputs, module = inputs_of(pattern, shape), engine(ALL[name])
    found = cached(module, pattern, inputs, [23, 19], 2, nan_cache(module, shape, 52, page))
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")))


@pytest.mark.parametrize("name", ["pairs", "rows", "bias", "with tokens", "chosen"])
def test_any_sequence_of_events(cpu: Engine, name: str) -> None:
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    events_of(module, pattern, Shape(batch=3, **GROUPS), 16, 44, 0).run(24, NAMES)


@pytest.mark.parametrize("name", ["with tokens"])
def test_any_sequence_of_events_with_kernels(kernels: Engine, name: str) -> None:
    events = events_of(kernels(ALL[name]), pattern_of(ALL[name]), Shape(batch=2, **GROUPS), 16, 40, 0)
    events.run(3, ["prefill", "append"])
    for change in CHANGES:
        events.run(1, [change])
        events.run(1, ["decode"])


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", ["pairs", "heads", "bias", "with tokens", "rows", "given"])
def test_pages_of_somebody_else(engine: Engine, name: str, single: bool) -> None:
    """Rows are packed as the queries are."""
    some_of(engine, (name, single) in (("pairs", False), ("bias", True), ("given", True)))
    pattern = pattern_of(ALL[name])
    requests = [(33, 1, -1), (16, 0, -1), (0, 1, -1), (15, 1, -1)] if single else edges(16)
    requests = requests if engine.name == "cpu" or single else [(17, 1, -1), (0, 1, -1), (20, 3, 0), (5, 5, -1)]
    check(engine(ALL[name]), pattern, filled(pattern, requests, 16), **({"max_seqlen_q": 1} if single else {}))


@pytest.mark.parametrize("layout", ["dense", "packed", "padded"])
@pytest.mark.parametrize("name", ["with tokens", "bias", "rows"])
def test_reference_in_each_phase(cpu: Engine, name: str, layout: str) -> None:
    """At decode every row is alone, with its own row of the tensor."""
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    batch, call = {
        "dense": (2, {}),
        "packed": (1, {"cu_seqlens": torch.tensor([0, 11, 11, 19])}),
        "padded": (2, {"lengths": torch.tensor([19, 7])}),
    }[layout]
    inputs = inputs_of(pattern, Shape(19, 19, batch=batch, **GROUPS))
    wanted = module.attention(**inputs, **call)
    for phase in ("train", "prefill", "decode"):
        found = module.reference(**inputs, **call, phase=phase)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_ring_keeps_none_of_it(engine: Engine) -> None:
    """The tokens of a row count from position 0, also where the first ones are kept no more."""
    body = "causal b = tensor(query, token) return attend(sink(2) | sliding(9), bias = b[q][k])"
    module, pattern = engine(body), pattern_of(body)
    inputs = inputs_of(pattern, Shape(60, 60))
    cache = module.Cache(1, 60, kv_heads=1, qk_dim=16, v_dim=16, page=16, dtype=torch.float64, ring=20)
    found = cached(module, pattern, inputs, [20, 20, 18], 2, cache)
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")))


def test_entries_of_a_compressed_stream_are_numbered(engine: Engine) -> None:
    body = "causal b = tensor(query, token) return attend(compress(8, 4), bias = b[q][k])"
    checked(body, Shape(37, 37, **GROUPS), module=engine(body))


# Against plain torch: the mask and the bias are the caller's tensors.


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1).nan_to_num() @ v


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_masks_and_biases_of_the_caller(engine: Engine, dtype: torch.dtype, bound: float) -> None:
    """Any mask and any bias, of any strides: forward and gradients."""
    module = engine(
        "m = tensor(head, query, token, bool) b = tensor(query, token) return attend(where(m[h][q][k]), bias = b[q][k])"
    )
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, tokens, 16, generator=make, dtype=torch.float64)
        for heads, tokens in ((4, 37), (2, 53), (2, 53))
    )
    mask = (torch.rand(2, 53, 37, 4, generator=make) < 0.1).permute(0, 3, 2, 1)
    mask[:, :, :16, 16:48] = False  # tiles that nobody sees, and some that all do
    mask[:, :, 16:32, :16] = True
    bias = torch.randn(37, 53, generator=make, dtype=torch.float64).to(dtype).expand(2, -1, -1)
    answers = []
    for run, inputs in ((module.attention, (q.to(dtype), k.to(dtype), v.to(dtype))), (None, (q, k, v))):
        given = [x.detach().requires_grad_() for x in inputs]
        out = plain(*given, mask, bias[:, None].double()) if run is None else run(*given, mask, bias)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        grads = torch.autograd.grad((out.double() * weight).sum(), given)
        answers.append([out, *grads])
    for found, wanted in zip(*answers, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_narrow_bias_is_computed_with_32_bits(engine: Engine, dtype: torch.dtype) -> None:
    """It is neither copied nor rounded on the way."""
    some_of(engine, dtype == torch.bfloat16)
    module = engine("causal b = tensor(query, token) return attend(all, bias = b[q][k] * (q - k) / 3)")
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in "qkv")
    bias = torch.randn(1, 40, 40).to(dtype)
    distance = (torch.arange(40)[:, None] - torch.arange(40)).double()
    wanted = plain(q.double(), k.double(), v.double(), distance >= 0, (bias.double() * distance / 3)[:, None])
    torch.testing.assert_close(module.attention(q, k, v, bias).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0, 9, 40, 60])
def test_a_token_axis_has_any_length(engine: Engine, width: int) -> None:
    """What it does not reach is 0, what lies behind the keys is nothing."""
    some_of(engine, width in (9, 60))
    module = engine("causal m = tensor(query, token, bool) return attend(sink(1) | where(m[q][k]))")
    q, k, v = (torch.randn(1, 2, 40, 16, dtype=torch.float64) for _ in "qkv")
    given = torch.rand(1, 40, width) < 0.3
    whole = torch.zeros(40, 40, dtype=torch.bool)
    whole[:, : min(40, width)] = given[0, :, :40]
    whole[:, 0] = True
    found = module.attention(q, k, v, given)
    torch.testing.assert_close(found, plain(q, k, v, whole.tril(), 0.0), rtol=1e-10, atol=1e-10)


def tree_of(nodes: int, make: torch.Generator) -> Tensor:
    """Which nodes each of a random tree sees: its ancestors and itself. bool [nodes, nodes]"""
    sees = torch.eye(nodes, dtype=torch.bool)
    for node in range(1, nodes):
        parent = int(torch.randint(0, node, (), generator=make))
        sees[node] |= sees[parent]
    return sees


@pytest.mark.parametrize("page", [16, None])
def test_a_tree_of_drafts_is_verified(engine: Engine, page: int | None) -> None:
    """16 drafted tokens in one call; the path that is accepted is appended again, and generation goes on."""
    some_of(engine, page == 16)
    module = engine("causal tree = tensor(query, token, bool) return attend(where(tree[q][k]))")
    make = torch.Generator().manual_seed(3)
    prompt, nodes, batch = [21, 34], 16, 2
    q, k, v = (torch.randn(batch, heads, 60, 16, generator=make, dtype=torch.float64) for heads in (4, 2, 2))
    cache = module.Cache(batch, 64, kv_heads=2, qk_dim=16, v_dim=16, page=page, dtype=torch.float64)
    everything = torch.ones(1, 34, 60, dtype=torch.bool)
    late = [
        torch.stack(
            [
                x[i, :, n - 34 : n] if n >= 34 else torch.nn.functional.pad(x[i, :, :n], (0, 0, 34 - n, 0))
                for i, n in enumerate(prompt)
            ]
        )
        for x in (q, k, v)
    ]
    module.prefill(*late, everything, cache=cache, lengths=torch.tensor(prompt))

    trees = [tree_of(nodes, make) for _ in prompt]
    new = [torch.stack([x[i, :, n : n + nodes] for i, n in enumerate(prompt)]) for x in (q, k, v)]
    seen = torch.zeros(batch, nodes, 34 + nodes, dtype=torch.bool)
    for i, (n, tree) in enumerate(zip(prompt, trees, strict=True)):
        seen[i, :, :n] = True
        seen[i, :, n : n + nodes] = tree
    verified = module.prefill(*new, seen, cache=cache)
    for i, n in enumerate(prompt):
        wanted = plain(
            *(x[i : i + 1] for x in (new[0], k[:, :, : n + nodes], v[:, :, : n + nodes])), seen[i, :, : n + nodes], 0.0
        )
        torch.testing.assert_close(verified[i : i + 1], wanted, rtol=1e-10, atol=1e-10)

    before = torch.tensor(prompt)
    cache.truncate(before)
    paths = [tree[-1 - i].nonzero().flatten() for i, tree in enumerate(trees)]  # of the root, down to a node
    longest = max(map(len, paths))
    accepted = [
        torch.stack(
            [torch.nn.functional.pad(x[i][:, path], (0, 0, longest - len(path), 0)) for i, path in enumerate(paths)]
        )
        for x in new
    ]
    cache.append(*accepted[1:], lengths=torch.tensor([len(path) for path in paths]))
    assert cache.lengths.tolist() == [n + len(path) for n, path in zip(prompt, paths, strict=True)]

    held = [
        [torch.cat([x[i, :, :n], fresh[i][:, path]], 1) for x, fresh in zip((k, v), new[1:], strict=True)]
        for i, (n, path) in enumerate(zip(prompt, paths, strict=True))
    ]
    for step in range(2):
        last = [x[:, :, 58 + step : 59 + step] for x in (q, k, v)]
        found = module.decode(*last, torch.ones(1, 1, 64, dtype=torch.bool), cache=cache)
        for i, own in enumerate(held):
            own[:] = [torch.cat([x, new_token[i]], 1) for x, new_token in zip(own, last[1:], strict=True)]
            wanted = plain(last[0][i : i + 1], own[0][None], own[1][None], torch.ones(1, dtype=torch.bool), 0.0)
            torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-10, atol=1e-10)
