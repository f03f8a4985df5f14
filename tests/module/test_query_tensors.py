"""Tensors with a `query` axis as arguments: what is refused, what no cache keeps, what PyTorch compiles."""

from __future__ import annotations

from itertools import chain
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import spdsl
from tests.module.patterns import arguments
from tests.module.test_operators import Recorded

TEXT = """
pattern drafts {
    causal
    tree = tensor(query, token, bool)
    pair = tensor(head, query, token)
    near = tensor(query, int)
    return attend(where(tree[q][k] | q - k < near[q]), bias = pair[h][q][k])
}
"""


@pytest.fixture(scope="module")
def drafts() -> ModuleType:
    return spdsl.load(TEXT)


def given_of(module: ModuleType, rows: int, width: int, batch: int = 2) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(rows)
    made = {
        "tree": torch.rand(batch, rows, width, generator=make) < 0.3,
        "pair": torch.randn(batch, 4, rows, width, generator=make),
        "near": torch.randint(1, 9, (batch, rows), generator=make),
    }
    return {**arguments(module, rows, batch), **made}


def truths(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tree": [True]}, "tree: expected a tensor, got list"),
    ({"tree": torch.zeros(2, 8, 8)}, "tree: expected bool, got torch.float32"),
    ({"tree": truths(2, 9, 8)}, r"tree: expected \[1 or 2\] \+ \[8, any\], got \[2, 9, 8\]"),
    ({"tree": truths(2, 8)}, r"tree: expected \[1 or 2\] \+ \[8, any\], got \[2, 8\]"),
    ({"tree": truths(8, 8)}, r"tree: expected \[1 or 2\] \+ \[8, any\], got \[8, 8\]"),
    ({"tree": truths(3, 8, 8)}, r"tree: expected \[1 or 2\] \+ \[8, any\], got \[3, 8, 8\]"),
    ({"tree": truths(2, 8, 8).to("meta")}, "tree: expected device cpu, got meta"),
    ({"pair": torch.zeros(2, 3, 8, 8)}, r"pair: expected \[1 or 2\] \+ \[4, 8, any\], got \[2, 3, 8, 8\]"),
    ({"near": torch.zeros(2, 8)}, "near: expected an integer dtype, got torch.float32"),
    ({"near": torch.zeros(7, dtype=torch.int64)}, r"near: expected \[1 or 2\] \+ \[8\], got \[7\]"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[one[1][:40] for one in BAD])
def test_refused(drafts: ModuleType, changes: dict[str, Any], message: str) -> None:
    """Also by a call with a cache, which stays as it was."""
    cache = drafts.Cache(2, 16, kv_heads=2, qk_dim=16, v_dim=24)
    given = {**given_of(drafts, 8, 8), **changes}
    for function, more in ((drafts.attention, {}), (drafts.reference, {}), (drafts.prefill, {"cache": cache})):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            function(**given, **more)
    assert cache.lengths.tolist() == [0, 0]


def test_rows_are_those_of_packed_queries(drafts: ModuleType) -> None:
    given = given_of(drafts, 8, 5, batch=1)
    with pytest.raises(ValueError, match=r"^tree: expected \[1 or 1\] \+ \[8, any\], got \[2, 8, 5\]"):
        drafts.attention(**{**given, "tree": truths(2, 8, 5)}, cu_seqlens=torch.tensor([0, 5, 8]))
    pages = {name: torch.zeros(4, 16, 2, dim) for name, dim in (("k_pages", 16), ("v_pages", 24))}
    requests = {
        "block_table": torch.tensor([[0], [1]], dtype=torch.int32), "seq_lens": torch.tensor([5, 3]),
        "cu_seqlens_q": torch.tensor([0, 5, 8]),
    }  # fmt: skip
    own = {name: given[name] for name in ("tree", "pair", "near")}
    q = given["q"][0].transpose(0, 1)
    with pytest.raises(ValueError, match=r"^tree: expected \[1, 8, any\], got \[2, 8, 5\]"):
        drafts.attend_paged(q, **pages, **requests, **{**own, "tree": truths(2, 8, 5)})
    with pytest.raises(ValueError, match=r"^pair: expected \[1, head, 8, any\], got \[1, 4, 7, 5\]"):
        drafts.attend_paged(q, **pages, **requests, **{**own, "pair": torch.zeros(1, 4, 7, 5)})


def test_no_cache_keeps_it(drafts: ModuleType) -> None:
    cache = drafts.Cache(2, 16, kv_heads=2, qk_dim=16, v_dim=24, page=None)
    assert not cache.tokens
    assert {state.name for state in cache.states} == {"k.kv", "v.kv"}
    given = given_of(drafts, 8, 8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tree'"):
        cache.append(given["k"], given["v"], tree=given["tree"])
    cache.append(given["k"], given["v"])
    assert cache.lengths.tolist() == [8, 8]


def test_one_graph_for_all_lengths_and_widths(drafts: ModuleType) -> None:
    compiled = torch.compile(drafts.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(**given_of(drafts, 40, 56, batch=3))
    with torch.compiler.set_stance("fail_on_recompile"):
        given = given_of(drafts, 72, 61, batch=5)
        assert torch.equal(compiled(**given), drafts.attention(**given))


def test_export(drafts: ModuleType) -> None:
    class Whole(nn.Module):
        def forward(self, **given: Tensor) -> Tensor:
            out: Tensor = drafts.attention(**given)
            return out

    given = given_of(drafts, 40, 33)
    program = torch.export.export(Whole(), (), given)
    assert torch.equal(program.module()(**given), drafts.attention(**given))


def test_opcheck_of_every_operator(drafts: ModuleType) -> None:
    given = given_of(drafts, 40, 33)
    own = {name: x.detach().requires_grad_(name in ("q", "k", "v")) for name, x in given.items()}
    with Recorded(drafts) as seen:
        drafts.attention(**own).square().sum().backward()
    assert set(seen.calls) == {"attend_forward", "attend_backward"}
    for name, found in seen.calls.items():
        of_call = [x.detach() if isinstance(x, Tensor) else x for x in found]
        for x in of_call[:3] if name == "attend_forward" else ():
            x.requires_grad_()
        verdicts = opcheck(seen.operator(name), of_call)
        assert set(verdicts.values()) == {"SUCCESS"}, verdicts


def test_meta(drafts: ModuleType) -> None:
    """Shapes and dtypes alone, also of a bias that would be too large to be copied."""
    given = {name: x.to("meta") for name, x in given_of(drafts, 8, 1).items()}
    given["pair"] = given["pair"].expand(2, 4, 8, 1 << 40)
    cache = drafts.Cache(2, 16, kv_heads=2, qk_dim=16, v_dim=24, device="meta")
    for out in chain([drafts.attention(**given)], [drafts.prefill(**given, cache=cache)]):
        assert (out.shape, out.dtype) == ((2, 4, 8, 24), torch.float32)
