"""Kernels of a divergence beside lists: values and gradients against the oracle, and against `reference`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch.library import opcheck

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
    meant,
    parts_of,
    separate,
)
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, printed
from tests.numerics.test_further_results import listed

PLAIN = listed()
# One index head for each list, one key for all, and a first unit that every query chooses: its tiles are several jobs.
FIRST = listed("top_k(2, score = rank, unit = max(16), share = max(group), force = first(1))").replace(
    "asks = query(heads = 4", "asks = query(heads = 2"
)
# Every list has a key head of its own, so nothing is added up behind the kernel.
OWN_KEYS = FIRST.replace("stream(heads = 1,", "stream(heads = 2,")
UNLIKE = FIRST.replace("mean(group)", "sum(group)").replace("attend(chosen)", "attend(chosen, softcap = 1.5)")
BIASED = listed(extra=", bias = -0.125 * (h + 1) * (q - k)", kl="sum(group)")
SCALED = PLAIN.replace("query = asks)", "query = asks, scale = 0.7)")
READ = listed(over="chosen & sliding(19) & where(doc[k] == doc[q])")
UNITS_OF_48 = listed("top_k(2, score = rank, unit = max(48), share = max(group), force = last(1))")


def opened(body: str) -> str:
    """With heads and dims left to the call; as many index heads as query heads."""
    return body.replace("heads query = 4, kv = 2 ", "").replace("heads = 1, qk = 8, ", "").replace(
        "query(heads = 4, dim = 8)", "query()"
    )  # fmt: skip


def second(answer: Any) -> list[Any]:
    """The divergence alone."""
    return parts_of(answer)[1:]


def found_by(module: ModuleType, pattern: Any, inputs: Inputs, **call: Any) -> Found:
    return evaluated(lambda x: second(module.attention(**x, **call, return_lse=True)), pattern, inputs)


def check(body: str, module: ModuleType, shape: Shape) -> None:
    pattern = pattern_of(body)
    inputs = {name: guarded(x) for name, x in inputs_of(pattern, shape).items()}
    found = found_by(module, pattern, inputs, **shape.call())
    assert_same(found, evaluated(lambda x: dense.results(pattern, x, **shape.call())[1:], pattern, inputs))
    assert found.grads["k_index"].abs().sum() > 0 or shape.keys == 1  # of one key all is known


FOUR = Shape(37, 37, heads=4, kv_heads=2)
CASES = {
    "plain": (PLAIN, FOUR), "first": (FIRST, Shape(37, 37, 2, 4, 2)), "own keys": (OWN_KEYS, FOUR),
    "softcap": (UNLIKE, Shape(20, 20, 1, 4, 2)), "bias": (BIASED, Shape(20, 20, 1, 4, 2)),
    "scale": (SCALED, Shape(20, 20, 1, 4, 2)), "documents": (READ, FOUR),
    "units of 48": (UNITS_OF_48, Shape(10, 100, heads=4, kv_heads=2)),
    "groups of 3": (opened(PLAIN), Shape(20, 20, heads=6, kv_heads=2, qk=40)),
    "groups of 16": (opened(PLAIN), Shape(11, 11, heads=16, qk=16)),
    "groups of 1": (opened(PLAIN), Shape(20, 20, heads=2, kv_heads=2, qk=24)),
    "late rows": (PLAIN, Shape(13, 50, heads=4, kv_heads=2)),
    "a part": (PLAIN, Shape(13, 37, heads=4, kv_heads=2, offsets=(20, 0))),
    "one token": (PLAIN, Shape(1, 1, 2, 4, 2)),
}  # fmt: skip


RARE = ("plain", "scale", "groups of 1", "late rows", "one token", "own keys")


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.full] * (one in RARE)) for one in CASES])
def test_values_and_gradients(kernels: Engine, name: str) -> None:
    body, shape = CASES[name]
    module = kernels(body)
    assert hasattr(module, "_result_1_dk")
    check(body, module, shape)


def packed(body: str, module: ModuleType, ends: list[int]) -> None:
    pattern = pattern_of(body)
    inputs = {name: guarded(x) for name, x in inputs_of(pattern, Shape(ends[-1], ends[-1], 1, 4, 2)).items()}
    found = generated(module, pattern, inputs, {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)})
    assert_same(found, separate(pattern, inputs, list(pairwise(ends))))


def test_packed_sequences(kernels: Engine) -> None:
    """One is empty, one has a token, the last has many tiles of a unit."""
    packed(FIRST, kernels(FIRST), [0, 17, 17, 18, 52])


def test_left_padding(kernels: Engine) -> None:
    """Padding may hold NaN; its rows have no divergence and no gradient."""
    lengths, size = [21, 0, 18], 21
    pattern, module = pattern_of(FIRST), kernels(FIRST)
    inputs = inputs_of(pattern, Shape(size, size, 3, 4, 2))
    vectors = [name for name in inputs if name != "doc"]
    for name in vectors:
        for row, length in enumerate(lengths):
            inputs[name][row, :, : size - length] = torch.nan
    found = found_by(module, pattern, inputs, lengths=torch.tensor(lengths))
    for row, length in enumerate(lengths):
        assert found.parts[0][row, :, : size - length].eq(0).all()
        assert all(found.grads[name][row, :, : size - length].eq(0).all() for name in vectors)
        if length:
            own = {name: x[row : row + 1, :, size - length :] for name, x in inputs.items() if name != "doc"}
            own["doc"] = inputs["doc"][row : row + 1, size - length :]
            wanted = meant(pattern, own, backward=False).parts[1]
            torch.testing.assert_close(
                found.parts[0][row : row + 1, :, size - length :], wanted, rtol=1e-10, atol=1e-10
            )
    assert all(grad.isfinite().all() for grad in found.grads.values())


def test_the_same_as_the_reference(kernels: Engine) -> None:
    """`reference` has torch alone, and its gradients."""
    pattern, module = pattern_of(FIRST), kernels(FIRST)
    inputs = inputs_of(pattern, Shape(20, 20, 2, 4, 2))
    assert_same(
        found_by(module, pattern, inputs),
        evaluated(lambda x: second(module.reference(**x, return_lse=True)), pattern, inputs),
    )


def test_lists_that_are_empty(kernels: Engine) -> None:
    """Rows without a unit, and a head of lists without any."""
    pattern, module = pattern_of(FIRST), kernels(FIRST)
    inputs = inputs_of(pattern, Shape(37, 37, 1, 4, 2))
    chosen = dense.choices(pattern, inputs)["chosen"]
    chosen[:, :, 5], chosen[:, 1] = -1, -1
    found = found_by(module, pattern, {**inputs, "chosen": chosen})
    assert found.parts[0][:, :, 5].eq(0).all()
    assert found.parts[0][:, 1].eq(0).all()
    assert found.grads["q_index" if "q_index" in inputs else "asks"][:, 1].eq(0).all()
    own = {**inputs, "chosen": chosen}
    assert_same(found, evaluated(lambda x: second(module.reference(**x, return_lse=True)), pattern, own))


def test_two_runs_agree_to_the_bit(kernels: Engine) -> None:
    pattern, module = pattern_of(FIRST), kernels(FIRST)
    inputs = inputs_of(pattern, Shape(37, 37, 1, 4, 2), torch.float32)
    first, other = (found_by(module, pattern, inputs) for _ in range(2))
    assert torch.equal(first.parts[0], other.parts[0])
    assert all(torch.equal(first.grads[name], other.grads[name]) for name in ("asks", "k_index"))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_other_types(kernels: Engine, dtype: torch.dtype, bound: float) -> None:
    """The divergence and its sums are float32; the gradients round once, to the type of the call."""
    pattern, module = pattern_of(FIRST), kernels(FIRST)
    inputs = inputs_of(pattern, Shape(37, 37, 1, 4, 2), dtype)
    chosen = dense.choices(pattern, {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    found = found_by(module, pattern, {**inputs, **chosen})
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    wanted = evaluated(lambda x: second(module.reference(**x, return_lse=True)), pattern, {**wide, **chosen})
    assert found.parts[0].dtype == torch.float32
    torch.testing.assert_close(found.parts[0].double(), wanted.parts[0], rtol=bound, atol=bound)
    for name in ("asks", "k_index"):
        assert found.grads[name].dtype == dtype
        torch.testing.assert_close(found.grads[name].double(), wanted.grads[name], rtol=bound, atol=4 * bound)


def test_as_pytorch_sees_it(kernels: Engine) -> None:
    """Operators pass opcheck, make one graph with attention, and refuse second derivatives by name."""
    pattern, module = pattern_of(READ), kernels(READ)
    inputs = inputs_of(pattern, Shape(6, 6, 2, 4, 2), torch.float32)
    with Recorded(module) as seen:
        own = found_by(module, pattern, inputs)
    operators = [name for name in seen.calls if "result_1" in name]
    assert len(operators) == 2, seen.calls.keys()
    for name in operators:
        given = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in seen.calls[name])
        assert set(opcheck(seen.operator(name), given).values()) == {"SUCCESS"}
    whole = torch.compile(module.attention, fullgraph=True, backend="aot_eager")
    compiled = evaluated(lambda x: [whole(**x)[1]], pattern, inputs)
    assert torch.equal(own.parts[0], compiled.parts[0])
    assert all(torch.equal(own.grads[name], compiled.grads[name]) for name in own.grads)
    asks = inputs["asks"].requires_grad_()
    (grad,) = torch.autograd.grad(module.attention(**inputs)[1].sum(), asks, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


# What torch keeps: a maximum over heads, rows of heads, a set that differs by head, lists of heads.
BY_TORCH = {
    "max": listed(kl="max(group)"),
    "every head": listed(kl="head"),
    "sets of heads": listed(over="chosen & where(q - k < 9 + h)"),
    "lists of heads": listed("top_k(2, score = rank, unit = max(16), share = head)", kl="head"),
}


@pytest.mark.parametrize("name", BY_TORCH)
def test_torch_keeps_what_kernels_do_not_take(name: str) -> None:
    assert "_result_1_dk" not in printed(BY_TORCH[name])


class Bug(NamedTuple):
    title: str
    check: Callable[[ModuleType], None]
    old: str
    new: str


def plain(module: ModuleType) -> None:
    check(PLAIN, module, FOUR)


def first(module: ModuleType) -> None:
    check(FIRST, module, FOUR)


def sequences(module: ModuleType) -> None:
    packed(FIRST, module, [0, 21, 38])


BUGS = [
    Bug("the running maximum of the score is not followed", first, "z = z * tl.exp2(m - shift) +", "z = z +"),
    Bug("the places of a block are merged as if alike", first, "z * tl.exp2(m - shift[None, :])", "z"),
    Bug("the target is not normalised", plain, "found = (gain / total - tl.log2(total) + norm)",
        "found = (gain / total + norm)"),
    Bug("the gradient of a target that is not normalised", plain, "p / grads.total[None, :]", "p"),
    Bug("the score of the first head for all", plain, "/ R.GROUP\n", "\n"),
    Bug("the gradient of one head for all", plain, "R.SCALE / R.GROUP", "R.SCALE"),
    Bug("all queries of a tile have the first one's list", first, "& chosen & tile.inside[None, :]",
        "& (tl.max(chosen.to(tl.int32), 1) > 0)[:, None] & tile.inside[None, :]"),
    Bug("the mask bit of the first query in dK", first, "place, part, own.lane[None, :]",
        "place, part, own.lane[None, :] * 0"),
    Bug("the list of the first head", first, "visit = rt.visit_units(lists, s, list_head, tile)\n    own",
        "visit = rt.visit_units(lists, s, 0, tile)\n    own"),
    Bug("the last block left out", first, "rt.visited_blocks(visit.count, U, C), disable_licm",
        "rt.visited_blocks(visit.count, U, C) - 1, disable_licm"),
    Bug("keys one further on", first, "(keys.origin + token)[:, None]",
        "(keys.origin + token + 1)[:, None]"),
    Bug("the first part of a unit again and again", first, "list_head, slot + i).data",
        "list_head, slot).data"),
    Bug("the lists of the first head alone", first, "unflatten(1, (k.shape[1], -1)).sum(2)",
        "unflatten(1, (k.shape[1], -1))[:, :, 0]"),
    Bug("tiles of the first sequence", sequences, "inverse.tiles + place) - first_tile", "inverse.tiles + place)"),
    Bug("gradients of the first sequence", sequences, "at(grad, s, list_head, q_start)", "at(grad, s, list_head, 0)"),
]  # fmt: skip


# Much like others.
SELDOM = (
    "the gradient of one head for all", "the score of the first head for all", "keys one further on",
    "the list of the first head", "the last block left out",
)  # fmt: skip


@pytest.mark.parametrize(
    "bug",
    [pytest.param(one, marks=[pytest.mark.full] * (one.title in SELDOM)) for one in BUGS],
    ids=lambda bug: bug.title.replace(" ", "_"),
)
def test_a_bug_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    body = PLAIN if bug.check is plain else FIRST
    seeded = broken(printed(body), bug.old, bug.new, tmp_path)
    with pytest.raises(AssertionError):
        bug.check(kernels(seeded))


@pytest.mark.parametrize("own", [plain, first, sequences], ids=lambda own: own.__name__)
def test_the_same_checks_pass_without_a_bug(kernels: Engine, own: Callable[[ModuleType], None]) -> None:
    own(kernels(PLAIN if own is plain else FIRST))
