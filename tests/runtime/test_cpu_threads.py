"""Work in threads of one core each: order, failures, settings; and that the CPU path leaves nothing to wait for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spdsl
from spdsl.runtime.cpu import cpu, cpu_threads, cpu_unit_tiles, cpu_units
from spdsl.runtime.cpu.cpu_threads import in_order, on_cores

CAUSAL = "pattern p { causal return attend(sink(4) | sliding(64)) }"
SELECTED = """pattern p { heads query = 4, kv = 2 dim qk = 16, v = 16 causal
entries = compress(16, 8) coarse = attend(entries)
chosen = top_k(4, score = mass(coarse), unit = 16, share = group, force = last(1))
return gate(coarse, attend(kv[chosen]), attend(sliding(48))) }"""


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch works on several threads, whatever the machine; afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


several = pytest.mark.parametrize("threads", [2, 3, 7], indirect=True)


@several
def test_results_are_taken_in_order_whoever_is_done_first(threads: int) -> None:
    first_may_end, taken, by = threading.Event(), list[int](), set[int]()

    def run(number: int) -> int:
        by.add(threading.get_ident())
        if number == 0:  # ends after some others
            first_may_end.wait(10)
        elif number == 3:
            first_may_end.set()
        return number

    in_order(60, run, taken.append)
    assert taken == list(range(60))
    assert 2 <= len(by) <= threads


@several
def test_a_late_piece_holds_up_the_others(threads: int) -> None:
    """What waits for a piece is bounded, or memory would grow with the length."""
    started, may_end = list[int](), threading.Event()

    def run(number: int) -> None:
        if number == 0:
            may_end.wait(0.3)
        started.append(number)
        if number == 0:
            assert len(started) <= cpu_threads._PIECES_AHEAD * threads

    in_order(1000, run, lambda _: None)
    assert len(started) == 1000


@several
@pytest.mark.parametrize("place", ["run", "take"])
def test_a_failure_comes_out_and_stops_the_rest(threads: int, place: str) -> None:
    done = list[int]()

    def fail(number: int) -> int:
        if number == 5:
            raise ZeroDivisionError(number)
        return number

    run: Callable[[int], int] = fail if place == "run" else lambda number: number
    with pytest.raises(ZeroDivisionError, match="5"):
        in_order(10_000, run, lambda number: done.append(number if place == "run" else fail(number)))
    assert done == list(range(5))
    assert threading.active_count() < threads + 10


@several
def test_each_thread_keeps_one_core_and_no_setting_changes(threads: int) -> None:
    inside, later = set[int](), list[int]()
    in_order(50, lambda _: inside.add(torch.get_num_threads()), lambda _: None)
    assert inside == {1}
    assert torch.get_num_threads() == threads
    other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert later == [threads]
    with pytest.raises(ZeroDivisionError), on_cores(1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads


def test_one_thread_starts_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread"))
    taken = list[int]()
    with on_cores(1):
        in_order(20, lambda number: number, taken.append)
    assert taken == list(range(20))


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_after_use_computes_the_same(threads: int, tmp_path: Path) -> None:
    module = spdsl.load(CAUSAL)
    q, k, v = torch.randn(3, 1, 2, 900, 16)
    want = module.attention(q, k, v)
    child = os.fork()
    if child == 0:
        # One core: the OpenMP of torch itself may not survive a fork.
        with on_cores(1):
            same = torch.equal(module.attention(q, k, v), want)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def results(module: object, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Output, lse and gradients."""
    leaves = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    out, lse = module.attention(**leaves, return_lse=True)  # type: ignore[attr-defined]
    wanted = [x for x in leaves.values() if x.requires_grad]
    lses = [x for x in (lse if isinstance(lse, tuple) else [lse]) if x is not None]
    return [out, *lses, *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_no_bit_depends_on_the_threads(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = spdsl.load(CAUSAL)
    q = torch.randn(1, heads[0], 2500, 16)
    inputs = {"q": q, "k": torch.randn(1, heads[1], 2500, 16), "v": torch.randn(1, heads[1], 2500, 16)}
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 2, 3, 7):
        torch.set_num_threads(count)
        found.append(results(module, inputs))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("threads", [3], indirect=True)
def test_a_selected_pattern_in_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small blocks of rows: right, and the same each time."""
    torch.manual_seed(0)
    module = spdsl.load(SELECTED)
    inputs = module.example_inputs(1, 300)
    monkeypatch.setattr(cpu_unit_tiles, "_UNIT_RESULTS", 1 << 12)
    first, again = results(module, inputs), results(module, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = module.attention(**{name: x.double() for name, x in inputs.items()})
    torch.testing.assert_close(first[0].double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", [CAUSAL, SELECTED])
def test_tiles_are_computed_on_one_core_each(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The property behind "beside other work": no product of a tile waits for a second core."""
    module = spdsl.load(source)
    inputs = module.example_inputs(1, 1600)
    monkeypatch.setattr(cpu_unit_tiles, "_UNIT_RESULTS", 1 << 14)
    seen = dict[str, set[int]]()
    for file in (cpu, cpu_units):
        for name in ("tile_data", "scatter_keys", "pair_rows", "pair_tiles"):
            if hasattr(file, name):
                monkeypatch.setattr(file, name, noting(getattr(file, name), seen.setdefault(name, set())))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    results(module, inputs)
    torch.set_num_threads(before)
    assert set().union(*seen.values()) == {1}
    assert seen["tile_data"]


def noting(work: Callable[..., object], cores: set[int]) -> Callable[..., object]:
    def noted(*arguments: object) -> object:
        cores.add(torch.get_num_threads())
        return work(*arguments)

    return noted


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_inference_mode_and_autocast(threads: int) -> None:
    module = spdsl.load(CAUSAL)
    q, k, v = torch.randn(3, 1, 2, 1000, 16)
    want = module.attention(q, k, v)
    with torch.inference_mode():
        assert torch.equal(module.attention(q, k, v), want)
        inside = torch.randn(3, 1, 2, 1000, 16)
        assert module.attention(*inside).isfinite().all()
