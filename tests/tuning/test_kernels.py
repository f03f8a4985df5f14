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

from spdsl.runtime.launch.launch import with_triton
from spdsl.runtime.tuning import search, tuner
from spdsl.runtime.tuning.buckets import Bucket, bucket_candidates
from spdsl.runtime.tuning.configs import Config
from tests.library import launches
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
    monkeypatch.setattr(tuner, "on_gpu", lambda args: True)
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
        if not launches(module).INTERPRETED:
            pytest.skip("needs TRITON_INTERPRET=1")
        return module

    yield loaded
    for name in names:
        del sys.modules[name]


def leaves(x: object) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [leaf for part in x for leaf in leaves(part)]  # type: ignore[attr-defined]


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps and stages are nothing to the interpreter."""

    def tiles(bucket: Bucket, default: Config) -> list[Config]:
        return list({x[:2]: x for x in reversed(bucket_candidates(bucket, default))}.values())[::-1]

    monkeypatch.setattr(search, "bucket_candidates", tiles)


def compared(patch: pytest.MonkeyPatch) -> Counter[str]:
    """From now on every candidate seems faster than those before it, and its results are compared with the default's.

    -> how many candidates of each kernel have been.
    """
    seen: Counter[str] = Counter()
    times = iter(range(10**6, 0, -1))

    def difference(wanted: object, found: object) -> str:
        *_, bucket = search._present.search.trial  # the last one is on trial now
        seen[bucket.kernel] += 1
        for a, b in zip(leaves(wanted), leaves(found), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-10, equal_nan=True)
        return ""

    def milliseconds(run: object, most: float = math.inf) -> float:
        return 0.9 ** (10**6 - next(times))

    patch.setattr(search, "difference", difference)
    patch.setattr(search, "milliseconds", milliseconds)
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
    "gathered": ("causal t = given(most = 9) return attend(t)", {"units_gathered", "units_dq_gathered", "units_dkdv"}),
}


@pytest.mark.parametrize("form", PATTERNS)
@pytest.mark.usefixtures("candidates")
def test_every_candidate_gives_the_same_numbers(load: Load, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, kernels = PATTERNS[form]
    module = load(pattern)
    seen = compared(monkeypatch)
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
@pytest.mark.usefixtures("candidates")
def test_a_decode_step_is_tuned_and_its_rows_stay(
    load: Load, page: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(PATTERNS["ranges"][0])
    given = inputs(module, 40)
    cache = module.Cache(1, 64, kv_heads=1, qk_dim=16, v_dim=16, page=page, dtype=torch.float64)
    module.tuning("off")
    module.prefill(**{name: x[:, :, :38] for name, x in given.items()}, cache=cache)
    module.tuning("on")
    seen = compared(monkeypatch)
    for step in (38, 39):
        out = module.decode(**{name: x[:, :, step : step + 1] for name, x in given.items()}, cache=cache)
        wanted = module.reference(**{name: x[:, :, : step + 1] for name, x in given.items()})[:, :, -1:]
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    assert set(seen) == {"decode"}
    (key,) = module.MODULE.tuner.known()
    assert "queries=1 keys=128" in key
    config = module.MODULE.tuner.known()[key].config
    assert config.block_m == 16
    assert page is None or config.block_n <= page


def narrow(patch: pytest.MonkeyPatch) -> None:
    """From now on blocks of 32 keys seem the fastest, whatever else; nothing runs for it."""

    def milliseconds(run: object, most: float = math.inf) -> float:
        own = search._present.search
        return 1.0 + sum((own.trial.get(x, default).block_n != 32) for x, default in own.asked.items())

    patch.setattr(search, "milliseconds", milliseconds)
    patch.setattr(search, "difference", lambda wanted, found: "")


def test_a_new_process_starts_with_what_was_found(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(PATTERNS["ranges"][0])
    narrow(monkeypatch)
    trained(module, inputs(module, 20))
    again = load(PATTERNS["ranges"][0])
    seen, used = compared(monkeypatch), set()

    def noting(kernel: object, grid: tuple[int, ...], *args: object, **named: object) -> None:
        used.update((type(x).__name__, x.BLOCK_N.value) for x in args if hasattr(x, "BLOCK_N"))
        with_triton(kernel, grid, *args, **named)

    with again.rt.launching(noting):
        trained(again, inputs(again, 33))  # another length of the same bucket
    assert not seen
    assert used == {("Const", 32), ("Const", 16)}  # of delta, which is not tuned


def test_tuning_ahead_of_time_covers_the_backward_pass(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(PATTERNS["ranges"][0])
    narrow(monkeypatch)
    given = inputs(module, 20)
    found = module.tune(lambda: trained(module, given))
    assert {bucket.kernel for bucket in found} == {"forward", "dq", "dkdv"}
    assert {winner.config.block_n for winner in found.values()} == {32}
