"""Which architecture a tensor lies on."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """What kernels are made for: `sm_90` or `gfx942`, and how many programs run side by side."""

    architecture: str
    processors: int


_fixed_gpu: Gpu | None = None


def use_tables(architecture: str | None, processors: int = 1) -> None:
    """Makes every launch one for that architecture, wherever the tensors lie; with None for theirs, as at first."""
    global _fixed_gpu
    _fixed_gpu = None if architecture is None else Gpu(architecture, processors)


def gpu_of(device: torch.device) -> Gpu:
    if _fixed_gpu is not None:
        return _fixed_gpu
    return _properties(device) if device.type == "cuda" else Gpu("sm_90", 1)


@lru_cache
def _properties(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Gpu(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Gpu(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)
