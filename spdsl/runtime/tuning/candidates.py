"""Which configurations of a kernel are worth a try."""

from __future__ import annotations

from spdsl.runtime.tuning.configs import Config
from spdsl.runtime.tuning.footprint import KernelShape, fits
from spdsl.runtime.tuning.warps import product_repeats

_WARPS = (1, 2, 4, 8)
_LEAST_WARPS = 4  # of NVIDIA, whose large products take as many; the tables have fewer where a tile has no more rows

# One step from the configuration of the tables: factors of block_m, block_n and warps, stages more. Rows and warps also
# change together, which leaves the registers of a thread as they are; so do wider blocks and fewer of them ahead.
STEPS = (
    (1, 1, 1, 1),
    (1, 1, 1, -1),
    (1, 2, 1, 0),
    (1, 0.5, 1, 0),
    (2, 1, 1, 0),
    (0.5, 1, 1, 0),
    (1, 1, 2, 0),
    (1, 1, 0.5, 0),
    (2, 1, 2, 0),
    (0.5, 1, 0.5, 0),
    (1, 2, 1, -1),
)
# A tile over units visits what any of its queries chose. With a quarter of 64 rows a query of 16 heads has its own.
UNIT_STEPS = (*STEPS, (0.25, 1, 1, 0))
UNIT_KERNELS = ("units", "units_dq", "units_dkdv")


def candidates(kernel: KernelShape, default: Config, architecture: str, most_n: int, rows_fixed: bool) -> list[Config]:
    """The default, then its neighbours (ten at most) that are predicted to fit and to compute no product twice, in the
    order of `rank`.

    most_n: keys of a page or a unit, which a block does not exceed (0: no bound). rows_fixed: the heads of a group are
    the rows, whatever block_m says.
    """
    steps = UNIT_STEPS if kernel.name in UNIT_KERNELS else STEPS
    near = dict.fromkeys(stepped(default, of_keys(step) if kernel.name.endswith("dkdv") else step) for step in steps)
    allowed = [x for x in near if blocks_fit(x, most_n) and not (rows_fixed and x.block_m != default.block_m)]
    warps = min(default.num_warps, _LEAST_WARPS) if architecture.startswith("sm_") else 1
    shared = [x for x in allowed if x.num_warps >= warps and product_repeats(kernel, x, architecture) == 1]
    fitting = [x for x in shared if x != default and fits(kernel, x, architecture)]
    return [default, *sorted(fitting, key=lambda x: rank(kernel.name, x, default))]


def rank(kernel: str, config: Config, default: Config) -> tuple[bool, float, float]:
    """What a loop costs beside its products, which all tiles share: (loads are hidden less than by the default, loads
    for each pair of query and key, steps for each pair). Smaller is better.

    A tile keeps its rows and loads keys; that of dK and dV keeps its keys and loads rows. This is an order and no time:
    it does not know what is computed at the edges of a set and thrown away, nor how many tiles fill the device.
    """
    kept = config.block_n if kernel.endswith("dkdv") else config.block_m
    return config.num_stages < default.num_stages, 1 / kept, 1 / (config.block_m * config.block_n)


def of_keys(step: tuple[float, float, float, int]) -> tuple[float, float, float, int]:
    """The same step where a tile keeps its keys: they change with the warps, as rows do elsewhere."""
    m, n, warps, stages = step
    return (n, m, warps, stages) if warps != 1 else step


def stepped(config: Config, step: tuple[float, float, float, int]) -> Config:
    m, n, warps, stages = step
    return Config(
        int(config.block_m * m), int(config.block_n * n), int(config.num_warps * warps), config.num_stages + stages
    )


def blocks_fit(config: Config, most_n: int) -> bool:
    """Products have at least 16 rows and columns."""
    sizes = config.block_m >= 16 and 16 <= config.block_n <= (most_n or config.block_n)
    return sizes and config.num_warps in _WARPS and config.num_stages >= 1
