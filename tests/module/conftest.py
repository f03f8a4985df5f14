"""Every test of this folder runs the CPU path, whether or not kernels are interpreted in this process."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from spdsl.runtime.launch import launch
from tests.module.patterns import module_of


@pytest.fixture(autouse=True)
def cpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(launch, "KERNELS_ON_CPU", False)


@pytest.fixture(params=["causal", "document", "sink_attention", "longformer", "block_sparse"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return module_of(request.param)


@pytest.fixture
def document() -> ModuleType:
    return module_of("document")


@pytest.fixture
def streaming() -> ModuleType:
    return module_of("streaming_llm")
