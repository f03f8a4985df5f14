"""Both engines of a generated module, with every uninitialised tensor full of NaN."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import pytest

from tests.library import launches
from tests.numerics.patterns import module_of


class Engine(Protocol):
    name: str

    def __call__(self, case: str | ModuleType, **params: int) -> ModuleType: ...


@pytest.fixture(autouse=True)
def _no_memory_unwritten(poisoned: None) -> None:
    """Every test here."""


INTERPRETED = pytest.param("interpreted", marks=pytest.mark.interpret)


def _loader(engine: str, patch: pytest.MonkeyPatch) -> Engine:
    class Loader:
        name = engine

        def __call__(self, case: str | ModuleType, **params: int) -> ModuleType:
            module = module_of(case, **params) if isinstance(case, str) else case
            if engine == "interpreted" and not launches(module).INTERPRETED:
                pytest.skip("needs TRITON_INTERPRET=1")
            patch.setattr(launches(module), "KERNELS_ON_CPU", engine == "interpreted")
            return module

    return Loader()


@pytest.fixture(params=["cpu", INTERPRETED])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Loads modules and settles whether their CPU tensors go to the CPU path or to interpreted kernels."""
    return _loader(request.param, monkeypatch)


@pytest.fixture(params=[INTERPRETED])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The interpreted kernels only."""
    return _loader(request.param, monkeypatch)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The CPU path only."""
    return _loader("cpu", monkeypatch)
