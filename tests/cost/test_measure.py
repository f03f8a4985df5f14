"""Measuring with a timer of our own, on CPU tensors: which calls are made, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from click.testing import CliRunner

from spdsl.cli import main
from spdsl.cost.estimate import curve
from spdsl.cost.phases import Stage
from spdsl.machine.measure import Measured, compared, told
from spdsl.passes.count import Shape
from spdsl.resources import folder
from spdsl.targets import find
from tests.cost.plans import module_of, plan, text_of
from tests.library import launches


def test_every_stage_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module, shape = module_of(text_of("streaming_llm")), Shape(heads=2, kv_heads=1, qk=16, v=16)
    monkeypatch.setattr(launches(module), "KERNELS_ON_CPU", False)
    curves = [curve(plan("streaming_llm"), stage, [16, 32], shape, find("h100")) for stage in Stage]

    def timer(call: Callable[[], object]) -> float:
        call()
        return 1e-3

    found = compared(module, curves, timer, "cpu")
    assert [(one.stage, one.length) for one in found] == [(stage, n) for stage in Stage for n in (16, 32)]
    assert [one.measured for one in found if one.stage is Stage.BACKWARD] == [1e-9, 1e-9]  # its forward is taken off


def test_the_median_error_is_told() -> None:
    found = [Measured(Stage.FORWARD, 1024 << i, 1e-3, 1e-3 * (1 + i)) for i in range(3)]
    assert told(found).endswith("median error 50%")
    assert json.loads(told(found, "json"))["median_error"] == pytest.approx(0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_is_refused() -> None:
    path = str(folder("patterns") / "causal.spat")
    done = CliRunner().invoke(main, ["cost", path, "--length", "4k", "--measure"])
    assert done.exit_code == 2
    assert "--measure needs a GPU" in done.output
