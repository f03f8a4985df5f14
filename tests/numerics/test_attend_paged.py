"""Attention over pages of somebody else equals attention of each request by itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Pattern, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle import dense
from tests.numerics.cases import Found, Inputs, Shape, assert_same, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import SELECTED
from tests.numerics.test_gathered import CHOSEN, GIVEN

# (tokens of a request, its queries in the call, the request with which it shares the pages of its prefix or -1)
Request = tuple[int, int, int]
STATIC = [
    "causal", "sliding_window", "streaming_llm", "document", "alibi", "sink_attention", "softcap_sink", "token_bias",
    "dilated", "two_streams", "value_is_key", "gate", "merge", "own_query", "extras", "by_head",
    "causal m = tensor(head, token, bool) return attend(sliding(3) | where(m[h][k]))",
]  # fmt: skip


@dataclass
class Pages:
    """The pages of all requests in any order, amid NaN."""

    given: Inputs
    own: list[Inputs]
    counts: list[int]


def filled(
    pattern: Pattern, requests: Sequence[Request], page: int, layout: str = "NHD", spare: int = 2, seed: int = 0
) -> Pages:
    width = max(1, *(-(-tokens // page) for tokens, _, _ in requests)) + spare
    own = [inputs_of(pattern, Shape(tokens, tokens, seed=seed + i)) for i, (tokens, _, _) in enumerate(requests)]
    order = iter(torch.randperm(len(requests) * width + 5, generator=torch.Generator().manual_seed(seed)).tolist())
    table = torch.full((len(requests), width), 2**31 - 1, dtype=torch.int32)  # what lies behind is never followed
    for i, (tokens, _, source) in enumerate(requests):
        shared = min(tokens, requests[source][0]) // page if source >= 0 else 0
        for j in range(-(-tokens // page)):
            table[i, j] = table[source, j] if j < shared else next(order)
        if shared:
            for name, x in own[i].items():
                if query_axis(pattern, name) is not None:
                    continue  # of the queries of a request
                if is_over_tokens(pattern, name) or (x.dim() == 4 and not is_learned(pattern, name)):
                    part = (
                        (slice(None), slice(None), slice(0, shared * page))
                        if x.dim() == 4
                        else (..., slice(0, shared * page))
                    )
                    x[part] = own[source][name][part]
    given: Inputs = {"block_table": table, "seq_lens": torch.tensor([tokens for tokens, _, _ in requests])}
    counts = [queries for _, queries, _ in requests]
    given["cu_seqlens_q"] = torch.tensor([0, *counts]).cumsum(0).int()
    for name, x in own[0].items():
        rows = [part[name] for part in own]
        if name in streams(pattern):
            given[f"{name}_pages"] = stored(rows, table, page, len(requests) * width + 5, layout)
        elif (axis := query_axis(pattern, name)) is not None:
            given[name] = packed_rows(rows, axis, counts)
        elif x.dim() == 4 and not is_learned(pattern, name):
            longer = [
                torch.nn.functional.pad(row, (0, 0, max(0, count - row.shape[2]), 0), value=1.0)
                for row, count in zip(rows, counts, strict=True)
            ]
            last = [row[:, :, row.shape[2] - count :] for row, count in zip(longer, counts, strict=True)]
            given[name] = torch.cat(last, 2)[0].transpose(0, 1).contiguous()
        elif is_over_tokens(pattern, name):
            given[name] = torch.stack(
                [torch.nn.functional.pad(row[0], (0, width * page - row.shape[-1])) for row in rows]
            )
        else:
            given[name] = x
            for part in own:
                part[name] = x
    return Pages(given, own, counts)


def stored(rows: Sequence[Tensor], table: Tensor, page: int, pages: int, layout: str) -> Tensor:
    """Keys or values [1, heads, tokens, dim] of each request, in pages [pages, page, heads, dim] of any strides."""
    _, heads, _, dim = rows[0].shape
    shape = (pages, heads, page, dim + 3) if layout == "HND" else (pages, page, heads, dim + 3)
    found = torch.full(shape, torch.nan, dtype=rows[0].dtype)[..., :dim]
    found = found.transpose(1, 2) if layout == "HND" else found
    for row, own in zip(rows, table, strict=True):
        for token in range(row.shape[2]):
            found[own[token // page], token % page] = row[0, :, token]
    return found


def streams(pattern: Pattern) -> set[str]:
    arguments = [(getattr(x, "key_argument", None), getattr(x, "value_argument", None)) for x in pattern.inputs]
    return {name for pair in arguments for name in pair if name}


def is_learned(pattern: Pattern, name: str) -> bool:
    return any(isinstance(x, Weight) and x.name == name for x in pattern.inputs)


def is_over_tokens(pattern: Pattern, name: str) -> bool:
    return any(isinstance(x, TensorInput) and x.name == name and x.by_token for x in pattern.inputs)


def query_axis(pattern: Pattern, name: str) -> int | None:
    """Where a tensor has the rows of a call, behind the batch."""
    found = (x for x in pattern.inputs if isinstance(x, TensorInput) and x.name == name and x.by_row)
    return next((x.axes.index("query") + 1 for x in found), None)


def packed_rows(parts: Sequence[Tensor], axis: int, counts: Sequence[int]) -> Tensor:
    """The last rows of each part, as many as it has queries; of rows before the first token anything. Widths differ."""
    found = []
    for x, count in zip(parts, counts, strict=True):
        rows = x.index_select(axis, torch.arange(x.shape[axis] - count, x.shape[axis]).clamp(min=0)) if x.numel() else x
        shape = [max(own) for own in zip(*(other.shape for other in parts), strict=True)]
        whole = x.new_zeros([*shape[:axis], count, *shape[axis + 1 :]])
        whole[tuple(slice(0, size) for size in rows.shape)] = rows
        found.append(whole)
    return torch.cat(found, axis)


def check(module: ModuleType, pattern: Pattern, pages: Pages, **how: Any) -> None:
    answer = module.attend_paged(**pages.given, **how)
    found = [answer] if isinstance(answer[0], Tensor) else list(answer)
    first = 0
    for own, count in zip(pages.own, pages.counts, strict=True):
        parts = [
            (out[first : first + count].transpose(0, 1)[None], lse[first : first + count].transpose(0, 1)[None])
            for out, lse in found
        ]
        tokens = own[min(streams(pattern) & {*own})].shape[2]  # of entries there are fewer
        first += count
        if not count:
            continue
        none, kept = max(0, count - tokens), min(count, tokens)  # queries before the first token, and the others
        assert all((out[:, :, :none] == 0).all() and (lse[:, :, :none] == -torch.inf).all() for out, lse in parts)
        if not kept:
            continue
        wanted = dense.results(pattern, own, how.get("phase", "prefill"))
        parts = [(out[:, :, none:], lse[:, :, none:]) for out, lse in parts]
        assert_same(Found(parts), Found([(out[:, :, -kept:], lse[:, :, -kept:]) for out, lse in wanted]))


def edges(page: int) -> list[Request]:
    """Lengths around a page, prompts and steps together, prefixes that are shared."""
    page = max(page, 2)
    return [
        (page + 1, 1, -1), (page, 3, 0), (0, 1, -1), (1, 1, -1), (page - 1, page - 1, -1), (2 * page + 3, 5, -1),
        (2 * page + 1, 1, 5), (0, 0, -1), (page + 5, 0, -1), (3, 3, -1),
    ]  # fmt: skip


@pytest.mark.parametrize("page, layout", [(16, "NHD"), (16, "HND"), (1, "NHD"), (64, "HND"), (48, "NHD")])
@pytest.mark.parametrize("name", STATIC)
def test_prompts_and_steps_in_one_batch(cpu: Engine, name: str, page: int, layout: str) -> None:
    if name not in ("causal", "streaming_llm", "document") and (page, layout) not in ((16, "HND"), (1, "NHD")):
        pytest.skip("pairwise")
    pattern = pattern_of(name)
    check(cpu(name), pattern, filled(pattern, edges(page), page, layout))


@pytest.mark.parametrize("page, layout", [(16, "NHD"), (1, "HND"), (48, "HND")])
@pytest.mark.parametrize("name", ["streaming_llm", "document", "softcap_sink", "gate"])
def test_prompts_and_steps_by_kernels(kernels: Engine, name: str, page: int, layout: str) -> None:
    pattern = pattern_of(name)
    requests = edges(page)[:7] if name == "streaming_llm" else [(17, 1, -1), (0, 1, -1), (20, 3, 0), (5, 5, -1)]
    check(kernels(name), pattern, filled(pattern, requests, page, layout))


@pytest.mark.parametrize("page", [16, 1])
@pytest.mark.parametrize("name", ["causal", "streaming_llm", "document", "softcap_sink", "gate", "extras"])
def test_single_queries(engine: Engine, name: str, page: int) -> None:
    """They take the kernels of a step. One request has no query, one no token."""
    pattern = pattern_of(name)
    requests = [(33, 1, -1), (16, 0, -1), (0, 1, -1), (15, 1, -1), (17, 1, 0)]
    if engine.name == "interpreted" and name in ("causal", "gate", "extras"):
        requests = requests[:4]
    check(engine(name), pattern, filled(pattern, requests, page), max_seqlen_q=1)


LISTS = {
    name: GIVEN[name]
    for name in (
        "tokens",
        "tokens of heads",
        "in a window",
        "units of 6",
        "units of 24 of heads",
        "and a window",
        "scores",
    )
}
LISTS["tokens by an indexer"] = CHOSEN["tokens by an indexer"]


@pytest.mark.parametrize("page, layout", [(16, "NHD"), (1, "HND"), (48, "HND")])
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_units(engine: Engine, name: str, page: int, layout: str) -> None:
    """Of each query: [T, heads, n]."""
    if engine.name == "interpreted" and (page == 48) == (list(LISTS).index(name) % 3 > 0):
        pytest.skip("pairwise")
    pattern = pattern_of(LISTS[name])
    requests = [(17, 1, -1), (0, 1, -1), (20, 3, 0), (5, 5, -1)] if engine.name == "interpreted" else edges(page)
    check(engine(LISTS[name]), pattern, filled(pattern, requests, page, layout))


@pytest.mark.parametrize("page", [16, 48, 1])
@pytest.mark.parametrize("name", ["tokens", "units of 6", "tokens by an indexer"])
def test_lists_of_single_queries(engine: Engine, name: str, page: int) -> None:
    pattern = pattern_of(LISTS[name])
    requests = [(33, 1, -1), (16, 0, -1), (0, 1, -1), (15, 1, -1), (17, 1, 0)]
    check(engine(LISTS[name]), pattern, filled(pattern, requests, page), max_seqlen_q=1)


def test_bad_lists(cpu: Engine) -> None:
    module, pattern = cpu(GIVEN["tokens"]), pattern_of(GIVEN["tokens"])
    given = filled(pattern, [(20, 3, -1), (5, 1, -1)], 16).given
    own = given["t"]
    for other in (own[None], own[:3], own.float(), own[:, [0, 0]], own.repeat(1, 1, 7), None, 3):
        with pytest.raises((ValueError, TypeError), match=r"^t\b"):
            module.attend_paged(**{**given, "t": other})


ENTRIES = {
    "nsa": SELECTED["nsa"],
    "softmax": SELECTED["softmax"],
    "moba": SELECTED["moba"],
    "short": CHOSEN["units of 8"],
}


def with_states(module: ModuleType, pattern: Pattern, pages: Pages, new_tokens: int) -> Pages:
    """The states of compressed streams: made in two calls, those of a prompt's beginning and those of the rest."""
    given, requests = pages.given, len(pages.own)
    tokens = given["block_table"].shape[1] * given["k_pages" if "k_pages" in given else "k_rough_pages"].shape[1]
    states = module.paged_states(requests + 2, tokens, kv_heads=1, qk_dim=16, v_dim=16, dtype=torch.float64)
    for x in states.values():
        x.fill_(torch.nan)
    rows = torch.randperm(requests + 2, generator=torch.Generator().manual_seed(1))[:requests]
    weights = {x.name for x in pattern.inputs if isinstance(x, Weight)}
    names = {*inspect.signature(module.update_states).parameters, *weights}
    own = {name: x for name, x in given.items() if name in names}
    lengths = own.pop("seq_lens")
    for part in ((lengths - new_tokens).clamp(min=0), lengths):
        module.update_states(
            **own,
            seq_lens=part,
            states=states,
            state_rows=rows,
            new_tokens=max(new_tokens, int(lengths.max()) - new_tokens),
        )
    kept = {name: x for name, x in given.items() if name not in weights}
    return Pages({**kept, "states": states, "state_rows": rows}, pages.own, pages.counts)


