"""Patterns that compress and select, in sizes that a few dozen tokens fill: bodies for `pattern_of` and `module_of`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl.api import source_of
from spdsl.ir.pattern import Choice, Pattern
from spdsl.oracle import dense
from spdsl.oracle.layouts import of_queries, packed_choices
from spdsl.oracle.sizes import sizes_of
from tests.numerics.cases import Inputs
from tests.numerics.patterns import mutated


def published(name: str, *changes: tuple[str, str], **params: int) -> str:
    """The body of a catalogue pattern without its heads and dims, its params set and its text changed."""
    text = source_of(f"patterns/{name}.spat").text
    body = re.sub(r"\n\s*(heads|dim) .*|#.*", "", text[text.index("{") + 1 : text.rindex("}")])
    for param, value in params.items():
        body, found = re.subn(rf"(param.*\b{param} = )\d+", rf"\g<1>{value}", body)
        assert found == 1, f"{name} has no parameter {param}"
    for old, new in changes:
        body = mutated(body, old, new)
    return re.sub(r"\s+", " ", body)


def nsa(width: int = 8, stride: int = 4, block: int = 16, count: int = 3, window: int = 9, by: str = "mlp") -> str:
    changes = [("by = mlp", f"by = {by}")] if by != "mlp" else []
    return published("nsa", *changes, width=width, stride=stride, block=block, count=count, window=window)


def picked(rule: str, compress: str = "8, 4, by = mean", coarse: str = "entries", keys: str = "chosen") -> str:
    """Attention to the units that `rule` chooses by the branch `coarse` over compressed keys."""
    return (
        f"causal entries = compress({compress}) coarse = attend({coarse}) chosen = {rule} "
        f"return gate(coarse, attend({keys}))"
    )


def by_rank(rule: str, more: str = "causal", compress: str = "8, 4, by = mean", keys: str = "chosen") -> str:
    """Attention to the units that `rule` chooses by logits over compressed keys."""
    return f"{more} entries = compress({compress}) rank = dot(entries) chosen = {rule} return attend({keys})"


PUBLISHED = {
    "nsa": nsa(),
    "infllm_v2": published(
        "infllm_v2", ("compress(32, 16", "compress(8, 4"), ("length < 8192", "length < 20"), block=16, count=2, local=2
    ),
    "moba": published("moba", block=16, count=2),
    "msa_minimax": "heads query = 4, kv = 2 "
    + published(
        "msa_minimax", ("stream(heads = 1, qk = 128", "stream(heads = 1, qk = 8"),
        ("query(heads = 4, dim = 128)", "query(heads = 2, dim = 8)"), block=16, count=2,
    ),
    "seer_attention": published("seer_attention", block=16),
    "vsa": published("vsa", cube=16, count=3),
    "xattention": published("xattention", step=4, block=16),
}  # fmt: skip
WORDS = {
    "cells as units": nsa(16, 16, 16, 3, by="mean"),
    "units of four cells": nsa(32, 16, 64, 4, by="weighted"),
    "max": picked("top_k(2, score = mass(coarse), unit = max(16), share = max(group))", "8, 4, by = max"),
    "mean": picked("top_k(2, score = mass(coarse), unit = mean(16), share = mean(group), force = first(1))"),
    "weighted": picked("top_k(3, score = mass(coarse), unit = 16, force = last(1))", "8, 4, by = weighted"),
    "softmax": (
        "causal gates_of = stream() entries = compress(8, 4, by = softmax(gates_of)) coarse = attend(entries) "
        "chosen = top_k(2, score = mass(coarse), unit = 16) return gate(coarse, attend(chosen))"
    ),
    "softmax of a stream without values": (
        "causal weigher = stream(value = none) entries = compress(16, 8, by = softmax(weigher)) "
        "coarse = attend(entries) chosen = top_k(2, score = mass(coarse), unit = 16) "
        "return gate(coarse, attend(chosen))"
    ),
    "heads apart": by_rank("top_k(2, score = rank, share = head, unit = max(16), force = last(1))"),
    "heads apart, all words": (
        "causal slope = tensor(head) sinks = tensor(head) entries = compress(8, 4) rank = dot(entries) "
        "chosen = top_k(3, score = rank, share = head, unit = max(16), force = first(1)) "
        "return attend(chosen, bias = slope[h] * (k - q), softcap = 2, sink_logit = sinks)"
    ),
    "heads apart, no order": by_rank("top_k(2, score = rank, share = head, unit = max(32))", more=""),
    "heads apart, any number": by_rank("threshold(0, score = rank, share = head, unit = max(16), force = last(1))"),
    "threshold": picked(
        "threshold(0.3, score = mass(coarse), share = head, unit = max(16), most = 2, force = last(1))"
    ),
    "threshold of at least": picked(
        "threshold(0.3, score = mass(coarse), share = head, unit = max(16), least = 2, most = 3, force = last(1), "
        "within = where(k >= 16))"
    ),
    "at least of a logit": by_rank("threshold(0.9, score = rank, share = max(group), unit = max(16), least = 2)"),
    "threshold of a logit": by_rank("threshold(0.2, score = rank, share = max(group), unit = max(16))"),
    "cosine": (
        "causal chosen = top_k(2, score = cosine(compress(8, 4)), share = max(group), unit = max(16), force = last(1)) "
        "return attend(chosen)"
    ),
    "threshold of a cosine": (
        "causal index = stream(value = none) q_index = query() chosen = threshold(0.6, "
        "score = cosine(index, query = q_index), share = head, unit = max(16), least = 1, most = 3) "
        "return attend(chosen)"
    ),
    "probabilities of a cosine": (
        "causal entries = compress(8, 4) rank = softmax(cosine(entries)) "
        "chosen = top_k(2, score = rank, unit = sum(16), force = last(1)) return attend(chosen)"
    ),
    "probabilities of a cosine by head": (
        "causal index = stream(value = none) q_index = query() chosen = threshold(0.3, "
        "score = softmax(cosine(index, query = q_index)), share = head, unit = sum(16), least = 1, most = 3) "
        "return attend(chosen)"
    ),
    "within": by_rank(
        "top_k(2, score = softmax(rank), unit = sum(16), within = ~last(2))", keys="chosen | last(2, unit = 16)"
    ),
    "forced above room": by_rank(
        "top_k(2, score = rank, share = mean(group), unit = mean(16), force = where((q + k // 16) % 2 == 0))"
    ),
    "least and most": by_rank("top_k(1, score = rank, share = sum(group), unit = sum(16), least = 2, most = 3)"),
    "softcap": picked("top_k(2, score = mass(coarse), unit = 16, force = last(1))", coarse="entries, softcap = 1.5"),
    "sink": (
        "causal sinks = tensor(head) entries = compress(8, 4) coarse = attend(entries, sink_logit = sinks) "
        "chosen = top_k(2, score = mass(coarse), unit = 16) return gate(coarse, attend(chosen, sink_logit = sinks))"
    ),
    "bias": (
        "causal slope = tensor(head) entries = compress(8, 4) coarse = attend(entries, bias = -slope[h] * (q - 4 * k)) "
        "chosen = top_k(2, score = mass(coarse), unit = 16) "
        "return gate(coarse, attend(chosen, bias = 0.125 * (k - q), softcap = 2))"
    ),
    "no order": (
        "entries = compress(8, 4) coarse = attend(entries) chosen = top_k(2, score = mass(coarse), unit = 16) "
        "return gate(coarse, attend(chosen))"
    ),
    "units of tokens": (
        "causal near = attend(sliding(40)) chosen = top_k(2, score = mass(near), unit = 16, share = group) "
        "return gate(near, attend(chosen))"
    ),
    "value is key": (
        "causal kv = stream(value = key, v = 16) entries = compress(8, 4) coarse = attend(entries) "
        "chosen = top_k(2, score = mass(coarse), unit = 16) return gate(coarse, attend(chosen))"
    ),
    "units of 48": by_rank("top_k(2, score = rank, share = max(group), unit = max(48))", compress="24, 12"),
    "two choices": (
        "causal entries = compress(8, 4) rank = dot(entries) far = stream() "
        "a = top_k(1, score = rank, share = max(group), unit = max(16), force = last(1)) "
        "b = top_k(2, score = rank, share = head, unit = max(16)) return gate(attend(a), attend(far[b]))"
    ),
    "chosen and near": by_rank(
        "top_k(2, score = rank, share = max(group), unit = max(16))", keys="chosen | sliding(9)"
    ),
    "cells that begin early": picked(
        "top_k(2, score = mass(coarse), unit = 16, force = last(1))", "8, 4, before = 4, by = weighted"
    ),
    "tiles of rows": by_rank(
        "top_k(2, score = softmax(rank), unit = sum(16), rows = mean(16))", more=""
    ),
    "tiles of 24 rows": by_rank(
        "top_k(3, score = rank, share = max(group), unit = max(16), rows = max(24), force = last(1))", more=""
    ),
    "heads that see apart": (
        "causal near = attend(where(h % 2 == 0) | sliding(8)) "
        "chosen = top_k(2, score = mass(near), share = mean(group), unit = mean(16)) return gate(near, attend(chosen))"
    ),
    "part of the chosen": by_rank(
        "top_k(2, score = rank, share = max(group), unit = max(16), force = last(1))", keys="chosen - sliding(5)"
    ),
}  # fmt: skip
SELECTED = PUBLISHED | WORDS
AT_CALL = {
    "a number": by_rank(
        "top_k(n % 4, score = rank, share = max(group), unit = max(16), most = 3, force = last(1))",
        more="causal n = tensor(int)",
    ),
    "numbers of heads": by_rank(
        "threshold(level[h], score = rank, share = head, unit = max(16), least = n[h] / 20, most = 3, force = last(1))",
        more="causal level = tensor(head) n = tensor(head, int)",
    ),
    "a level of a key head": picked(
        "threshold(level[h] / 3, score = mass(coarse), share = max(group), unit = max(16), most = 2)"
    ).replace("causal", "causal level = tensor(kv_head)"),
    "a number by length": by_rank(
        "top_k(length / 32, score = rank, share = head, unit = max(16), least = 1, most = 4)"
    ),
    "a level, any number": by_rank(
        "threshold(x, score = rank, share = head, unit = max(16))", more="causal x = tensor()"
    ),
}  # fmt: skip


def lists_of(pattern: Pattern) -> list[Choice]:
    return [found for found in pattern.inputs if isinstance(found, Choice) and found.selected]


@contextmanager
def recorded(module: ModuleType, pattern: Pattern) -> Iterator[dict[str, Tensor]]:
    """The lists that a module computes within the block, by the name of the choice."""
    lists: dict[str, Tensor] = {}

    def keeping(name: str, choose: Any) -> Any:
        def call(*given: Any) -> Any:
            inputs = choose(*given)
            lists[name] = getattr(inputs, name)
            return inputs

        return call

    with pytest.MonkeyPatch.context() as patch:
        for found in lists_of(pattern):
            patch.setattr(
                module, f"_choose_{found.name}", keeping(found.name, getattr(module, f"_choose_{found.name}"))
            )
        yield lists


def chosen_of(pattern: Pattern, inputs: Inputs) -> dict[str, Tensor]:
    """The lists of the oracle, one for each query."""
    sizes = sizes_of(pattern, inputs)
    return of_queries(pattern, dense.choices(pattern, inputs), range(sizes.q_origin, sizes.q_origin + sizes.rows))


def expect_lists(lists: dict[str, Tensor], pattern: Pattern, inputs: Inputs, packed: list[int] | None = None) -> None:
    """The lists are those of the oracle: as sets, ascending, padding at the end only."""
    wanted = chosen_of(pattern, inputs) if packed is None else packed_choices(pattern, inputs, packed)
    assert lists.keys() == wanted.keys()
    for name, found in lists.items():
        assert found.dtype == torch.int32
        padded = torch.where(found < 0, 2**31 - 1, found)
        assert torch.equal(padded, padded.sort(-1).values), f"{name} is not ascending"
        both = (found, wanted[name])
        tiles, width = (
            max(x.shape[axis] for x in both) for axis in (2, 3)
        )  # of packed sequences there is room for more
        pads = ((0, width - x.shape[3], 0, tiles - x.shape[2]) for x in both)
        own, other = (torch.nn.functional.pad(x, pad, value=-1) for x, pad in zip(both, pads, strict=True))
        assert torch.equal(own, other), f"{name} differs in {(own != other).any(-1).nonzero().tolist()[:4]}"
