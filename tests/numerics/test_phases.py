"""`reference` and `choices` in each phase: whole sequences at train and prefill, every row by itself at decode."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Choice, Pattern, Phase, Query
from spdsl.oracle import dense
from tests.numerics.cases import (
    Found,
    Inputs,
    Shape,
    assert_same,
    cut,
    evaluated,
    inputs_of,
    meant,
    nan_cache,
    parts_of,
)
from tests.numerics.conftest import Engine
from tests.numerics.patterns import CATALOGUE, TEXTS, pattern_of
from tests.numerics.selected import PUBLISHED, SELECTED, expect_lists, lists_of

# Results that depend on the phase, on the length, or on what lies behind a row.
BY_PHASE = {
    "window at decode": "causal return attend(sliding(5)) if decode return attend(all)",
    "no train": "causal return attend(sink(2) | sliding(5)) if decode return attend(sliding(9)) if prefill",
    "decode only": "causal doc = tensor(token, int) return attend(where(doc[k] == doc[q])) if decode",
    "by length at decode": "causal return attend(all) if decode & length < 20 return attend(sliding(9))",
    "length in a set": "return attend(where(k >= length - 3) | sliding(2, ahead = 2))",
    "two lengths": (
        "causal return gate(attend(sliding(4)), attend(sink(3))) if length > 11 return attend(all) if length > 5 "
        "return attend(sliding(2))"
    ),
    "gate at decode": "causal return attend(all) if train return gate(attend(sliding(4)), attend(sink(3)))",
    "given at decode": (
        "causal a = given(rows = 8, unit = 4, share = head) return attend(all) if train return attend(a | sliding(2))"
    ),
    "train only": "causal return attend(sliding(4)) if train",
    "extras at prefill": "causal return attend(all), attend(sink(2)) if prefill return attend(all)",
    "chosen at decode": (
        "causal entries = compress(8, 4) return attend(all) if train | prefill "
        "return attend(top_k(2, score = dot(entries), unit = max(16), share = max(group), force = last(1)))"
    ),
    "any number at decode": (
        "causal entries = compress(8, 4) rank = dot(entries) return attend(all) if train "
        "return attend(threshold(0, score = rank, share = head, unit = max(16), force = last(1)))"
    ),
}  # fmt: skip
CHOOSING = {name: text for name, text in SELECTED.items() if name != "seer_attention"}
CHOOSING |= {name: BY_PHASE[name] for name in ("chosen at decode", "any number at decode")}
ALL = {**{name: name for name in (*CATALOGUE, *TEXTS)}, **SELECTED, **BY_PHASE}
# What is compared with a cache, step by step; interpreted kernels run the first seven.
STEPPED = [
    "nsa", "infllm_v2", "two lengths", "given at decode", "chosen at decode", "moba", "seer_attention", "by_length",
    "document", "length in a set", "no train", "by length at decode", "any number at decode", "tiles of 24 rows",
    "drawn_group", "ahead_units", "two_streams_sink", "extras",
]  # fmt: skip


def shape_of(pattern: Pattern, rows: int = 21, batch: int = 2, dim: int = 8) -> Shape:
    return Shape(rows, rows, batch, pattern.query_heads or 2, pattern.kv_heads or 1, dim, dim)


def last_token(pattern: Pattern, inputs: Inputs, position: int) -> Inputs:
    """The call in which the query at `position` is the last token there is; sequences begin with their queries."""
    step = new_token(pattern, inputs, position)
    own = {found.name for found in pattern.inputs if isinstance(found, Query | Choice)} | {"gates"}
    return {name: step[name] if name in own else x for name, x in cut(pattern, inputs, 0, position + 1).items()}


def new_token(pattern: Pattern, inputs: Inputs, position: int) -> Inputs:
    """The same as arguments of `decode`."""
    step = {name: x.contiguous() for name, x in cut(pattern, inputs, position, position + 1).items()}
    tiles = {name: inputs[name][:, :, position // rows : position // rows + 1] for name, rows in given_rows(pattern)}
    return {**step, **tiles}


def given_rows(pattern: Pattern) -> list[tuple[str, int]]:
    """Lists of the caller, and the rows of their tiles."""
    return [(found.name, found.rows) for found in pattern.inputs if isinstance(found, Choice) and found.given]


def assert_same_rows(found: list[Any], rows: list[list[Any]]) -> None:
    """Results of all rows are those of each; an lse that is one stands for every branch of a gate."""
    for i, row in enumerate(rows):
        own = [(out[:, :, i : i + 1], lse[:, :, i : i + 1]) for out, lse in found]
        wanted = [
            (out, lse if lse.dim() == own_lse.dim() else lse[..., None].expand_as(own_lse))
            for (out, lse), (_, own_lse) in zip(row, own, strict=True)
        ]
        assert_same(Found(own), Found(wanted))


def some(names: Iterable[str], *more: str) -> list[Any]:
    """Shipped patterns, those made for this file, and `more`; the rest in the full product."""
    first = {*CATALOGUE, *PUBLISHED, *BY_PHASE, *more}
    return [name if name in first else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", some(ALL, "drawn_group", "by_tensor", "ahead_units", "gate"))
def test_the_reference_of_every_phase(cpu: Engine, name: str) -> None:
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    inputs = inputs_of(pattern, shape_of(pattern))
    for phase in module.PHASES:
        found = parts_of(module.reference(**inputs, phase=phase, return_lse=True))
        if phase == "decode":
            rows = [dense.results(pattern, last_token(pattern, inputs, i), phase) for i in range(21)]
            assert_same_rows(found, [[part for part in row if isinstance(part, tuple)] for row in rows])
        else:
            wanted = dense.results(pattern, inputs, phase)
            branches = [part for part in wanted if isinstance(part, tuple)]  # a cache answers without scores
            assert_same(Found(found), Found(wanted if phase == "train" else branches))


@pytest.mark.parametrize("name", ["extras", "seer_attention", "two lengths"])
def test_without_lse(cpu: Engine, name: str) -> None:
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    inputs = inputs_of(pattern, shape_of(pattern))
    for phase in module.PHASES:
        outs = module.reference(**inputs, phase=phase)
        parts = parts_of(module.reference(**inputs, phase=phase, return_lse=True))
        for out, part in zip(outs if isinstance(outs, tuple) else [outs], parts, strict=True):
            assert torch.equal(out, part[0] if isinstance(part, tuple) else part)


@pytest.mark.parametrize("name", some(CHOOSING, "tiles of 24 rows", "within", "no order", "two choices"))
def test_the_choices_of_every_phase(cpu: Engine, name: str) -> None:
    module, pattern = cpu(CHOOSING[name]), pattern_of(CHOOSING[name])
    inputs = inputs_of(pattern, shape_of(pattern))
    for phase in module.PHASES:
        lists = module.choices(**inputs, phase=phase)
        steps = {step.name for case in pattern.cases_of(Phase(phase)) for step in pattern.steps(case)}
        assert lists.keys() == {found.name for found in lists_of(pattern)} & steps
        if phase != "decode" and lists:
            expect_lists(lists, pattern, inputs)
        for i in range(21) if phase == "decode" and lists else ():
            own = {key: x[:, :, i : i + 1] for key, x in lists.items()}
            expect_lists(own, pattern, last_token(pattern, inputs, i))


@pytest.mark.parametrize("name", STEPPED)
def test_decode_step_by_step(cpu: Engine, name: str) -> None:
    check_steps(cpu(ALL[name]), pattern_of(ALL[name]), 0, 33)


@pytest.mark.parametrize("name", STEPPED[:7])
def test_decode_behind_a_prompt(engine: Engine, name: str) -> None:
    check_steps(engine(ALL[name]), pattern_of(ALL[name]), 16, 19)


def check_steps(module: ModuleType, pattern: Pattern, prompt: int, end: int) -> None:
    """Steps behind a prompt, every other one with the choices of the reference passed along."""
    shape = shape_of(pattern, end, 1, 16)
    inputs = inputs_of(pattern, shape)
    own = last_rows(pattern, inputs, prompt)
    lists = module.choices(**own, phase="decode") if hasattr(module, "choices") else {}
    cache = nan_cache(module, shape, 48, 16)
    if prompt:
        module.prefill(**first_rows(pattern, inputs, prompt), cache=cache)
    steps = []
    for i in range(prompt, end):
        given = {key: x[:, :, i - prompt : i - prompt + 1] for key, x in lists.items() if i % 2}
        step = module.decode(**new_token(pattern, inputs, i), **given, cache=cache, return_lse=True)
        steps.append(parts_of(step))
    assert_same_rows(parts_of(module.reference(**own, phase="decode", return_lse=True)), steps)
    fixed = module.reference(**own, **lists, phase="decode", return_lse=True)
    assert_same_rows(parts_of(fixed), steps)


def first_rows(pattern: Pattern, inputs: Inputs, end: int) -> Inputs:
    tiles = {name: inputs[name][:, :, : -(-end // rows)] for name, rows in given_rows(pattern)}
    return {**cut(pattern, inputs, 0, end), **tiles}


def last_rows(pattern: Pattern, inputs: Inputs, first: int) -> Inputs:
    """The queries from `first` on, over all keys."""
    own = {found.name for found in pattern.inputs if isinstance(found, Query)} | {"gates"}
    tiles = {name: inputs[name][:, :, first // rows :] for name, rows in given_rows(pattern)}
    return {**{name: x[:, :, first:] if name in own else x for name, x in inputs.items()}, **tiles}


@pytest.mark.parametrize("name", ["two lengths", "seer_attention", "by_length", "extras at prefill", "nsa", "no train"])
def test_prefill_of_a_whole_prompt(cpu: Engine, name: str) -> None:
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    shape = shape_of(pattern)
    inputs = inputs_of(pattern, shape)
    found = module.prefill(**inputs, cache=nan_cache(module, shape, 48, None), return_lse=True)
    assert_same(Found(parts_of(found)), Found(parts_of(module.reference(**inputs, phase="prefill", return_lse=True))))


def of_tokens(part: tuple[Tensor, Tensor], first: int, end: int) -> tuple[Tensor, ...]:
    return tuple(x[:, :, first:end] for x in part)


LAYOUTS = ["nsa", "infllm_v2", "by_length", "document", "by_tensor", "length in a set", "extras", "given at decode"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_sequences(cpu: Engine, name: str) -> None:
    """Each decodes as if it were alone; what is in none has nothing."""
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    inputs = inputs_of(pattern, shape_of(pattern, 40, batch=1))
    ends = [0, 9, 9, 31]
    call = {"cu_seqlens": torch.tensor(ends), "phase": "decode"}
    if name == "given at decode":  # a list for each sequence, from the tile of its first query on
        inputs["a"] = inputs["a"].expand(3, -1, -1, -1)
    found = parts_of(module.reference(**inputs, **call, return_lse=True))
    lists = module.choices(**inputs, **call) if hasattr(module, "choices") else {}
    for first, end in ((0, 9), (9, 31)):
        own = cut(pattern, inputs, first, end)
        if name == "given at decode":
            own["a"] = first_rows(pattern, inputs, end - first)["a"][:1]
        wanted = parts_of(module.reference(**own, phase="decode", return_lse=True))
        assert_same(Found([of_tokens(part, first, end) for part in found]), Found(wanted))
        for key, x in module.choices(**own, phase="decode").items() if lists else ():
            width = x.shape[3]
            assert torch.equal(lists[key][:, :, first:end, :width], x)
            assert (lists[key][:, :, first:end, width:] == -1).all()
    for out, lse in found:
        assert (out[:, :, 31:] == 0).all()
        assert (lse[:, :, 31:] == -torch.inf).all()
    assert all((x[:, :, 31:] == -1).all() for x in lists.values())


@pytest.mark.parametrize("name", ["nsa", "infllm_v2", "document", "by_tensor", "length in a set"])
def test_padded_sequences(cpu: Engine, name: str) -> None:
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    inputs = inputs_of(pattern, shape_of(pattern, 30, batch=3))
    real = [30, 0, 13]
    found = parts_of(module.reference(**inputs, phase="decode", lengths=torch.tensor(real), return_lse=True))
    for row, length in enumerate(real):
        rows = {name: x[row : row + 1] if x.shape[0] == 3 else x for name, x in inputs.items()}
        wanted = parts_of(module.reference(**cut(pattern, rows, 30 - length, 30), phase="decode", return_lse=True))
        own = [(out[row : row + 1, :, 30 - length :], lse[row : row + 1, :, 30 - length :]) for out, lse in found]
        assert_same(Found(own), Found(wanted))
        assert all((out[row, :, : 30 - length] == 0).all() for out, _ in found)
        assert all((lse[row, :, : 30 - length] == -torch.inf).all() for _, lse in found)


@pytest.mark.parametrize("name", ["nsa", "streaming_llm", "length in a set", "given at decode", "document"])
def test_the_last_rows_of_a_sequence(cpu: Engine, name: str) -> None:
    """Fewer queries than keys: the last query stands at the last key."""
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    inputs = inputs_of(pattern, shape_of(pattern, 37))
    whole = parts_of(module.reference(**inputs, phase="decode", return_lse=True))
    found = parts_of(module.reference(**last_rows(pattern, inputs, 20), phase="decode", return_lse=True))
    assert_same(Found(found), Found([(out[:, :, 20:], lse[:, :, 20:]) for out, lse in whole]))


def test_a_part_of_a_sequence(cpu: Engine) -> None:
    """Queries 5 to 14 over keys 3 to 12: those behind a query do not exist, and keys end before the last queries."""
    module, pattern = cpu(BY_PHASE["length in a set"]), pattern_of(BY_PHASE["length in a set"])
    inputs = inputs_of(pattern, Shape(rows=10, keys=10, offsets=(5, 3)))
    found = parts_of(module.reference(**inputs, phase="decode", q_offset=5, k_offset=3, return_lse=True))
    rows = []
    for i in range(10):
        keys = min(10, 5 + i + 1 - 3)
        own = {"q": inputs["q"][:, :, i : i + 1], "k": inputs["k"][:, :, :keys], "v": inputs["v"][:, :, :keys]}
        rows.append(dense.results(pattern, own, "decode", q_offset=5 + i, k_offset=3))
    assert_same_rows(found, rows)


@pytest.mark.parametrize("name", ["nsa", "streaming_llm", "two lengths"])
@pytest.mark.parametrize("rows, batch", [(0, 2), (5, 0), (1, 1)])
def test_few_rows(cpu: Engine, name: str, rows: int, batch: int) -> None:
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    inputs = inputs_of(pattern, shape_of(pattern, rows, batch=batch))
    for more in ({}, {"lengths": torch.zeros(batch, dtype=torch.long)}):
        for out, lse in parts_of(module.reference(**inputs, phase="decode", return_lse=True, **more)):
            assert out.shape == inputs["q"].shape
            assert lse.shape[:3] == out.shape[:3]


@pytest.mark.parametrize("name", ["streaming_llm", "softcap_sink", "gate", "weighted"])
def test_gradients_at_decode(cpu: Engine, name: str) -> None:
    """Where no row knows what lies behind it, the gradients are those of training."""
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    inputs = inputs_of(pattern, shape_of(pattern, 19))
    for layout in ({}, {"lengths": torch.tensor([19, 19])}):
        found = evaluated(
            lambda x, layout=layout: parts_of(module.reference(**x, phase="decode", return_lse=True, **layout)),
            pattern, inputs,
        )  # fmt: skip
        assert_same(found, meant(pattern, inputs))


@pytest.mark.parametrize("phase", ["", "Decode", "test", None, 3, ["decode"], b"decode", torch.tensor(1)])
def test_what_is_no_phase_is_refused(cpu: Engine, phase: Any) -> None:
    module, pattern = cpu(ALL["moba"]), pattern_of(ALL["moba"])
    inputs = inputs_of(pattern, shape_of(pattern))
    for function in (module.reference, module.choices):
        with pytest.raises(ValueError, match=r'^phase: expected "train", "prefill" or "decode", got '):
            function(**inputs, phase=phase)


@pytest.mark.parametrize("name, phase, covered", [
    ("no train", "train", "prefill or decode"), ("decode only", "prefill", "decode"),
    ("decode only", "train", "decode"), ("train only", "decode", "train"),
])  # fmt: skip
def test_a_phase_without_a_result_is_refused(cpu: Engine, name: str, phase: str, covered: str) -> None:
    module, pattern = cpu(BY_PHASE[name]), pattern_of(BY_PHASE[name])
    with pytest.raises(ValueError, match=f"^phase: expected one that a result covers, {covered}, got '{phase}'"):
        module.reference(**inputs_of(pattern, shape_of(pattern)), phase=phase)


def test_what_a_phase_reads_must_be_there(cpu: Engine) -> None:
    for name, phase, missing in (
        ("seer_attention", "prefill", "chosen"), ("given at decode", "decode", "a"),
        ("gate at decode", "decode", "gates"),
    ):  # fmt: skip
        module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
        inputs = inputs_of(pattern, shape_of(pattern))
        del inputs[missing]
        module.reference(**inputs)
        with pytest.raises((TypeError, ValueError), match=f"^{missing}: expected"):
            module.reference(**inputs, phase=phase)


def test_a_row_without_a_result(cpu: Engine) -> None:
    text = "causal return attend(all) if length > 9"
    module, pattern = cpu(text), pattern_of(text)
    inputs = inputs_of(pattern, shape_of(pattern))
    module.reference(**inputs)
    with pytest.raises(ValueError, match="no result of the pattern covers this call"):
        module.reference(**inputs, phase="decode")


@pytest.mark.parametrize("name, wrong", [
    ("document", {"doc": torch.zeros(2, 36, dtype=torch.long)}), ("given at decode", {"a": torch.zeros(2, 2, 4, 3)}),
    ("given at decode", {"a": torch.zeros(2, 2, 4, 3, dtype=torch.long)}),
    ("gate", {"gates": torch.zeros(2, 2, 36, 2)}), ("nsa", {"chosen": torch.zeros(2, 1, 36, 2, dtype=torch.long)}),
])  # fmt: skip
def test_the_whole_call_is_checked_before_its_rows(cpu: Engine, name: str, wrong: dict[str, Tensor]) -> None:
    module, pattern = cpu(ALL[name]), pattern_of(ALL[name])
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        module.reference(**{**inputs_of(pattern, shape_of(pattern)), **wrong}, phase="decode")
