"""Launching the kernels of a divergence: the rows of the score, and the parts of its keys' gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spdsl.runtime.launch.launch import launch, strided, wide
from spdsl.runtime.tiles.kernel import Const, Source
from spdsl.runtime.tuning.configs import Config, power_of_2
from spdsl.runtime.tuning.unit_configs import UnitShape
from spdsl.runtime.units.divergence import add_key_slots
from spdsl.runtime.units.packed import UnitConst
from spdsl.runtime.units.units import UnitJobs


def score_shape(shape: UnitShape, group: int) -> UnitShape:
    """The same queries and blocks with the rows of a score that has `group` heads for each list."""
    rows = max(16, shape.lanes * power_of_2(group))
    return shape._replace(config=shape.config._replace(block_m=rows), group=group)


def key_parts(k: Tensor, lists: int) -> Tensor:
    """Room for the gradient of keys, for each list: those of one head are added up where there are several."""
    dtype = k.dtype if lists == k.shape[1] else wide(k.dtype)
    return torch.zeros(k.shape[0], lists, *k.shape[2:], device=k.device, dtype=dtype)


def of_key_heads(parts: Tensor, k: Tensor) -> Tensor:
    """The parts of each head of k, added up in order."""
    if parts.shape[1] == k.shape[1]:
        return parts
    found: Tensor = parts.unflatten(1, (k.shape[1], -1)).sum(2)
    return found.to(k.dtype)


def key_slot_buffer(jobs: UnitJobs, parts: Tensor, unit: int) -> Tensor:
    """Room for the parts of units with several jobs: [1, lists, slots, unit * D]."""
    shape = (1, parts.shape[1], max(1, jobs.slots), unit * parts.shape[3])
    return torch.empty(shape, device=parts.device, dtype=wide(parts.dtype))


def add_key_parts(
    buffer: Tensor, parts: Tensor, keys: Source, jobs: UnitJobs, inverse: tuple[Any, ...], U: UnitConst, R: Const,
    sequences: int, blocks: int, config: Config
) -> None:  # fmt: skip
    """Adds the parts of units with several jobs, in their order; `inverse` are the jobs for a kernel."""
    if jobs.slots:
        launch(
            add_key_slots, (jobs.sequence.shape[1], parts.shape[1], blocks),
            strided(buffer), strided(parts, sequences), keys, inverse, U, R,
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
