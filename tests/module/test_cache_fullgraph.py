"""Steps as one graph: `torch.compile(fullgraph=True, dynamic=True)` of attention, prefill and decode, counted."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.library import opcheck

import spdsl.runtime.cache.compiled as library
from tests.library import broken, launches
from tests.numerics.cases import Inputs, Shape, cut, inputs_of, nan_cache
from tests.numerics.patterns import module_of, pattern_of, printed
from tests.numerics.selected import SELECTED
from tests.numerics.test_gathered import GIVEN

BODIES = {name: name for name in ("causal", "streaming_llm", "document", "gate", "extras", "by_length", "value_is_key")}
BODIES |= {name: SELECTED[name] for name in ("nsa", "moba", "threshold of at least")}
BODIES |= {"token, head": "causal m = tensor(token, head) return attend(all, bias = m[k][h])"}
BODIES |= {"units of 6": GIVEN["units of 6"]}
STAND_IN = library._stand_in
CAPACITY = 150  # more than any other size, no two of which are equal by chance: PyTorch would take them for one
HEADS = {"heads": 4, "kv_heads": 2, "qk": 24, "v": 20}


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    torch.compiler.reset()
    counters.clear()


def graphs() -> int:
    found: int = counters["stats"]["unique_graphs"]
    return found


def compiled(function: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def sizes(name: str, batch: int) -> Shape:
    heads = {} if name == "value_is_key" else HEADS
    return Shape(100, 100, batch, **heads)


class Twins:
    """A cache that compiled steps write to, and one of plain steps; the same tokens for both."""

    def __init__(self, name: str, batch: int, page: int | None, backend: str = "aot_eager", **how: Any) -> None:
        self.module, self.pattern = module_of(BODIES[name]), pattern_of(BODIES[name])
        shape = sizes(name, batch)
        self.inputs, self.at = inputs_of(self.pattern, shape), 0
        heads = {"query_heads": 4} if name == "token, head" else {}
        self.own, self.plain = (nan_cache(self.module, shape, CAPACITY, page, **heads, **how) for _ in range(2))
        self.prefill, self.decode = (compiled(f, backend) for f in (self.module.prefill, self.module.decode))

    def tokens(self, count: int) -> Inputs:
        found = cut(self.pattern, self.inputs, self.at, self.at + count)
        self.at += count
        return {key: x.contiguous() for key, x in found.items()}

    def step(self, phase: str, count: int, **how: Any) -> Any:
        given = self.tokens(count)
        found = getattr(self, phase)(**given, cache=self.own, return_lse=True, **how)
        wanted = getattr(self.module, phase)(**given, cache=self.plain, return_lse=True, **how)
        expect_equal(found, wanted)
        assert torch.equal(self.own.spans, self.plain.spans)
        return found


def expect_equal(found: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
        return
    assert type(found) is type(wanted)
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        expect_equal(x, y)


# One of each form, with pages or without; the product is `full`.
SOME = [("causal", None), ("document", 16), ("extras", None), ("value_is_key", 16), ("nsa", 16), ("token, head", None),
        ("units of 6", 16)]  # fmt: skip
REST = [(name, page) for name in BODIES for page in (None, 16) if (name, page) not in SOME]
CASES = [*SOME, *(pytest.param(*case, marks=pytest.mark.full) for case in REST)]


@pytest.mark.parametrize("name, page", CASES)
def test_one_graph_for_all_steps_of_a_phase(name: str, page: int | None) -> None:
    """One for prompts of any length, one for single tokens; and as many for a batch of one."""
    for batch, more in ((7, 0), (1, 2)):
        twins = Twins(name, batch, page, "aot_eager" if name == "causal" else "eager")
        for count in (13, 9, 2, 19):
            twins.step("prefill", count)
            assert graphs() == more + 1
        for _ in range(3):
            twins.step("decode", 1)
            assert graphs() == more + 2
    twins.step("prefill", 1)
    assert graphs() <= 5, "a prompt of one token"


@pytest.mark.parametrize("name", ["causal", "document", pytest.param("nsa", marks=pytest.mark.full)])
def test_one_graph_for_whole_sequences(name: str) -> None:
    module, pattern = module_of(BODIES[name]), pattern_of(BODIES[name])
    attention = compiled(module.attention, "eager")
    seen = []
    for batch, tokens in ((7, 37), (7, 53), (9, 41), (7, 1), (9, 1), (1, 37), (1, 61), (1, 1)):
        given = inputs_of(pattern, Shape(tokens, tokens, batch, **HEADS))
        assert torch.equal(attention(**given), module.attention(**given))
        seen.append(graphs())
    assert seen[:3] == [1] * 3
    assert seen[4] == seen[3] == 2
    assert seen[6] == seen[5] == 3
    assert seen[7] <= 4


@pytest.mark.parametrize(
    "name, steps",
    [
        ("streaming_llm", 150),
        ("nsa", 30),
        *(pytest.param(x, 1000, marks=pytest.mark.slow) for x in ("streaming_llm", "nsa")),
    ],
)
def test_a_thousand_tokens_are_one_graph(name: str, steps: int) -> None:
    module, pattern, shape = module_of(BODIES[name]), pattern_of(BODIES[name]), Shape(steps, steps, batch=2)
    inputs, decode = inputs_of(pattern, shape, torch.float32), compiled(module.decode, "eager")
    cache = nan_cache(module, shape, steps + 7, 16, dtype=torch.float32)
    for token in range(steps):
        out = decode(**cut(pattern, inputs, token, token + 1), cache=cache)
    assert graphs() == 1
    assert cache.lengths.tolist() == [steps] * 2
    whole = module.attention(**inputs)[:, :, -1:]
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_stands_around_is_in_the_graph(backend: str) -> None:
    """And the buffers of the cache are written where they are."""
    twins, places = Twins("document", 3, 16, backend), list[list[int]]()

    def layer(given: Inputs, cache: Any) -> Tensor:
        out: Tensor = twins.module.decode(**{**given, "q": given["q"].sin()}, cache=cache)
        return out.cos()

    def noted(*held: Any) -> Any:
        places.append([x.data_ptr() for x in held[-1]])
        return STAND_IN(*held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_stand_in", noted)
        run = compiled(layer, backend)
        for _ in range(4):
            given = twins.tokens(1)
            torch.testing.assert_close(run(given, twins.own), layer(given, twins.plain), rtol=1e-12, atol=1e-12)
    assert graphs() == 1
    buffers = [twins.own.spans, twins.own.dropped, *twins.own.k.values(), *twins.own.v.values()]
    assert places == [[x.data_ptr() for x in (*buffers, *twins.own.tokens.values())]] * 4


@pytest.mark.parametrize("name, page", [("streaming_llm", None), pytest.param("nsa", 16, marks=pytest.mark.full)])
def test_which_tokens_a_compiled_call_brings(name: str, page: int | None) -> None:
    twins = Twins(name, 3, page, "eager")
    twins.step("prefill", 11, lengths=torch.tensor([11, 0, 6]))
    twins.step("prefill", 11, lengths=torch.tensor([2, 9, 11]), side="right")
    twins.step("prefill", 13, rows=None, scale=0.7)
    for rows in ([2, 0], torch.tensor([1, 2])):
        given = {key: x[:2] if x.shape[0] == 3 else x for key, x in twins.tokens(1).items()}
        how = {"rows": rows, "return_lse": True}
        expect_equal(
            twins.decode(**given, cache=twins.own, **how), twins.module.decode(**given, cache=twins.plain, **how)
        )
    one = {key: x[:1] if x.shape[0] == 3 else x for key, x in twins.tokens(17).items()}
    packed = {"cu_seqlens": torch.tensor([0, 5, 5, 17]), "max_seqlen": 12}
    expect_equal(
        twins.prefill(**one, cache=twins.own, **packed), twins.module.prefill(**one, cache=twins.plain, **packed)
    )
    assert torch.equal(twins.own.lengths, twins.plain.lengths)


@pytest.mark.parametrize("page", [None, 16])
def test_tokens_without_room_are_dropped(page: int | None) -> None:
    """A graph knows no length: nothing is refused for overflow, and the tokens count as dropped."""
    twins = Twins("streaming_llm", 3, page)
    given = twins.tokens(100)
    twins.prefill(**given, cache=twins.own)
    twins.own.truncate(torch.tensor([100, 40, 0]))
    out, lse = twins.prefill(**given, cache=twins.own, return_lse=True)
    assert twins.own.lengths.tolist() == [150, 140, 100]
    assert twins.own.dropped.tolist() == [50, 0, 0]
    assert out[0, :, 50:].eq(0).all()
    assert lse[0, :, 50:].eq(-torch.inf).all()
    assert lse[1:].isfinite().all()
    twins.own.truncate(150)
    one = {key: x[:, :, :1] for key, x in given.items()}
    out, lse = twins.decode(**one, cache=twins.own, return_lse=True)
    assert out[0].eq(0).all()
    assert lse[0].eq(-torch.inf).all()
    assert lse[1:].isfinite().all()
    assert twins.own.dropped.tolist() == [51, 0, 0]


def test_the_host_knows_nothing_afterwards_and_learns_anew() -> None:
    twins = Twins("document", 3, 16)
    given = twins.tokens(100)
    twins.prefill(**given, cache=twins.own)
    assert twins.own._known() == (0, CAPACITY)
    twins.module.prefill(
        **{key: x[..., :70, :] if x.dim() == 4 else x[:, :70] for key, x in given.items()}, cache=twins.own
    )
    assert twins.own.lengths.tolist() == [150] * 3, "what finds no room is dropped, since nobody knows"
    twins.own.reset()
    twins.module.prefill(**given, cache=twins.own)
    with pytest.raises(ValueError, match=r"^k: expected at most 50 more tokens"):
        twins.module.prefill(**given, cache=twins.own)


def test_a_ring() -> None:
    twins = Twins("streaming_llm", 3, 16)
    own, plain = (twins.module.Cache(3, 500, kv_heads=2, qk_dim=24, v_dim=20, page=16, ring=21, dtype=torch.float64)
                  for _ in range(2))  # fmt: skip
    twins.own, twins.plain = own, plain
    for count in (17, 21, 9, 14):
        twins.step("prefill", count)
    for _ in range(3):
        twins.step("decode", 1)
    assert graphs() == 2
    own.truncate(own.lengths - 3)
    plain.truncate(plain.lengths - 3)
    twins.step("decode", 1)
    with pytest.raises(ValueError, match=r"^k: expected at most 21 tokens at once \(ring\), got 22"):
        twins.prefill(**twins.tokens(22), cache=own)


def test_under_inference_mode_and_autocast() -> None:
    twins = Twins("streaming_llm", 3, 16)
    with torch.inference_mode():
        twins.step("prefill", 12)
        twins.step("decode", 1)
    halves = Twins("streaming_llm", 3, 16, dtype=torch.bfloat16)
    halves.inputs = {key: x.float() for key, x in halves.inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = halves.step("prefill", 12)
        halves.step("decode", 1)
    assert found.dtype == torch.bfloat16


def test_no_gradient_flows() -> None:
    twins = Twins("streaming_llm", 3, None)
    given = {key: x.requires_grad_() for key, x in twins.tokens(5).items()}
    assert not twins.prefill(**given, cache=twins.own).requires_grad


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"k": zeros(3, 1, 5, 24), "v": zeros(3, 1, 5, 20)}, r"k: expected \[3, 2, tokens, 24\] like the cache"),
    ({"v": torch.zeros(3, 2, 5, 20, dtype=torch.float32)}, "v: expected dtype torch.float64 like"),
    ({"q": zeros(3, 4, 6, 24)}, "k: expected 6 tokens like q, got 5"),
    ({"lengths": torch.tensor([5, 5])}, r"lengths: expected int \[3\]"),
    ({"lengths": torch.tensor([5, 6, 0])}, "(cu_seqlens, )?lengths: expected numbers from 0 to 5"),
    ({"rows": torch.tensor([0, 1, 3])}, "rows: expected numbers from 0 to 2"),
    ({"rows": [0, 1, 1]}, "rows: expected numbers from 0 to 2, each once, got a row twice"),
    ({"side": "right"}, 'side: expected "left" without lengths'),
    ({"scale": -1.0}, "scale: expected a number from"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_does_not_fit_is_refused_when_it_runs(changes: dict[str, Any], message: str) -> None:
    twins = Twins("streaming_llm", 3, 16, "eager")
    with pytest.raises((ValueError, RuntimeError)) as caught:
        twins.prefill(**{**twins.tokens(5), **changes}, cache=twins.own)
    assert re.search(message, str(caught.value))
    assert twins.own.lengths.tolist() == [0, 0, 0]
    assert torch.is_grad_enabled()


def test_arguments_by_place_and_by_name() -> None:
    twins = Twins("streaming_llm", 3, 16)
    q, k, v = twins.tokens(5).values()
    twins.prefill(q, k, v, twins.own)
    twins.prefill(q, k, cache=twins.own, v=v)
    assert twins.own.lengths.tolist() == [10] * 3
    for wrong in (
        lambda **x: twins.prefill(q, k, v, twins.own, q=q),
        lambda **x: twins.prefill(q, k, v, cach=twins.own),
    ):
        with pytest.raises(Exception, match=r"multiple values|unexpected keyword|missing a required|cach"):
            wrong()
    assert twins.own.lengths.tolist() == [10] * 3


@pytest.mark.parametrize("name, page", [("streaming_llm", None), ("nsa", 16)])
def test_the_operators_are_what_they_say(name: str, page: int | None) -> None:
    twins, kept = Twins(name, 3, page), list[list[Any]]()
    for step, count in (("prefill", 9), ("decode", 1)):
        operator = getattr(getattr(torch.ops, twins.module.MODULE.namespace), f"{step}_step").default
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "_stand_in", lambda *held: kept.append([*held[2:]]) or STAND_IN(*held))
            getattr(twins, step)(**twins.tokens(count), cache=twins.own)
        given = twins.tokens(count)
        names = [x for x in inspect.signature(getattr(twins.module, step)).parameters if x in given or x == "chosen"]
        *sizes, states = kept[-1]
        # Zeros: buffers full of NaN are not equal to themselves.
        whole = [[given.get(x) for x in names], None, "left", None, None, None, None, None, *sizes]
        verdicts = opcheck(operator, [*whole, [torch.zeros_like(x) for x in states]])
        assert set(verdicts.values()) == {"SUCCESS"}, verdicts


def test_the_host_forgets_where_no_version_tells() -> None:
    """Inductor may change a buffer without a count; then what was known before would be refused wrongly."""
    twins = Twins("streaming_llm", 3, 16)
    twins.module.prefill(**twins.tokens(100), cache=twins.own)
    assert twins.own._known() == (100, 100)
    twins.decode(**{key: x[:, :, :1] for key, x in twins.inputs.items()}, cache=twins.own)
    assert (twins.own.at_least, twins.own.at_most >= CAPACITY) == (0, True)


BUGS = [
    ("nothing is dropped", lambda: test_tokens_without_room_are_dropped(16),
     "self.watched, self.at_least, self.at_most = False, 0, capacity",
     "self.watched, self.at_least, self.at_most = False, 0, 0"),
    ("what the host knew is kept", test_the_host_forgets_where_no_version_tells,
     "cache.at_least, cache.at_most, cache.grown = 0, INT32_MOST, True", "pass"),
    ("of a ring all counts as taken back", test_a_ring, "if not self.grown:", "if True:"),
    ("a scale gets lost", lambda: test_which_tokens_a_compiled_call_brings("streaming_llm", None),
     "return_lse=True, scale=scale)", "return_lse=True)"),
]  # fmt: skip


@pytest.mark.parametrize("title, run, old, new", BUGS, ids=[bug[0] for bug in BUGS])
def test_a_bug_is_seen(title: str, run: Any, old: str, new: str, tmp_path: Path) -> None:
    module: ModuleType = broken(printed("streaming_llm"), old, new, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.module.test_cache_fullgraph.module_of", lambda name: module)
        with pytest.raises((AssertionError, ValueError)):
            run()


@pytest.mark.interpret
@pytest.mark.parametrize("name, page", [("streaming_llm", 16), ("nsa", None)])
def test_with_kernels(name: str, page: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(name, 3, page, "eager")
    if not launches(twins.module).INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    monkeypatch.setattr(launches(twins.module), "KERNELS_ON_CPU", True)
    for count in (9, 4):
        twins.step("prefill", count)
    twins.step("decode", 1, scale=0.3)
    twins.step("decode", 1, scale=0.3)
    assert graphs() == 2
