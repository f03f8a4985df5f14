"""Interpreted kernels: every candidate of every kernel gives the same numbers, and what was found is used again."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.numerics.patterns import module_of
from tests.numerics.selected import by_rank

pytestmark = pytest.mark.interpret

SIZES = {"heads": 1, "kv_heads": 1, "qk_dim": 16, "v_dim": 16}
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Each load is a module of its own from the same file, as in a process that starts."""
    monkeypatch.setenv("SPDSL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SPDSL_TUNE", raising=False)
    names: list[str] = []

    def loaded(pattern: str) -> ModuleType:
        path, name = tmp_path / "module.py", f"tuned_module_{len(names)}"
        path.write_text(Path(str(module_of(pattern).__file__)).read_text())
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        names.append(name)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        if not module.INTERPRETED:
            pytest.skip("needs TRITON_INTERPRET=1")
        vars(module).update(KERNELS_ON_CPU=True, on_gpu=lambda args: True)
        return module

    yield loaded
    for name in names:
        del sys.modules[name]


def leaves(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [leaf for part in x for leaf in leaves(part)]  # type: ignore[attr-defined]


def compared(module: ModuleType) -> Counter[str]:
    """From now on every candidate seems faster than those before it, and its results are compared with the default's.

    -> how many candidates of each kernel have been.
    """
    seen: Counter[str] = Counter()
    times = iter(range(10**6, 0, -1))

    def difference(wanted: object, found: object) -> str:
        *_, bucket = module._present.search.trial  # the last one is on trial now
        seen[bucket.kernel] += 1
        for a, b in zip(leaves(wanted), leaves(found), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-10, equal_nan=True)
        return ""

    def milliseconds(run: object, most: float = math.inf) -> float:
        return 0.9 ** (10**6 - next(times))

    def tiles(bucket: object, default: object) -> list[object]:
        """Warps and stages are nothing to the interpreter."""
        return list({x[:2]: x for x in reversed(candidates(bucket, default))}.values())[::-1]

    candidates = module.bucket_candidates
    vars(module).update(difference=difference, milliseconds=milliseconds, bucket_candidates=tiles)
    return seen


def inputs(module: ModuleType, tokens: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made: dict[str, Tensor] = module.example_inputs(1, tokens, **SIZES, dtype=torch.float64)
    return made


def trained(module: ModuleType, given: dict[str, Tensor]) -> list[Tensor]:
    """out and the gradients."""
    given = given | {name: given[name].detach().requires_grad_() for name in ("q", "k", "v")}
    out = module.attention(**given)
    return [out, *torch.autograd.grad(out.square().sum(), [given[name] for name in ("q", "k", "v")])]


PATTERNS = {
    "ranges": ("causal return attend(sink(4) | sliding(20))", {"forward", "dq", "dkdv"}),
    "lists": ("causal doc = tensor(token, int) return attend(where(doc[k] == doc[q]))", {"forward", "dq", "dkdv"}),
    "units": (
        by_rank("top_k(2, score = rank, unit = max(32), share = head)"),
        {"select", "units_pairs", "units_dq_pairs", "units_dkdv_pairs"},
    ),
}


@pytest.mark.parametrize("form", PATTERNS)
def test_every_candidate_gives_the_same_numbers(load: Load, form: str) -> None:
    pattern, kernels = PATTERNS[form]
    module = load(pattern)
    seen = compared(module)
    given = inputs(module, 34 if form == "units" else 20)
    first = trained(module, given)
    assert set(seen) == kernels
    assert min(seen.values()) >= 2
    count = seen.total()
    again = trained(module, given)  # now with the last candidate of each kernel
    assert seen.total() == count
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)


@pytest.mark.parametrize("page", [None, 32])
def test_a_decode_step_is_tuned_and_its_rows_stay(load: Load, page: int | None) -> None:
    module = load(PATTERNS["ranges"][0])
    given = inputs(module, 40)
    cache = module.Cache(1, 64, kv_heads=1, qk_dim=16, v_dim=16, page=page, dtype=torch.float64)
    module.tuning("off")
    module.prefill(**{name: x[:, :, :38] for name, x in given.items()}, cache=cache)
    module.tuning("on")
    seen = compared(module)
    for step in (38, 39):
        out = module.decode(**{name: x[:, :, step : step + 1] for name, x in given.items()}, cache=cache)
        wanted = module.reference(**{name: x[:, :, : step + 1] for name, x in given.items()})[:, :, -1:]
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    assert set(seen) == {"decode"}
    (key,) = module.known_winners()
    assert "queries=1 keys=128" in key
    config = module.known_winners()[key].config
    assert config.block_m == 16
    assert page is None or config.block_n <= page


def narrow(module: ModuleType) -> None:
    """From now on blocks of 32 keys seem the fastest, whatever else; nothing runs for it."""

    def milliseconds(run: object, most: float = math.inf) -> float:
        search = module._present.search
        return 1.0 + sum((search.trial.get(x, default).block_n != 32) for x, default in search.asked.items())

    vars(module).update(milliseconds=milliseconds, difference=lambda wanted, found: "")


def test_a_new_process_starts_with_what_was_found(load: Load) -> None:
    module = load(PATTERNS["ranges"][0])
    narrow(module)
    trained(module, inputs(module, 20))
    again = load(PATTERNS["ranges"][0])
    seen, used = compared(again), set()
    launch = again.launch

    def noting(kernel: object, grid: tuple[int, ...], *args: object, **named: object) -> None:
        used.update((type(x).__name__, x.BLOCK_N.value) for x in args if hasattr(x, "BLOCK_N"))
        launch(kernel, grid, *args, **named)

    vars(again)["launch"] = noting
    trained(again, inputs(again, 33))  # another length of the same bucket
    assert not seen
    assert used == {("Const", 32), ("Const", 16)}  # of delta, which is not tuned


def test_tuning_ahead_of_time_covers_the_backward_pass(load: Load) -> None:
    module = load(PATTERNS["ranges"][0])
    narrow(module)
    given = inputs(module, 20)
    found = module.tune(lambda: trained(module, given))
    assert {bucket.kernel for bucket in found} == {"forward", "dq", "dkdv"}
    assert {winner.config.block_n for winner in found.values()} == {32}
