"""Kernels run with the configurations of the tables, unless a test tunes them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDSL_TUNE", "off")
