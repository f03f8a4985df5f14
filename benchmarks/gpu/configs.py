"""Trying configurations: one kernel of one case, timed by itself with the arguments of a real call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import clock
from benchmarks.gpu.patterns import Case, inputs, load
from spdsl.runtime.launch import launch as launching
from spdsl.runtime.tuning.configs import Config, lookup

BLOCKS_M = {"forward": (64, 128), "dq": (64, 128), "dkdv": (32, 64, 128)}
BLOCKS_N = {"forward": (32, 64, 128), "dq": (32, 64, 128), "dkdv": (64, 128)}


def candidates(kernel: str) -> Iterator[list[int]]:
    """(block_m, block_n, num_warps, num_stages)"""
    yield from map(
        list, product(BLOCKS_M[kernel], BLOCKS_N[kernel], (4, 8), (2, 3, 4) if kernel == "forward" else (1, 2, 3))
    )


def config(case: Case) -> Case:
    """`kernel_ms` of the case's kernel with the configuration `config`, or with the module's own where that is None."""
    module = load(case)
    given = inputs(module, case)
    used = list[Any]()

    def look_up(kernel: str, *rest: Any) -> Any:
        found = lookup(kernel, *rest)
        if kernel.removesuffix("_bias") == case["kernel"]:
            found = found if case["config"] is None else Config(*case["config"])
            used.append(found)
        return found

    with mock.patch.object(launching, "lookup", look_up):
        call = launch_of(module, given, case["kernel"])
    kernel_ms = clock.milliseconds(call, case.get("once", False))
    return {"kernel_ms": kernel_ms, "config": list(used[0]) if used else None}


def launch_of(module: Any, given: dict[str, Any], kernel: str) -> Callable[[], Any]:
    """The launch of one kernel in a forward and backward pass, to be repeated."""
    found: list[Callable[[], Any]] = []

    def note(function: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        if function.__name__.endswith(f"_{kernel}"):
            found.append(lambda: launching.with_triton(function, grid, *args, **named))
        launching.with_triton(function, grid, *args, **named)

    with launching.launching(note):
        leaves = {name: given[name].detach().requires_grad_() for name in ("q", "k", "v")}
        out = module.attention(**given | leaves)
        if kernel != "forward":
            torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out))
    if not found:
        raise RuntimeError(f"no kernel _{kernel} was launched")
    return found[0]