@pytest.mark.parametrize("page", [16, 1])
@pytest.mark.parametrize("name", ENTRIES)
def test_entries_of_the_caller(cpu: Engine, name: str, page: int) -> None:
    module, pattern = cpu(ENTRIES[name]), pattern_of(ENTRIES[name])
    pages = filled(pattern, [(40, 9, -1), (50, 1, 0), (0, 1, -1), (7, 7, -1), (35, 3, -1)], page)
    check(module, pattern, with_states(module, pattern, pages, 9))
    single = filled(pattern, [(40, 1, -1), (50, 1, 0), (0, 1, -1), (7, 0, -1)], page)
    check(module, pattern, with_states(module, pattern, single, 9), max_seqlen_q=1)


@pytest.mark.parametrize("page, single", [(16, False), (1, True)])
def test_entries_of_the_caller_by_kernels(kernels: Engine, page: int, single: bool) -> None:
    module, pattern = kernels(ENTRIES["nsa"]), pattern_of(ENTRIES["nsa"])
    queries = 1 if single else 3
    pages = filled(pattern, [(34, queries, -1), (36, 1, 0), (9, queries, -1)], page)
    check(module, pattern, with_states(module, pattern, pages, 3), **({"max_seqlen_q": 1} if single else {}))


def test_bad_arguments(cpu: Engine) -> None:
    module, pattern = cpu("causal"), pattern_of("causal")
    given = filled(pattern, [(20, 3, -1), (5, 1, -1)], 16).given
    wrong = {
        "q": [given["q"][None], given["q"][:, :, :8], given["q"].float()],
        "k_pages": [given["k_pages"][0], given["k_pages"][:, :8], given["k_pages"].transpose(2, 3)],
        "v_pages": [given["v_pages"][:3], given["v_pages"][:, :, [0, 0]], given["v_pages"].float()],
        "block_table": [given["block_table"].long(), given["block_table"][:1], given["block_table"].T],
        "seq_lens": [given["seq_lens"].float(), torch.tensor([20]), torch.tensor([20, 2000])],
        "cu_seqlens_q": [torch.tensor([0, 3]), torch.tensor([0.0, 3.0, 4.0])],
    }
    for name, others in wrong.items():
        for other in [*others, None, 3]:
            with pytest.raises(
                (ValueError, TypeError), match=rf"^({name}|seq_lens|block_table|k_pages|v_pages|v|k|q)\b"
            ):
                module.attend_paged(**{**given, name: other})
    with pytest.raises(ValueError, match="max_seqlen_q"):
        module.attend_paged(**given, max_seqlen_q=2)
