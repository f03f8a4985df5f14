"""Configurations of the kernels: data for each architecture.

Found by cross-compiling what generated modules launch: no spills, shared memory within the limit of the architecture,
matrix instructions in every loop. benchmarks/NOTES.md has the registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Config(NamedTuple):
    """`num_stages` is one more than the blocks that are loaded ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_BY_PAIR = "_by_pair"
SMALL = Config(16, 16, 1, 1)  # what the tables do not know, and the interpreter; one warp has 16 rows

# architecture -> kernel -> (head dim up to, as in `table_dim`, and bytes per element) -> configuration
Tables = dict[str, dict[str, dict[tuple[int, int], Config]]]
TABLES: Tables = {
    "sm_80": {
        "forward": {
            (64, 2): Config(128, 64, 8, 3),
            (128, 2): Config(128, 64, 8, 2),
            (192, 2): Config(128, 32, 8, 2),
            (256, 2): Config(64, 32, 4, 2),
            (64, 4): Config(64, 32, 4, 2),
            (128, 4): Config(32, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dq": {
            (64, 2): Config(64, 64, 4, 2),
            (96, 2): Config(64, 32, 4, 2),
            (128, 2): Config(64, 64, 8, 2),
            (192, 2): Config(64, 32, 4, 1),
            (256, 2): Config(32, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 64, 8, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dkdv": {
            (64, 2): Config(32, 64, 4, 2),
            (96, 2): Config(32, 64, 4, 2),
            (128, 2): Config(64, 64, 8, 2),
            (160, 2): Config(32, 32, 4, 1),
            (256, 2): Config(32, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 16, 4, 1),
            (256, 4): Config(16, 16, 2, 1),
        },
        "decode": {
            (128, 2): Config(16, 64, 4, 3),
            (256, 2): Config(16, 32, 4, 3),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "forward_bias": {
            (128, 2): Config(128, 32, 8, 2),
        },
        "dkdv_bias": {
            (128, 2): Config(64, 64, 8, 1),
        },
        # Numbers of pairs that are loaded ahead take shared memory, of which sm_89 has 99 KB.
        "forward_by_pair": {
            (64, 2): Config(128, 64, 8, 1),
            (128, 2): Config(128, 32, 8, 1),
            (256, 2): Config(64, 32, 4, 1),
        },
        "dq_by_pair": {
            (128, 2): Config(64, 64, 8, 1),
        },
        "dkdv_by_pair": {
            (64, 2): Config(32, 64, 4, 1),
            (128, 2): Config(64, 64, 8, 1),
        },
    },
    "sm_90": {
        "forward": {
            (128, 2): Config(128, 64, 8, 3),
            (192, 2): Config(128, 64, 8, 3),
            (256, 2): Config(128, 64, 8, 2),
            (64, 4): Config(64, 32, 4, 2),
            (128, 4): Config(128, 32, 8, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dq": {
            (128, 2): Config(128, 64, 8, 2),
            (192, 2): Config(128, 64, 8, 2),
            (256, 2): Config(128, 32, 8, 2),
            (64, 4): Config(64, 32, 4, 1),
            (128, 4): Config(32, 64, 8, 1),
            (192, 4): Config(16, 32, 4, 1),
            (256, 4): Config(16, 64, 8, 1),
        },
        "dkdv": {
            (64, 2): Config(64, 64, 4, 2),
            (128, 2): Config(64, 64, 4, 1),
            (160, 2): Config(32, 64, 4, 1),
            (256, 2): Config(64, 32, 8, 2),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 16, 4, 1),
            (256, 4): Config(32, 16, 4, 1),
        },
        "decode": {
            (128, 2): Config(16, 64, 4, 3),
            (256, 2): Config(16, 32, 4, 3),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dkdv_bias": {
            (128, 2): Config(32, 64, 4, 1),
        },
        "forward_by_pair": {
            (192, 2): Config(128, 64, 8, 2),
            (256, 2): Config(128, 32, 8, 2),
        },
        "dq_by_pair": {
            (256, 2): Config(128, 32, 8, 1),
        },
        "dkdv_by_pair": {
            (256, 2): Config(64, 32, 8, 1),
        },
        "dkdv_bias_by_pair": {
            (64, 2): Config(64, 64, 4, 1),
        },
    },
    "sm_100": {
        "forward": {
            (128, 2): Config(128, 64, 8, 3),
            (192, 2): Config(128, 64, 8, 2),
            (256, 2): Config(64, 64, 8, 2),
            (64, 4): Config(64, 32, 4, 2),
            (128, 4): Config(32, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dq": {
            (64, 2): Config(64, 64, 8, 2),
            (128, 2): Config(128, 64, 8, 2),
            (192, 2): Config(64, 64, 4, 1),
            (256, 2): Config(64, 64, 8, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(16, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "dkdv": {
            (64, 2): Config(64, 64, 8, 2),
            (128, 2): Config(64, 64, 8, 1),
            (160, 2): Config(64, 64, 4, 1),
            (256, 2): Config(32, 64, 8, 1),
            (64, 4): Config(32, 16, 4, 1),
            (128, 4): Config(32, 16, 4, 1),
            (256, 4): Config(32, 16, 4, 1),
        },
        "decode": {
            (128, 2): Config(16, 64, 4, 3),
            (256, 2): Config(16, 32, 4, 3),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "forward_by_pair": {
            (256, 2): Config(64, 64, 8, 1),
        },
        "dkdv_bias_by_pair": {
            (64, 2): Config(64, 64, 8, 1),
        },
    },
    "gfx942": {
        "forward": {
            (64, 2): Config(128, 64, 4, 1),
            (128, 2): Config(64, 64, 2, 1),
            (192, 2): Config(64, 32, 2, 1),
            (256, 2): Config(64, 64, 2, 1),
            (128, 4): Config(64, 32, 2, 1),
            (256, 4): Config(32, 32, 1, 1),
        },
        "dq": {
            (64, 2): Config(64, 64, 2, 1),
            (128, 2): Config(128, 32, 4, 1),
            (192, 2): Config(64, 32, 2, 1),
            (256, 2): Config(64, 16, 4, 1),
            (128, 4): Config(32, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "dkdv": {
            (128, 2): Config(32, 64, 2, 1),
            (160, 2): Config(16, 64, 4, 1),
            (256, 2): Config(16, 64, 4, 1),
            (128, 4): Config(32, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "decode": {
            (128, 2): Config(16, 64, 1, 1),
            (256, 2): Config(16, 32, 1, 1),
            (128, 4): Config(16, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "dkdv_by_pair": {
            (128, 2): Config(16, 64, 4, 1),
        },
    },
}


def tables_for(architecture: str, tables: Tables = TABLES) -> Mapping[str, dict[tuple[int, int], Config]]:
    """The tables of the architecture, or of the nearest older one.

    Compute capability 12 (GeForce, RTX Pro) is near 8 instead: mma and 99 KB of shared memory, no tensor memory.
    """
    if not architecture.startswith("sm_"):
        return tables["gfx942"]
    number = int(architecture.removeprefix("sm_"))
    known = sorted(int(name.removeprefix("sm_")) for name in tables if name.startswith("sm_"))
    older = [x for x in known if x <= number] if number < 120 else []
    return tables[f"sm_{max(older, default=known[0])}"]


def lookup(kernel: str, architecture: str, dim: int, size: int, tables: Tables = TABLES) -> Config:
    """The configuration of `forward`, `dq`, `dkdv` or `decode` for that head dim and bytes per element.

    `forward_bias` and so on: kernels with a bias, which needs registers of its own; `units_pairs` and so on: rows that
    are gathered one by one; `units_gathered`: keys are; `forward_by_pair`, `forward_bias_by_pair`: a number is
    loaded for each pair. Without an entry, the plain one.
    """
    own = tables_for(architecture, tables)
    plain = plain_name(kernel)
    rows = plain, *([plain + _BY_PAIR] if kernel.endswith(_BY_PAIR) else []), kernel.removesuffix(_BY_PAIR), kernel
    table = {dims: config for row in rows for dims, config in own.get(row, {}).items()}
    dims = [most for most, bytes_per_element in table if bytes_per_element == size and most >= dim]
    return table[min(dims), size] if dims else SMALL


def plain_name(kernel: str) -> str:
    """The kernel of which `kernel` is a form with a row of its own."""
    return kernel.removesuffix(_BY_PAIR).removesuffix("_bias").removesuffix("_pairs").removesuffix("_gathered")


def row_of_table(kernel: str, bias: bool, by_pair: bool) -> str:
    """The row of a kernel with a bias, or with numbers for each pair."""
    return f"{kernel}{'_bias' * bias}{_BY_PAIR * by_pair}"


def has_bias(row: str) -> bool:
    return row.removesuffix(_BY_PAIR).endswith("_bias")


def table_dim(kernel: str, qk: int, v: int) -> int:
    """The head dim that a kernel is looked up for: the wider one; of dK and dV, with sums as wide as both, the mean."""
    return -(-(qk + v) // 2) if plain_name(kernel).endswith("dkdv") else max(qk, v)


def chained(config: Config, page: int = 0, listed: bool = False) -> Config:
    """The configuration where blocks of keys lie in pages (of `page` keys, 0: none), or their numbers in a list.

    Triton spreads the stages over a chain of loads: number in a list, page, rows. Each link takes one stage for every
    block loaded ahead, so that rows are loaded as early as without it; two links share two.
    """
    links = (page > 0) + listed
    stages = config.num_stages + min(links * (config.num_stages - 1), 2)
    return config._replace(block_n=min(config.block_n, block_room(page) or config.block_n), num_stages=stages)


def block_room(page: int) -> int:
    """The most keys of a block that never crosses the end of a page; 0: as many as one likes, also in pages of 1."""
    return page & -page if page > 1 else 0


def split_dim(dim: int) -> tuple[int, int]:
    """dim -> two powers of two >= 16 (the second may be 0) that cover it: 80 -> 64 + 16, 192 -> 128 + 64, 24 -> 32."""
    whole = max(16, power_of_2(dim))
    half = whole // 2
    rest = max(16, power_of_2(dim - half))
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n; 1 for n < 1."""
    return 1 << max(0, n - 1).bit_length()
