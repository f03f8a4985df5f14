"""A cache is copied, kept and shared among threads: every copy goes on as the first would have."""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251 (what a cache has to survive)
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import spdsl
from tests.library import launches
from tests.module.patterns import arguments
from tests.numerics.patterns import module_of
from tests.numerics.selected import SELECTED


def saved(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # noqa: TID251


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    **{f"pickle {n}": lambda cache, n=n: pickle.loads(pickle.dumps(cache, n)) for n in (0, 2, 4, 5)},  # noqa: S301
    "twice": lambda cache: pickle.loads(pickle.dumps(copy.deepcopy(cache))),  # noqa: S301
}
STEPS = [(20, 21), (21, 22), (22, 26), (26, 27)]


@pytest.fixture(params=["streaming_llm", "document", "infllm_v2"])
def generating(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = module_of(SELECTED.get(request.param, request.param))
    monkeypatch.setattr(launches(module), "KERNELS_ON_CPU", False)
    return module


def begun(module: ModuleType, page: int | None) -> tuple[Any, dict[str, Tensor]]:
    """A cache of a prompt of 20 tokens, row 1 of it begun again 7 tokens ago; and arguments of 27 tokens."""
    given = arguments(module, 27)
    cache = module.Cache(2, 40, kv_heads=2, qk_dim=16, v_dim=24, page=page)
    module.prefill(**part(given, 0, 13), cache=cache)
    cache.reset([1])
    module.prefill(**part(given, 13, 20), cache=cache)
    return cache, given


def part(given: dict[str, Tensor], first: int, end: int) -> dict[str, Tensor]:
    return {name: x[..., first:end] if x.dim() == 2 else x[:, :, first:end] for name, x in given.items()}


def gone_on(module: ModuleType, cache: Any, given: dict[str, Tensor]) -> list[Tensor]:
    step = {1: module.decode}
    return [step.get(end - first, module.prefill)(**part(given, first, end), cache=cache) for first, end in STEPS]


@pytest.mark.parametrize("page", [16, None])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_goes_on_alone(generating: ModuleType, way: str, page: int | None) -> None:
    cache, given = begun(generating, page)
    other = COPIES[way](cache)
    found = gone_on(generating, other, given)
    assert cache.lengths.tolist() == [20, 7], "the copy is no cache of its own"
    assert other.lengths.tolist() == other.spans[:, 1].tolist() == [27, 14]
    wanted = gone_on(generating, cache, given)
    for one, same in zip(found, wanted, strict=True):
        assert torch.equal(one, same)


def test_a_shallow_copy_is_the_same_cache(generating: ModuleType) -> None:
    cache, given = begun(generating, 16)
    other = copy.copy(cache)
    generating.decode(**part(given, 20, 21), cache=other)
    assert cache.lengths.tolist() == other.lengths.tolist() == other.spans[:, 1].tolist() == [21, 8]


def test_written_lengths_are_the_lengths(generating: ModuleType) -> None:
    cache, _ = begun(generating, 16)
    cache.lengths = torch.tensor([4, 5])
    cache.lengths -= 1
    cache.lengths[0] = 9
    assert cache.spans.tolist() == [[0, 9], [0, 4]]


def test_two_threads_decode_two_caches(generating: ModuleType) -> None:
    wanted = gone_on(generating, *begun(generating, 16))
    ready = [begun(generating, 16) for _ in range(2)]  # not in the threads, which share one seed
    found = in_threads(lambda: gone_on(generating, *ready.pop()), 2)
    assert all(torch.equal(one, same) for own in found for one, same in zip(own, wanted, strict=True))


def test_threads_load_one_module_at_once() -> None:
    """Each sees it whole: none gets a half-made one from `sys.modules`, and it is imported once."""
    text = "pattern at_once { param window = 4 causal return attend(sliding(window)) }"
    for window in (5, 6):
        compiled = spdsl.compile(text, window=window)
        modules = in_threads(compiled.load, 6)
        assert all(module is modules[0] and module.decode for module in modules)
        assert sys.modules[modules[0].__name__] is modules[0]
        assert modules[0].PARAMS == {"window": window}
    found = in_threads(lambda: spdsl.load(text, window=7), 3)
    assert all(module is found[0] for module in found)


def in_threads(run: Callable[[], Any], count: int) -> list[Any]:
    """What `run` returns in that many threads at once; the first error of one is raised."""
    together = threading.Barrier(count)
    found: list[Any] = []
    errors: list[BaseException] = []

    def one() -> None:
        try:
            together.wait(60)
            found.append(run())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found
