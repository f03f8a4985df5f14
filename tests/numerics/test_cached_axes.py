"""Tensors over tokens with any other axes but `query` are cached: the table of axes, through every phase and event."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest

from tests.numerics.cases import Shape, inputs_of, nan_cache
from tests.numerics.conftest import Engine
from tests.numerics.events import CHANGES, events_of
from tests.numerics.patterns import pattern_of

OTHERS = ("head", "kv_head", "3")
AXES = [order for n in range(3) for more in combinations(OTHERS, n) for order in permutations(("token", *more))]
INDEX = {"head": "h", "kv_head": "h", "3": "1"}
KINDS = ("float", "bool", "int")


def body_of(axes: tuple[str, ...], kind: str) -> str:
    def read(position: str) -> str:
        return "m" + "".join(f"[{position if axis == 'token' else INDEX[axis]}]" for axis in axes)

    sets = {
        "float": f"attend(sliding(20), bias = {read('k')})",
        "bool": f"attend(sliding(3) | where({read('k')}))",
        "int": f"attend(sliding(3) | where({read('k')} == {read('q')}))",
    }
    declared = ", ".join((*axes, *([kind] if kind != "float" else [])))
    return f"causal m = tensor({declared}) return {sets[kind]}"


# Each order of axes with one kind and one layout of pages in turn; the product is `full`.
TABLE = [(axes, KINDS[i % 3], (None, 16)[i // 3 % 2]) for i, axes in enumerate(AXES)]
REST = [(axes, kind, page) for axes in AXES for kind in KINDS for page in (None, 16)]
CASES = [*TABLE, *(pytest.param(*case, marks=pytest.mark.full) for case in REST if case not in TABLE)]


@pytest.mark.parametrize("axes, kind, page", CASES, ids=str)
def test_every_phase_and_event(cpu: Engine, axes: tuple[str, ...], kind: str, page: int | None) -> None:
    body = body_of(axes, kind)
    shape = Shape(batch=3, heads=4, kv_heads=2)
    events = events_of(cpu(body), pattern_of(body), shape, page, 44, 1)
    events.run(2, ["prefill", "append"])
    for change in CHANGES:
        for event in (change, "decode", "prefill", "append", "decode"):
            events.run(1, [event])


@pytest.mark.parametrize("axes, kind, page", [TABLE[i] for i in (3, 9, 17)], ids=str)
def test_with_kernels(kernels: Engine, axes: tuple[str, ...], kind: str, page: int | None) -> None:
    body = body_of(axes, kind)
    events = events_of(kernels(body), pattern_of(body), Shape(batch=2, heads=4, kv_heads=2), page, 40, 1)
    events.run(2, ["prefill", "append"])
    for change in ("truncate", "select"):
        for event in (change, "decode", "prefill"):
            events.run(1, [event])


@pytest.mark.parametrize("axes, kind, page", TABLE, ids=str)
def test_on_meta(cpu: Engine, axes: tuple[str, ...], kind: str, page: int | None) -> None:
    """Shapes alone, of the same sizes."""
    module, pattern = cpu(body_of(axes, kind)), pattern_of(body_of(axes, kind))
    shape = Shape(5, 5, batch=2, heads=4, kv_heads=2)
    inputs, kept = inputs_of(pattern, shape), []
    for device in ("cpu", "meta"):
        cache = nan_cache(module, shape, 40, page, device=device)
        out, lse = module.prefill(**{x: y.to(device) for x, y in inputs.items()}, cache=cache, return_lse=True)
        cache.truncate(3)
        cache.select([1, 0])
        kept.append((out.shape, lse.shape, cache.kept(), [x.shape for x in cache.export_states().values()]))
    assert kept[0] == kept[1]
