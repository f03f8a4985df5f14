"""Tuning on a GPU: right results, no second search, none in a capture, and nothing slower than the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import spdsl
from benchmarks.gpu import clock
from spdsl.machine.module_report import loaded
from spdsl.runtime.tuning import search
from spdsl.runtime.tuning.trials import difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

ROOT = Path(__file__).parents[2]
SIZES = {"heads": 8, "kv_heads": 2, "qk_dim": 64, "v_dim": 64, "dtype": torch.bfloat16, "device": "cuda"}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv("SPDSL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SPDSL_TUNE", "on")
    path = tmp_path / "streaming_llm.py"
    path.write_text(spdsl.compile(ROOT / "patterns" / "streaming_llm.spat", window=500).text)
    with loaded(path) as found:
        yield found


def trained(module: ModuleType, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    out = module.attention(**leaves)
    return [out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))]


def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every kernel that is searched for."""
    found: list[str] = []
    real: Callable[..., object] = search._found

    def noting(run: object, asked: object, bucket: tuple[str, ...], *rest: object) -> object:
        found.append(bucket[1])
        return real(run, asked, bucket, *rest)

    monkeypatch.setattr(search, "_found", noting)
    return found


def test_the_first_call_tunes_and_the_next_ones_agree(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = searches(monkeypatch)
    given = module.example_inputs(2, 3000, **SIZES)
    first = trained(module, given)
    assert sorted(found) == ["dkdv", "dq", "forward"]
    again = trained(module, given)
    trained(module, module.example_inputs(2, 4000, **SIZES))
    assert len(found) == 3
    for a, b in zip(first, again, strict=True):
        assert difference(a, b) == ""
    winners = module.MODULE.tuner.known().values()
    assert all(x.milliseconds <= x.default for x in winners)
    assert any(x.tried > 3 for x in winners)


def test_a_capture_is_not_disturbed(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = searches(monkeypatch)
    given = module.example_inputs(2, 1000, **SIZES)
    module.tuning("off")
    wanted = module.attention(**given)
    module.tuning("on")
    replay, out = clock.captured(lambda: module.attention(**given))
    assert found == ["forward"]  # by the call before the capture
    replay()
    assert difference(wanted, out) == ""


def test_tuned_is_not_slower_than_the_tables(module: ModuleType) -> None:
    given = module.example_inputs(1, 16384, **SIZES)
    module.tune(lambda: trained(module, given))
    times = {}
    for mode in ("off", "on"):
        module.tuning(mode)
        times[mode] = clock.milliseconds(lambda: trained(module, given))
    assert times["on"] < 1.1 * times["off"]
