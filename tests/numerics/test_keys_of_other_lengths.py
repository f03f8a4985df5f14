"""Packed sequences whose keys are not as many as their queries, and rows padded on the right: each is what it is alone.

The last query of a sequence stands at its last key, as in a dense call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.library import opcheck

from spdsl.ir.pattern import Choice, Pattern, Query, Stream, Weight
from spdsl.ir.pattern import Tensor as TensorInput
from spdsl.oracle import dense
from tests.library import broken
from tests.module.test_operators import Recorded
from tests.numerics.cases import (
    Found,
    Inputs,
    Shape,
    assert_same,
    evaluated,
    generated,
    guarded,
    inputs_of,
    joined,
    nan_cache,
    parts_of,
)
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, printed
from tests.numerics.selected import SELECTED
from tests.numerics.test_gathered import GIVEN

Spans = Sequence[tuple[int, int]]
# Queries and keys of each sequence: fewer, more, as many, none of either, one query.
QUERIES, KEYS = [0, 9, 9, 20, 26, 27, 33, 40], [0, 20, 23, 34, 34, 51, 55, 62]
SOME_KEYS = [0, 20, 23, 34, 36, 51, 55, 62]  # the oracle makes no list of no unit
STATIC = ["streaming_llm", "everything", "document", "token_both", "softcap_sink", "dilated", "two_streams",
          "token_bias", "by_head", "merge", "gate", "units", "drawn", "by_length", "own_query", "extras"]  # fmt: skip
CHOSEN = ["nsa", "moba", "softmax", "heads apart", "sink", "max", "threshold of at least", "tiles of rows"]
BODIES = {**{name: name for name in STATIC}, **{name: SELECTED[name] for name in CHOSEN}}
BODIES |= {name: GIVEN[name] for name in ("tokens of heads", "units of 6")}
INTERPRETED = [
    "streaming_llm",
    "document",
    "dilated",
    "two_streams",
    "nsa",
    "moba",
    "threshold of at least",
    "units of 6",
]


def spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(ends))


def part(pattern: Pattern, inputs: Inputs, rows: tuple[int, int], keys: tuple[int, int]) -> Inputs:
    """The inputs of one sequence: what belongs to its queries, and what to its keys."""
    found = dict(inputs)
    for x in pattern.inputs:
        if isinstance(x, Query) or (isinstance(x, Choice) and x.listed and x.given):
            found[x.name] = inputs[x.name][:, :, slice(*rows)]
        elif isinstance(x, Stream) and x.compress is None:
            for name in (x.key_argument, x.value_argument):
                if name:
                    found[name] = inputs[name][:, :, slice(*keys)]
        elif isinstance(x, TensorInput) and "token" in x.axes:
            found[x.name] = inputs[x.name].narrow(1 + x.axes.index("token"), keys[0], keys[1] - keys[0])
    if "gates" in inputs:
        found["gates"] = inputs["gates"][:, :, slice(*rows)]
    return found


def each_alone(pattern: Pattern, inputs: Inputs, rows: Spans, keys: Spans, **how: Any) -> Found:
    asked = [own for own in zip(rows, keys, strict=True) if own[0][0] < own[0][1]]
    return evaluated(
        lambda x: joined([dense.results(pattern, part(pattern, x, *own)) for own in asked]), pattern, inputs, **how
    )


def packed_inputs(body: str) -> Inputs:
    heads = {"heads": 4, "kv_heads": 2} if "heads query" in body else {}
    inputs = inputs_of(pattern_of(body), Shape(QUERIES[-1], KEYS[-1], **heads))
    return {key: guarded(x) for key, x in inputs.items()}


def told(keys: Sequence[int] = KEYS, **more: Any) -> dict[str, Any]:
    return {"cu_seqlens": torch.tensor(QUERIES), "cu_seqlens_k": torch.tensor(keys, dtype=torch.int32), **more}


@pytest.mark.parametrize("name", BODIES)
def test_packed_keys_of_other_lengths(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in INTERPRETED:
        pytest.skip("the same kernels in fewer patterns")
    check_packed(BODIES[name], engine(BODIES[name]))


def check_packed(body: str, module: Any) -> None:
    pattern, inputs = pattern_of(body), packed_inputs(body)
    ends = SOME_KEYS if any(isinstance(x, Choice) and x.selected for x in pattern.inputs) else KEYS
    wanted = each_alone(pattern, inputs, spans(QUERIES), spans(ends))
    for most in ({}, {"max_seqlen": 11, "max_seqlen_k": 20}):
        assert_same(generated(module, pattern, inputs, told(ends, **most)), wanted)


@pytest.mark.parametrize("name", ["nsa", "moba"])
def test_queries_of_a_sequence_without_keys(engine: Engine, name: str) -> None:
    pattern, inputs = pattern_of(BODIES[name]), packed_inputs(BODIES[name])
    found = generated(engine(BODIES[name]), pattern, inputs, told())
    for out, lse in found.parts:
        assert out[:, :, 20:26].eq(0).all()
        assert lse[:, :, 20:26].eq(-torch.inf).all()
    assert all(grad.isfinite().all() for grad in found.grads.values())


@pytest.mark.parametrize("name", ["streaming_llm", "nsa", "moba"])
def test_the_reference_and_choices(cpu: Engine, name: str) -> None:
    module, pattern, inputs = cpu(BODIES[name]), pattern_of(BODIES[name]), packed_inputs(BODIES[name])
    assert_same(
        evaluated(lambda x: parts_of(module.reference(**x, **told(SOME_KEYS), return_lse=True)), pattern, inputs),
        each_alone(pattern, inputs, spans(QUERIES), spans(SOME_KEYS)),
    )
    if hasattr(module, "choices"):
        whole = module.choices(**inputs, **told(SOME_KEYS))
        for rows, keys in zip(spans(QUERIES), spans(SOME_KEYS), strict=True):
            if rows[0] < rows[1]:
                for key, x in module.choices(**part(pattern, inputs, rows, keys)).items():
                    assert whole[key][:, :, slice(*rows), : x.shape[3]].equal(x)


def test_as_many_keys_is_what_it_was(cpu: Engine) -> None:
    """Queries at the end of their keys are those of a chunk: the sequences of a packed prefill."""
    module, ends = cpu("streaming_llm"), torch.tensor([0, 7, 30])
    inputs = inputs_of(pattern_of("streaming_llm"), Shape(30, 30))
    wanted = module.attention(**inputs, cu_seqlens=ends)
    assert torch.equal(module.attention(**inputs, cu_seqlens=ends, cu_seqlens_k=ends), wanted)
    chunk = {"q": torch.cat([inputs["q"][:, :, 4:7], inputs["q"][:, :, 20:]], 2), "k": inputs["k"], "v": inputs["v"]}
    found = module.attention(**chunk, cu_seqlens=torch.tensor([0, 3, 13]), cu_seqlens_k=ends)
    torch.testing.assert_close(found, torch.cat([wanted[:, :, 4:7], wanted[:, :, 20:]], 2), rtol=1e-12, atol=1e-12)


def test_one_graph_and_its_operators(cpu: Engine) -> None:
    module, inputs = cpu("streaming_llm"), packed_inputs("streaming_llm")
    own = {key: x.contiguous().requires_grad_() for key, x in inputs.items()}
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    wanted, found = (f(**own, **told(max_seqlen=11, max_seqlen_k=20)) for f in (module.attention, compiled))
    assert torch.equal(found, wanted)
    grads = [torch.autograd.grad(x.square().sum(), tuple(own.values())) for x in (found, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with Recorded(module) as seen:
        module.attention(**own, **told(scale=0.5)).sum().backward()
    for name, given in seen.calls.items():
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
        assert set(opcheck(seen.operator(name), plain).values()) == {"SUCCESS"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens": None}, "cu_seqlens_k: expected None without cu_seqlens"),
    ({"cu_seqlens_k": None}, r"k: expected 40 tokens like q, with cu_seqlens \(or pass cu_seqlens_k\), got 62"),
    ({"cu_seqlens_k": None, "max_seqlen_k": 20}, "max_seqlen_k: expected None without cu_seqlens_k, got 20"),
    ({"cu_seqlens_k": KEYS}, "cu_seqlens_k: expected a tensor, got list"),
    ({"cu_seqlens_k": torch.tensor(KEYS).float()}, r"cu_seqlens_k: expected int \[sequences \+ 1\]"),
    ({"cu_seqlens_k": torch.tensor(KEYS[:-1])}, "cu_seqlens_k: expected 8 numbers like cu_seqlens, got 7"),
    ({"cu_seqlens_k": torch.tensor([*KEYS[:-1], 63])}, "cu_seqlens_k: expected rising numbers from 0 to at most 62"),
    ({"cu_seqlens_k": torch.tensor([*KEYS[:-1], 2**32 + 62])}, "cu_seqlens_k: expected rising numbers"),
    ({"cu_seqlens_k": torch.tensor(KEYS).flip(0)}, "cu_seqlens_k: expected rising numbers"),
    ({"cu_seqlens_k": torch.zeros(8, dtype=torch.int32, device="meta")}, "cu_seqlens_k: expected device cpu"),
    ({"max_seqlen_k": 19}, "max_seqlen_k: expected at least 20, got 19"),
    ({"max_seqlen": 10}, "max_seqlen: expected at least 11, got 10"),
    ({"max_seqlen_k": 7.0}, "max_seqlen_k: expected a number of tokens, got float"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", WRONG, ids=[message[:50] for _, message in WRONG])
def test_what_does_not_fit_is_refused(cpu: Engine, changes: dict[str, Any], message: str) -> None:
    module, inputs = cpu("streaming_llm"), packed_inputs("streaming_llm")
    for call in (module.attention, module.reference):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            call(**inputs, **{**told(), **changes})


def test_a_compiled_call_sees_keys_outside(cpu: Engine) -> None:
    module, inputs = cpu("streaming_llm"), packed_inputs("streaming_llm")
    compiled = torch.compile(module.attention, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"^cu_seqlens_k, lengths: expected rising numbers from 0 to at most 62"):
        compiled(**inputs, **{**told(), "cu_seqlens_k": torch.tensor([*KEYS[:-1], 70])})


# Right padding ------------------------------------------------------------------------------------------------------

LENGTHS = [37, 1, 0, 18]
PADDED = ["streaming_llm", "document", "dilated", "token_bias", "nsa", "moba", "softmax"]


@pytest.mark.parametrize("name", PADDED)
def test_right_padding(engine: Engine, name: str) -> None:
    """Padding may hold NaN; its rows are empty and its gradients 0."""
    if engine.name == "interpreted" and name not in ("streaming_llm", "document", "nsa"):
        pytest.skip("the same kernels in fewer patterns")
    body = BODIES[name] if name in BODIES else SELECTED[name]
    check_right(body, engine(body), [21, 0, 18] if engine.name == "interpreted" else LENGTHS)


def check_right(body: str, module: Any, lengths: list[int]) -> None:
    batch, size = len(lengths), lengths[0]
    pattern = pattern_of(body)
    inputs = inputs_of(pattern, Shape(size, size, batch))
    streams = [x for x in pattern.inputs if isinstance(x, Stream) and x.compress is None]
    vectors = [x.name for x in pattern.inputs if isinstance(x, Query)]
    vectors += [name for x in streams for name in (x.key_argument, x.value_argument) if name]
    for key in vectors:
        for row, length in enumerate(lengths):
            inputs[key][row, :, length:] = torch.nan
    found = generated(module, pattern, inputs, {"lengths": torch.tensor(lengths), "side": "right"})
    weights = [x.name for x in pattern.inputs if isinstance(x, Weight)]
    for row, length in enumerate(lengths):
        for out, lse in found.parts:
            assert out[row, :, length:].eq(0).all()
            assert lse[row, :, length:].eq(-torch.inf).all()
        for key in vectors:
            assert found.grads[key][row, :, length:].eq(0).all()
        own = {key: x if key in weights or x.shape[0] != batch else x[row : row + 1] for key, x in inputs.items()}
        if length:
            own = part(pattern, own, (0, length), (0, length))
            wanted = dense.results(pattern, own)
            parts = [(out[row : row + 1, :, :length], lse[row : row + 1, :, :length]) for out, lse in found.parts]
            assert_same(Found(parts), Found(wanted))
    assert all(grad.isfinite().all() for grad in found.grads.values())


def test_both_sides_have_the_same_gradients(engine: Engine) -> None:
    """Rows that are rolled to the other side are the same rows."""
    module, lengths = engine("streaming_llm"), torch.tensor([20, 7, 13])
    pattern = pattern_of("streaming_llm")
    inputs = inputs_of(pattern, Shape(20, 20, 3))

    def rolled(x: torch.Tensor, sign: int) -> torch.Tensor:
        return torch.stack([row.roll(sign * (20 - int(n)), 1) for row, n in zip(x, lengths, strict=True)])

    moved = {key: rolled(x, 1) for key, x in inputs.items()}
    right = evaluated(
        lambda x: [module.attention(**x, lengths=lengths, side="right", return_lse=True)], pattern, inputs
    )
    left = evaluated(
        lambda x: [tuple(rolled(y, -1) for y in module.attention(**x, lengths=lengths, return_lse=True))],
        pattern,
        moved,
    )
    left.grads = {key: rolled(x, -1) for key, x in left.grads.items()}
    assert_same(right, left, 1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows, keys, lengths", [(10, 20, [20, 15, 6]), (20, 10, [20, 13, 4])])
def test_other_numbers_of_padded_keys(engine: Engine, rows: int, keys: int, lengths: list[int], side: str) -> None:
    """The real queries are as many as there is room for; the last one stands at the last key."""
    module, pattern = engine("streaming_llm"), pattern_of("streaming_llm")
    inputs = inputs_of(pattern, Shape(rows, keys, 3))
    out, lse = module.attention(**inputs, lengths=torch.tensor(lengths), side=side, return_lse=True)
    for row, length in enumerate(lengths):
        own = {key: x[row : row + 1] for key, x in inputs.items()}
        asked, there = min(length, rows), min(length, keys)
        q_span, k_span = ((size - n, size) if side == "left" else (0, n) for size, n in ((rows, asked), (keys, there)))
        wanted = dense.results(pattern, part(pattern, own, q_span, k_span))
        real = slice(*q_span)
        assert_same(Found([(out[row : row + 1, :, real], lse[row : row + 1, :, real])]), Found(wanted))


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", ["streaming_llm", "document", "nsa"])
def test_prompts_padded_on_the_right(engine: Engine, name: str, page: int | None) -> None:
    if engine.name == "interpreted" and page is None:
        pytest.skip("the same kernels with pages")
    module, pattern, size = engine(BODIES[name]), pattern_of(BODIES[name]), 18
    lengths, shape = [18, 0, 11], Shape(size, size, 3)
    inputs = inputs_of(pattern, shape)
    cache, twin = (nan_cache(module, shape, 40, page) for _ in range(2))
    told = {"lengths": torch.tensor(lengths), "side": "right"}
    found = parts_of(module.prefill(**inputs, cache=cache, return_lse=True, **told))
    stored = {x.name for x in pattern.inputs if not isinstance(x, Query | Choice)}
    names = [name for name in inputs if name in stored or name.startswith(("k", "v"))]
    twin.append(**{name: inputs[name] for name in names}, **told)
    assert cache.lengths.tolist() == twin.lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        for out, lse in found:
            assert out[row, :, length:].eq(0).all()
            assert lse[row, :, length:].eq(-torch.inf).all()
        if length:
            weights = {x.name for x in pattern.inputs if isinstance(x, Weight)}
            own = {key: x if key in weights else x[row : row + 1] for key, x in inputs.items()}
            wanted = dense.results(pattern, part(pattern, own, (0, length), (0, length)), "prefill")
            parts = [(out[row : row + 1, :, :length], lse[row : row + 1, :, :length]) for out, lse in found]
            assert_same(Found(parts), Found(wanted))


@pytest.mark.parametrize("side", ["middle", "Left", None, 1, True, b"left"])
def test_no_other_side(cpu: Engine, side: Any) -> None:
    module, shape = cpu("streaming_llm"), Shape(5, 5)
    inputs, cache = inputs_of(pattern_of("streaming_llm"), shape), nan_cache(module, shape, 40, None)
    for call in (module.attention, module.reference, lambda **x: module.prefill(**x, cache=cache)):
        with pytest.raises(ValueError, match=r'^side: expected "left" or "right", got'):
            call(**inputs, lengths=torch.tensor([3]), side=side)
        with pytest.raises(ValueError, match=r'^side: expected "left" without lengths, got'):
            call(**inputs, side="right")
    assert cache.lengths.tolist() == [0]


BUGS = [
    ("keys where the queries lie", check_packed, "streaming_llm", "return Layout(spans, k_spans,",
     "return Layout(spans, spans,"),
    ("a grid for the queries alone", check_packed, "streaming_llm", "max(longest, most)", "longest"),
    ("padding at the left", check_right, "streaming_llm", 'if side == "left" else', 'if side != "middle" else'),
]  # fmt: skip


@pytest.mark.parametrize("title, run, name, old, new", BUGS, ids=[bug[0] for bug in BUGS])
def test_a_bug_is_seen(engine: Engine, title: str, run: Any, name: str, old: str, new: str, tmp_path: Path) -> None:
    if engine.name == "cpu" and "grid" in title:
        pytest.skip("a grid is for kernels")
    module = engine(broken(printed(name), old, new, tmp_path))
    with pytest.raises((AssertionError, ValueError)):
        run(*(name, module) if run is check_packed else (name, module, [21, 0, 18]))
