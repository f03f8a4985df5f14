"""How the warps of a block share its products, and how many of them share a tile without computing one twice.

Triton spreads a product over warps by rules of its own, which `spdsl/machine/products.py` reads off compiled kernels:
a product whose result goes into another one gets all warps along its rows, so that a row stays with one warp.
"""

from __future__ import annotations

from spdsl.runtime.tuning.configs import Config, split_dim
from spdsl.runtime.tuning.footprint import KernelShape, matrix_unit, rows_of, tile_of

_ROWS, _COLUMNS = 16, 8  # of a warp in one instruction; with wgmma 4 warps have 64 rows
_SIDE = 32  # of a matrix instruction of CDNA, where a product has as many rows and columns; else 16


def product_repeats(kernel: KernelShape, config: Config, architecture: str) -> int:
    """How often the products of a loop are computed, at most: 1, or more where warps reach past the edge of a tile."""
    config = config._replace(block_m=rows_of(kernel, config))
    tile, warps = tile_of(kernel, config), config.num_warps
    unit = matrix_unit(kernel, config, architecture)
    if unit == "tcgen05":  # one thread starts a product for the block; its result is read once
        return 1
    if unit == "wgmma":
        return max(1, _ROWS * warps // tile.resident)
    side = _SIDE if min(tile.resident, tile.looped) >= _SIDE else _ROWS
    if _alone(kernel, unit):
        area = side * side if unit == "mfma" else _ROWS * _COLUMNS
        return max(1, area * warps // (tile.resident * tile.looped))
    if unit == "mfma":
        return max(1, side * warps // tile.resident)
    last = _last_columns(kernel, tile.looped)
    if tile.resident >= last:
        return max(1, _ROWS * warps // tile.resident)
    return max(1, _COLUMNS * warps // min(tile.looped, last))


def _alone(kernel: KernelShape, unit: str) -> bool:
    """Whether no other product follows in a step: it is spread both ways. On NVIDIA a second part of the head does."""
    return kernel.name == "select" and kernel.size == 2 and (unit == "mfma" or not split_dim(kernel.qk)[1])


def _last_columns(kernel: KernelShape, looped: int) -> int:
    """Columns of the last product of a step, after whose shape mma spreads all of them."""
    if kernel.name == "select":
        return looped
    first, second = split_dim(kernel.qk if kernel.name.endswith(("dq", "dkdv")) else kernel.v)
    return second or first


def without_repeats(kernel: KernelShape, config: Config, architecture: str) -> Config:
    """The configuration with as many warps as its tile has work for: pages, units and short groups make tiles small."""
    while config.num_warps > 1 and product_repeats(kernel, config, architecture) > 1:
        config = config._replace(num_warps=config.num_warps // 2)
    return config
