"""What the sanitizer says, on kernels of a line or two."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.numerics.cases import Shape, checked
from tests.numerics.patterns import module_of
from tests.sanitizer.faults import Fault
from tests.sanitizer.kernels import kernels_of
from tests.sanitizer.mode import sanitized
from tests.sanitizer.poison import poison, unwritten

pytestmark = pytest.mark.interpret


class Pair(NamedTuple):
    data: Tensor
    stride: int


@triton.jit
def copy(x, out, count, BLOCK: tl.constexpr):
    """A program copies a block of numbers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x.data + i * x.stride, mask=i < count, other=0), mask=i < count)


@triton.jit
def total(x, out, BLOCK: tl.constexpr):
    """Every program writes the same sum."""
    tl.store(out, tl.sum(tl.load(x.data + tl.arange(0, BLOCK) * x.stride)))


@triton.jit
def scatter(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, tl.load(x.data + i))


def run(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    with sanitized():
        kernel[(programs,)](*args, **constants)


def test_results_are_those_of_the_interpreter() -> None:
    x, out = torch.arange(20.0)[::2], torch.empty(10)
    run(copy, 3, Pair(x, 2), out, 10, BLOCK=4)
    assert torch.equal(out, x)
    with sanitized():
        checked("causal", Shape(), module=module_of("causal"))


def test_a_fault_names_all_there_is_to_know() -> None:
    x, out = torch.arange(20.0)[4:14], torch.empty(12)
    with pytest.raises(Fault) as found:
        run(copy, 3, Pair(x, 1), out, 12, BLOCK=4)
    first, place, *_ = str(found.value).splitlines()
    assert first == (
        "copy, program (2, 0, 0) of (3, 1, 1): load of `x.data` [10] (strides [1]): no element of the tensor, "
        "2 of 4 active lanes; the first is lane (2,) of [4] at element 10 from the first"
    )
    assert place.startswith("line ")
    assert place.endswith(
        "in copy: tl.store(out + i, tl.load(x.data + i * x.stride, mask=i < count, other=0), mask=i < count)"
    )


@pytest.mark.parametrize("stride", [-1, 3, 1 << 31, 1 << 40])
def test_nothing_outside_is_touched(stride: int) -> None:
    """However far it is: without the check some of these end the process."""
    with pytest.raises(Fault, match=r"no element of the tensor|far from every tensor"):
        run(copy, 1, Pair(torch.zeros(16)[4:12], stride), torch.empty(8), 8, BLOCK=8)


def test_the_gaps_of_a_view_are_outside() -> None:
    with pytest.raises(Fault, match="no element of the tensor, 4 of 8"):
        run(copy, 1, Pair(torch.zeros(16)[::2], 1), torch.empty(8), 8, BLOCK=8)


def test_what_nobody_wrote_is_seen_through_copies() -> None:
    with sanitized():
        x = torch.empty(8)
        x[:5] = 1
        x = torch.cat([x, x]).clone()[:8]
    with pytest.raises(Fault, match=r"nothing was ever written there, 3 of 8 .* at element \(5,\)"):
        run(copy, 1, Pair(x, 1), torch.empty(8), 8, BLOCK=8)
    run(copy, 1, Pair(x, 1), torch.empty(8), 5, BLOCK=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.bool])
def test_every_type_can_be_unwritten(dtype: torch.dtype) -> None:
    x = poison(torch.ones(4, 6, dtype=dtype)[:, 1:5])
    assert unwritten(x).all()
    x[1] = 0
    assert unwritten(x).sum() == 12
    assert not unwritten(torch.full((3,), -1).to(dtype)).any()


def test_a_sum_has_one_owner() -> None:
    x, out = torch.ones(8), torch.empty(1)
    run(total, 1, Pair(x, 1), out, BLOCK=8)
    with pytest.raises(Fault, match=r"total, program \(1, 0, 0\) of \(2, 1, 1\): store of `out`.*writes there, too"):
        run(total, 2, Pair(x, 1), out, BLOCK=8)


def test_no_program_reads_what_another_one_writes() -> None:
    x = torch.zeros(12)
    with pytest.raises(Fault, match=r"load of `x.data`.*another program of the launch writes there"):
        run(copy, 2, Pair(x[:8], 1), x[4:], 8, BLOCK=4)  # the same memory under two views


def test_two_lanes_of_a_store_have_two_addresses() -> None:
    with pytest.raises(Fault, match="two lanes of the store have this address, 4 of 8"):
        run(scatter, 1, Pair(torch.ones(8), 1), torch.empty(8), BLOCK=8)


def test_the_kernels_of_a_text() -> None:
    text = (
        "@jit\ndef a(x):\n    b(x)\n@jit\ndef b(x):\n    c = x\n@triton.jit\ndef c(x): ...\ndef host(): run(a, b, c)\n"
    )
    assert kernels_of(text) == {"a", "c"}
