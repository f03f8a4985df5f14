"""Where the tests keep files: nothing goes to the cache of the user, and Hypothesis reads no generated module."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.interpreter import hasten
from tests.quick import WHOLE

INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"

settings.register_profile("unhurried", deadline=None)  # other work on the machine is no failure
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write what is generated or counted over what is kept"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Temporary folders lie below one named `tests`.

    Hypothesis looks for constants in the source of every loaded module, except below such a folder. A worker has loaded
    hundreds of generated modules, and reading them takes minutes.
    """
    folder = Path(tempfile.gettempdir(), f"spdsl-{os.getuid() if hasattr(os, 'getuid') else 'user'}", "tests")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(folder))
    if INTERPRETS:
        hasten()


@pytest.hookimpl(tryfirst=True)  # before markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        cheap = item.path.relative_to(Path(__file__).parent).as_posix().startswith(WHOLE)
        if cheap and not (item.get_closest_marker("slow") or item.get_closest_marker("full")):
            item.add_marker("quick")


def pytest_collection_finish() -> None:
    """What is there by now stays until the end: looking for garbage in it took a quarter of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Triton reads TRITON_INTERPRET when it is imported: a process interprets kernels or compiles them."""
    if item.get_closest_marker("interpret") and not INTERPRETS:
        pytest.skip("needs TRITON_INTERPRET=1")
    if item.get_closest_marker("crosscompile") and INTERPRETS:
        pytest.skip("needs TRITON_INTERPRET unset")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: an element that nobody writes is seen."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPDSL_CACHE_DIR", str(tmp_path_factory.mktemp("modules")))
        yield
