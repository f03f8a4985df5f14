"""The comparison of two checkouts sees what differs, and says which side is worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from benchmarks.compare import cases, reports, results
from spdsl.machine.crosscompile import Compiled
from spdsl.machine.launches import Workload
from spdsl.machine.machine_code import Code
from spdsl.machine.products import Product
from spdsl.machine.report import to_json

CODE = Code(
    registers=200, spills=0, scalar_spills=0, scratch=0, mma=(("wgmma", 16),), loop_mma=(("wgmma", 16),),
    async_copies=(), widest_load=128,
)  # fmt: skip
KERNEL = Compiled("attend_forward", "h200", 8, 3, (), code=CODE, workload=Workload("train", "bf16", 64, 64))
TWICE = Product(128, 64, (64, 64), 2)


def compared(**changes: Any) -> list[reports.Line]:
    return reports.compare(to_json([KERNEL]), to_json([replace(KERNEL, **changes)]))


def test_equal_reports_have_no_line() -> None:
    assert compared() == []


@pytest.mark.parametrize(
    "changes, worse",
    [
        ({"code": replace(CODE, registers=220)}, False),
        ({"code": replace(CODE, spills=3)}, True),
        ({"error": "out of shared memory"}, True),
        ({"products": (TWICE,)}, True),
        ({"code": replace(CODE, loop_mma=())}, True),
        ({"shared": 100}, False),
    ],
)
def test_what_differs_is_told(changes: dict[str, Any], worse: bool) -> None:
    (line,) = compared(**changes)
    assert line.worse == worse
    assert "attend_forward" in line.text
    assert "h200" in line.text


def test_a_lost_kernel_is_worse_and_a_new_one_is_not() -> None:
    (lost,) = reports.compare(to_json([KERNEL]), "[]")
    (new,) = reports.compare("[]", to_json([KERNEL]))
    assert (lost.worse, new.worse) == (True, False)


def test_bits_and_errors() -> None:
    wanted = numpy.array([1.0, -numpy.inf, 4.0])
    found = numpy.array([1.0, -numpy.inf, 5.0], dtype=numpy.float32)
    assert results.equal(found, found.copy())
    assert not results.equal(found, wanted)
    assert results.error(found, wanted) == pytest.approx(0.25)
    assert results.error(numpy.zeros(3), wanted) == numpy.inf


def test_a_step_without_a_reference_may_not_differ() -> None:
    one, other = {"cache.16.0.0": numpy.zeros(2)}, {"cache.16.0.0": numpy.ones(2)}
    (found,) = results.errors("causal", ["cache.16.0.0"], [one], [other])
    assert found.worse


def test_a_nearer_result_is_not_worse() -> None:
    old = {"attention.out.0": numpy.array([1.0, 2.5])}
    new = {"attention.out.0": numpy.array([1.0, 2.25]), "reference.out.0": numpy.array([1.0, 2.0])}
    (nearer,) = results.errors("causal", ["attention.out.0"], [old], [new])
    assert (nearer.old, nearer.new, nearer.worse) == (0.25, 0.125, False)
    (farther,) = results.errors(
        "causal", ["attention.out.0"], [new], [old | {"reference.out.0": new["reference.out.0"]}]
    )
    assert farther.worse


def test_patterns_are_made_small() -> None:
    text = cases.text_of(Path("patterns/nsa.spat"))
    assert "heads query = 4, kv = 2" in text
    assert "dim " not in text
