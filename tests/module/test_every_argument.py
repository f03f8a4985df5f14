"""Every argument of every public function with everything that it is not: refused by its name, and nothing changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from numbers import Real
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spdsl
from tests.library import launches
from tests.module.patterns import arguments

# An input of every kind: two queries, two streams, tensors over every axis, a sink, a bias, a given list, a gate.
KINDS = """
pattern kinds {
    causal
    ask   = query()
    other = stream()
    sinks = tensor(head)
    slope = tensor(head)
    per   = tensor(kv_head)
    flags = tensor(8, bool)
    doc   = tensor(token, int)
    level = tensor()
    tiles = given(unit = 16, rows = 16)
    near  = attend(sliding(8) | tiles, bias = -slope[h] * (q - k), sink_logit = sinks)
    docs  = attend(other[where(doc[k] == doc[q] & flags[q % 8] & per[h // 2] > level)], query = ask)
    return gate(near, docs)
}
"""
# What is learned or chosen: weights of a compressed stream, lists of units.
LEARNED = """
pattern learned {
    causal
    entries = compress(8, 4, by = mlp)
    coarse  = attend(entries)
    chosen  = top_k(2, score = mass(coarse), unit = 16, share = group, force = first(1) | last(1))
    return gate(coarse, attend(chosen))
}
"""
NUMBERS = [
    7.0,
    1.5,
    float("nan"),
    "7",
    True,
    [7],
    np.array(7),
    np.float32(7),
    torch.tensor(7),
    3 + 0j,
    Fraction(7),
    b"7",
]
FLAGS = [1, 0, None, "no", torch.tensor(True), np.bool_(True)]
TENSORS = [None, 1.0, "x", [1.0], np.zeros(3), torch.float32]
OUTSIDE = {"batch": [-1, 2**31], "tokens": [-1, 2**31], "capacity": [-1, 0, 2**31, 2**63]}
OUTSIDE |= {"page": [-16, 0, 1, 8, 24, 2**40], "q_offset": [-1, 2**31], "k_offset": [-1, 2**31, 2**64]}
OUTSIDE |= {
    "max_seqlen": [-1, 4, 2**31],
    "max_seqlen_k": [-1, 4, 2**31],
    "side": ["", "Right", None],
    "scale": [0, -1.0],
    "heads": [-1, 0],
    "kv_heads": [-1],
    "qk_dim": [-1],
    "v_dim": [-1, 0],
}
pytestmark = pytest.mark.filterwarnings("ignore:.*(Sparse|nested|quantiz).*")
REFUSED = (TypeError, ValueError, NotImplementedError)


def strange(x: Tensor) -> Iterator[Any]:
    """Tensors that are like x, but for one property."""
    yield from TENSORS
    yield torch.zeros(x.shape).to_sparse()
    yield torch.quantize_per_tensor(torch.zeros(x.shape), 0.1, 0, torch.quint8)
    yield torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)])
    yield torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)], layout=torch.jagged)
    for dtype in (torch.complex64, torch.uint64, torch.uint16, torch.bool, torch.float32, torch.int32):
        if kind(dtype) != kind(x.dtype):
            yield torch.zeros(x.shape, dtype=dtype)
    yield torch.zeros(x.shape, dtype=x.dtype, device="meta")
    yield torch.zeros((3, *x.shape, 1), dtype=x.dtype)


def wider(x: Tensor) -> Tensor:
    """The same with one more in the last axis."""
    return torch.zeros((*x.shape[:-1], x.shape[-1] + 1) if x.dim() else 3, dtype=x.dtype)


def kind(dtype: torch.dtype) -> str:
    plain = dtype in (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
    return "float" if plain and dtype.is_floating_point else "bool" if dtype == torch.bool else "int" if plain else "no"


@pytest.fixture(scope="module", params=[KINDS, LEARNED], ids=["kinds", "learned"])
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    found = spdsl.load(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches(found), "KERNELS_ON_CPU", False)
        yield found


def expect_refused(
    function: Callable[..., Any], given: dict[str, Any], name: str, value: Any, others: Collection[str] = ()
) -> None:
    """The message begins with the name, or where two arguments do not fit together, with one of the `others`."""
    with pytest.raises(REFUSED) as caught:
        function(**{**given, name: value})
    named = str(caught.value).partition(":")[0].split(", ")
    assert name in named or not {*named}.isdisjoint(others), f"{name}={value!r:.80}: {caught.value}"


LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"cu_seqlens": torch.tensor([0, 10, 24]), "max_seqlen": 14},
    "packed keys": {
        "cu_seqlens": torch.tensor([0, 10, 24]),
        "cu_seqlens_k": torch.tensor([0, 12, 24]),
        "max_seqlen_k": 12,
    },
    "padded": {"lengths": torch.tensor([20])},
    "padded on the right": {"lengths": torch.tensor([20]), "side": "right"},
    "scaled": {"scale": 0.5},
    "part": {"q_offset": 0, "k_offset": 0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_sequences(module: ModuleType, layout: str) -> None:
    """Tensors of the pattern are the same in all layouts: they are tried in one."""
    given = {**arguments(module, 24, batch=1), **LAYOUTS[layout]}
    if "tiles" in given and layout.startswith("packed"):
        given["tiles"] = given["tiles"][:, :, :1].expand(2, -1, -1, -1)
    for function in (module.attention, module.reference):
        function(**given)
        tried = given if layout == "dense" and function == module.attention else LAYOUTS[layout]
        for name, value in tried.items():
            numbers = NUMBERS if name != "scale" else [x for x in NUMBERS if isinstance(x, bool) or not _real(x)]
            wrong = strange(value) if isinstance(value, Tensor) else (*numbers, *OUTSIDE[name])
            for other in wrong:
                if not (other is None and name in LAYOUTS[layout] and name != "side"):
                    others = ("k", "ask") if name == "q" else ("cu_seqlens_k",) if name == "cu_seqlens" else ()
                    expect_refused(function, given, name, other, others=others)
            if name not in LAYOUTS[layout] and name != "tiles":  # a list has any number of units
                expect_refused(function, given, name, wider(value), others=given)
        for flag in FLAGS:
            expect_refused(function, given, "return_lse", flag)


def _real(x: Any) -> bool:
    return isinstance(x, Real) and x == x


ENDS = [[1, 24], [0, 25], [0, 12, 11, 24], [-1, 24], [0, 2**32 + 24], [2**32, 24], [0, -(2**32), 24], [0, 2**63 - 1]]


@pytest.mark.parametrize("path", ["eager", "compiled"])
def test_numbers_of_sequences(path: str) -> None:
    """What does not fit 32 bits is seen before it is cut."""
    module = spdsl.load("pattern p { causal return attend(sliding(8)) }")
    given = arguments(module, 24, batch=1)
    call = module.attention if path == "eager" else torch.compile(module.attention, fullgraph=True, backend="eager")
    for ends in ENDS:
        if path == "eager" or ends != [1, 24]:  # a compiled graph sees spans alone, and these lie inside
            with pytest.raises(ValueError, match=r"^cu_seqlens"):
                call(**given, cu_seqlens=torch.tensor(ends))
    for length in (-1, 25, 2**32 + 3, 2**63 - 1, -(2**32) + 3):
        with pytest.raises(ValueError, match=r"^(cu_seqlens, )?lengths: expected"):
            call(**given, lengths=torch.tensor([length]))
    for length in (0, 24):
        call(**given, lengths=torch.tensor([length]))
    out, lse = call(**given, cu_seqlens=torch.tensor([0, 5, 20]), return_lse=True)
    assert (out[:, :, 20:] == 0).all()
    assert (lse[:, :, 20:] == -torch.inf).all(), "tokens behind the last sequence are in none"


def generation(module: ModuleType, tokens: int) -> tuple[dict[str, Any], Any]:
    given: dict[str, Any] = arguments(module, tokens, batch=2)
    cache = module.Cache(2, 40, kv_heads=2, qk_dim=16, v_dim=24, page=16)
    return {**given, "cache": cache}, cache


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_steps_leave_the_cache(module: ModuleType, phase: str) -> None:
    given, cache = generation(module, 1 if phase == "decode" else 5)
    step = getattr(module, phase)
    kept = [x.clone() for x in (*cache.k.values(), *cache.v.values())]
    names = [name for name, x in given.items() if isinstance(x, Tensor)]
    for name in names:
        for other in strange(given[name]):
            expect_refused(step, given, name, other, others=("k", "ask") if name == "q" else ())
        if name != "tiles":
            expect_refused(step, given, name, wider(given[name]), others=given)
    if "chosen" in inspect.signature(step).parameters:
        for other in (1.0, torch.zeros(2, 2, 1, 3), torch.zeros(2, 2, 9, 3, dtype=torch.int32)):
            expect_refused(step, given, "chosen", other)
    for flag in FLAGS:
        expect_refused(step, given, "return_lse", flag)
    twin = spdsl.load("pattern p { causal return attend(sliding(8)) }")
    for other in (None, 3, torch.zeros(2), object(), twin.Cache(2, 40, kv_heads=2, qk_dim=16, v_dim=24)):
        expect_refused(step, given, "cache", other)
    assert cache.lengths.tolist() == cache.dropped.tolist() == [0, 0]
    assert cache.at_least == 0
    assert all(torch.equal(x, y) for x, y in zip(kept, (*cache.k.values(), *cache.v.values()), strict=True))
    step(**given)
    assert cache.lengths.tolist() == [given["q"].shape[2]] * 2


def test_sizes_of_a_cache_and_of_examples(module: ModuleType) -> None:
    sizes: dict[str, Any] = {"batch": 2, "capacity": 40, "kv_heads": 2, "qk_dim": 16, "v_dim": 24, "page": 16}
    example = {"batch": 2, "tokens": 5, "heads": 4, "kv_heads": 2, "qk_dim": 16, "v_dim": 24}
    for function, given in ((module.Cache, sizes), (module.example_inputs, example)):
        for name in given:
            for other in (*NUMBERS, *OUTSIDE[name]):
                expect_refused(function, given, name, other, others=("kv",) if name in ("kv_heads", "qk_dim") else ())
        for other in ("float32", torch.int32, torch.complex64, torch.uint64, torch.float8_e5m2, None):
            expect_refused(function, given, "dtype", other)
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    for other in (table.tolist(), table.numpy(), table.long(), table.float(), table[0], table.to_sparse(), 3):
        expect_refused(module.Cache, sizes, "page_table", other)
    for page in (2**31 - 1, 2**24, -2, -(2**31)):
        table[1, 2] = page
        expect_refused(module.Cache, sizes, "page_table", table)
    expect_refused(module.Cache, sizes, "page_table", torch.zeros(2, 3, dtype=torch.int32, device="meta"))
    table[1, 2] = 8  # storage beyond what the table needs is fine, in moderation
    assert module.Cache(**{**sizes, "page_table": table}).page_table.tolist() == table.tolist()
    for wrong in ({"pages": 3}, {"capcity": 40}):
        with pytest.raises(TypeError, match=r"unexpected keyword argument '(pages|capcity)'"):
            module.Cache(**sizes, **wrong)


ROWS: list[Any] = [[3], [-4], 3, -4, [2**63], [1.0], [0.5, 1.5], 1.0, "0", ["0"], [None], True, [True, 1], [0, False]]
ROWS += [
    [True],
    [True] * 4,
    [[0]],
    {0},
    slice(0, 1),
    torch.tensor([3]),
    torch.tensor([1.0]),
    torch.tensor([True, False]),
]
ROWS += [torch.tensor(True), torch.tensor([[0]]), torch.tensor([0, 1], dtype=torch.uint8), np.array([0]), object()]
ROWS += [torch.tensor([2**32]), torch.tensor([0j]), torch.tensor([[True, False, True]])]
ROWS += [torch.tensor([0, 1]).to_sparse(), torch.tensor([0], device="meta")]
EMPTIED: list[tuple[Any, list[int]]] = [
    (None, [0, 0, 0]), ([0], [0, 5, 5]), ([-1], [5, 5, 0]), (1, [5, 0, 5]), ((0, 2), [0, 5, 0]), (range(2), [0, 0, 5]),
    ([False, True, True], [5, 0, 0]), ([False] * 3, [5, 5, 5]), ([], [5, 5, 5]), (torch.tensor([2, 0, 2]), [0, 5, 0]),
    (torch.tensor([1], dtype=torch.int32), [5, 0, 5]), (torch.tensor([True, False, True]), [0, 5, 0]),
    (torch.tensor(-3), [0, 5, 5]), (torch.tensor([], dtype=torch.long), [5, 5, 5]), ([np.int64(1)], [5, 0, 5]),
]  # fmt: skip


def test_rows_that_are_emptied(module: ModuleType) -> None:
    cache = module.Cache(3, 40, kv_heads=2, qk_dim=16, v_dim=24)
    for rows in ROWS:
        cache.lengths.fill_(5)
        cache.at_least = 5
        expect_refused(cache.reset, {}, "rows", rows)
        assert cache.lengths.tolist() == [5, 5, 5]
        assert cache.at_least == 5
    for rows, left in EMPTIED:
        cache.lengths.fill_(5)
        cache.reset(rows)
        assert cache.lengths.tolist() == left, rows


def test_transforms_of_functions(module: ModuleType) -> None:
    given = arguments(module, 24, batch=1)
    rest = {name: x for name, x in given.items() if name != "q"}

    def total(q: Tensor) -> Tensor:
        return module.attention(q, **rest).sum()

    for transform in (torch.func.grad, torch.func.jacrev, lambda f: lambda q: torch.func.vjp(f, q)):
        with pytest.raises(NotImplementedError, match=r"^q: no derivative by torch.func"):
            transform(total)(given["q"])
    with pytest.raises(NotImplementedError, match=r"^q: no forward-mode derivative"):
        torch.func.jvp(total, (given["q"],), (given["q"],))


API: list[tuple[Callable[..., Any], dict[str, list[Any]]]] = [
    (
        spdsl.compile,
        {
            "pattern": [3, b"p", ["p"]],
            "window": ["4", None, True, float("nan"), float("inf"), [7], 3 + 0j, np.array(7), np.bool_(1)],
        },
    ),
    (spdsl.load, {"pattern": [3], "window": [None, float("nan"), -float("inf"), True]}),
    (
        spdsl.check,
        {"length": [1.5, True, "8k", 0, -1, 2**31], "target": [3, "h201"], "allow": ["W501", 3, [501], None]},
    ),
]


@pytest.mark.parametrize("function, wrong", API, ids=["compile", "load", "check"])
def test_the_python_interface(function: Callable[..., Any], wrong: dict[str, list[Any]]) -> None:
    text = "pattern p { param window = 4 causal return attend(sliding(window)) }"
    for source in (None, 3, b"x", ["x"], object()):
        with pytest.raises(TypeError, match=r"^path_or_text: expected a path or a text"):
            function(source)
    for name, values in wrong.items():
        for value in values:
            expect_refused(
                lambda **given: function(text, **given),
                {},
                name,
                value,
                others=(f"parameter {name}", f"unknown {name} {value!r}"),
            )
