"""Configurations of the kernels over units: tables as in `configs`. `block_m` counts rows of queries times heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from spdsl.runtime.tuning.configs import Config, Tables, power_of_2

MOST_LANES = 64  # queries of a tile: bits of a mask
LEAST_KEYS = 16  # keys of the smallest matrix product
KEYS_PER_UNIT = 2  # of a decode step: ranking a unit takes about as long as reading two keys
MOST_UNIT = 1 << 30  # where no unit bounds the block
# Tiles of one job of the backward by keys, for units of JOB_KEYS; larger units have as many more, and programs enough.
JOB_TILES, JOB_KEYS = 512, 64
JOB_TILES_INTERPRETED = 4  # so few that small inputs have keys of several jobs
# Parts of results that exist at once, where keys are outermost: heads take turns where all of them would need more. A
# list head needs queries * units of a list * (head dim + 1) numbers.
PARTS_BYTES = 1 << 30
PARTS_BYTES_INTERPRETED = 1 << 13  # so few that small inputs take several turns
# Ranks that a tile holds at once, of each query its best and those of a step: 8 bytes each, in registers of 4 warps.
# Found by compiling lists of 32 to 128 units for groups of 1, 4 and 16 heads: more spilled 200 to 1,600 words. Where
# heads share a list their scores are there, too.
MOST_RANKS, MOST_RANKS_OF_GROUP, FEW_RANKS = 4096, 1024, 96
# Scores that exist at once, where lists are cut: a call takes as many turns as it needs.
CUT_BYTES = 1 << 28
CUT_BYTES_INTERPRETED = 1 << 11


_GATHERED = ("units", "units_dq", "units_decode")  # others that gather keys run with the rows of those that do not


class UnitShape(NamedTuple):
    """What the tiles of one call look like."""

    config: Config
    group: int  # query heads that share a list
    lanes: int  # queries of a tile
    gathered: bool = False  # whether the keys of a block are those of several units, or a part of them


def job_tiles(unit: int, interpreted: bool) -> int:
    """Tiles of one job of dK and dV: units that every query chooses (the first, say) are shared by several programs."""
    return (JOB_TILES_INTERPRETED if interpreted else JOB_TILES) * max(1, unit // JOB_KEYS)


def cut_pieces(tiles: int, scores: int, interpreted: bool) -> Iterator[tuple[int, int]]:
    """Tiles first..end - 1 of each turn, of `scores` int32 for each of them; one tile at least.

    Turns start at multiples of 16, if they have as many: kernels then know the same of each.
    """
    most = max(1, (CUT_BYTES_INTERPRETED if interpreted else CUT_BYTES) // (4 * scores))
    most = most if most < 16 else most // 16 * 16
    for first in range(0, tiles, most):
        yield first, min(first + most, tiles)


def tile_of_lists(shape: UnitShape, rows: int) -> UnitShape:
    """Tiles for lists that `rows` queries have together: no more queries than that, if a product has 16 rows."""
    lanes = min(shape.lanes, power_of_2(rows))
    block_m = max(16, shape.config.block_m // shape.lanes * lanes)
    return shape._replace(config=shape.config._replace(block_m=block_m), lanes=lanes)


def tile_of_ranks(shape: UnitShape, most: int) -> UnitShape:
    """Tiles for lists of `most` units that are ranked in registers: fewer queries for lists above 32."""
    ranks = ranks_kept(most) + max(shape.config.block_n, ranks_kept(most))
    room = MOST_RANKS if shape.group == 1 else MOST_RANKS_OF_GROUP
    return shape if ranks <= FEW_RANKS else tile_of_lists(shape, max(1, room // ranks))


def ranks_kept(most: int) -> int:
    """Ranks that a query keeps in registers."""
    return 1 << max(1, (most - 1).bit_length())


def mask_words(per: int, lanes: int) -> int:
    """64-bit words that hold a bit for each of `lanes` queries and `per` units."""
    return -(-per * lanes // 64)


def is_gathered(unit: int) -> bool:
    """Whether no block of keys lies in one unit, so that the keys of a list are loaded one by one."""
    return unit % LEAST_KEYS != 0


def table_row(kernel: str, unit: int) -> str:
    """The row of the tables for a kernel over units: gathered keys need registers for their addresses."""
    return f"{kernel}_gathered" if is_gathered(unit) and kernel in _GATHERED else kernel


def page_of_block(page: int, unit: int) -> int:
    """The page that blocks of keys lie in. Gathered keys lie in any: as if each had a page of its own."""
    return min(page, 1) if is_gathered(unit) else page


def most_keys(unit: int) -> int:
    """The largest power of two that divides a unit; 0, no bound, where the keys of units are gathered."""
    return 0 if is_gathered(unit) else (unit & -unit) % MOST_UNIT


def fitted(config: Config, group: int, unit: int) -> UnitShape:
    """Tiles for lists that `group` heads share: queries x heads, both powers of two; blocks that divide a unit, or
    hold the keys of several short ones."""
    padded = power_of_2(group)
    block_m = max(config.block_m, padded, 16)
    lanes = min(block_m // padded, MOST_LANES)
    block_n = min(config.block_n, most_keys(unit) or config.block_n)
    shape = UnitShape(config._replace(block_m=max(lanes * padded, 16), block_n=block_n), group, lanes)
    return shape._replace(gathered=is_gathered(unit))


def rows_alone(config: Config, unit: int) -> UnitShape:
    """Tiles whose rows are queries of one head and one unit: no mask of bits bounds their number."""
    block_n = min(config.block_n, unit & -unit)
    return UnitShape(config._replace(block_m=max(config.block_m, 16), block_n=block_n), 1, 1)


def one_query(shape: UnitShape) -> UnitShape:
    """The shape for decode: rows are the heads that share a list."""
    rows = max(16, power_of_2(shape.group))
    return shape._replace(config=shape.config._replace(block_m=rows), lanes=1)


UNIT_TABLES: Tables = {
    "sm_80": {
        "units": {
            (64, 2): Config(64, 64, 4, 3),
            (128, 2): Config(64, 64, 4, 2),
            (192, 2): Config(64, 32, 4, 2),
            (256, 2): Config(64, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 2),
            (128, 4): Config(32, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_dq": {
            (64, 2): Config(64, 64, 4, 2),
            (96, 2): Config(64, 64, 4, 1),
            (128, 2): Config(64, 64, 8, 2),
            (192, 2): Config(32, 64, 4, 1),
            (256, 2): Config(64, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 64, 8, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_dkdv": {
            (64, 2): Config(32, 64, 4, 2),
            (96, 2): Config(32, 64, 4, 2),
            (128, 2): Config(64, 64, 8, 2),
            (160, 2): Config(64, 32, 8, 1),
            (256, 2): Config(32, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 16, 4, 1),
            (256, 4): Config(16, 16, 2, 1),
        },
        "units_decode": {
            (64, 2): Config(16, 64, 4, 3),
            (128, 2): Config(16, 64, 4, 2),
            (256, 2): Config(16, 32, 4, 2),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "select": {
            (64, 2): Config(64, 64, 4, 2),
            (256, 2): Config(64, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_pairs": {
            (128, 2): Config(32, 64, 4, 2),
        },
        "units_gathered": {
            (64, 2): Config(64, 64, 4, 2),
            (256, 2): Config(32, 32, 4, 1),
        },
        "units_dq_gathered": {
            (192, 2): Config(32, 64, 8, 1),
            (256, 2): Config(32, 32, 4, 1),
        },
    },
    "sm_90": {
        "units": {
            (128, 2): Config(64, 64, 4, 3),
            (192, 2): Config(64, 64, 4, 2),
            (256, 2): Config(64, 32, 4, 2),
            (64, 4): Config(64, 32, 4, 2),
            (128, 4): Config(64, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_dq": {
            (128, 2): Config(64, 64, 4, 2),
            (192, 2): Config(64, 64, 4, 1),
            (256, 2): Config(64, 32, 4, 1),
            (64, 4): Config(64, 32, 4, 1),
            (128, 4): Config(32, 64, 8, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_dkdv": {
            (64, 2): Config(64, 64, 4, 2),
            (128, 2): Config(64, 64, 4, 1),
            (160, 2): Config(32, 64, 4, 1),
            (256, 2): Config(32, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (128, 4): Config(32, 16, 4, 1),
            (256, 4): Config(32, 16, 4, 1),
        },
        "units_decode": {
            (192, 2): Config(16, 64, 4, 3),
            (256, 2): Config(16, 32, 4, 3),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "select": {
            (64, 2): Config(64, 64, 4, 2),
            (256, 2): Config(64, 32, 4, 2),
            (128, 4): Config(64, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_dq_pairs": {
            (192, 2): Config(64, 32, 4, 1),
        },
        "units_dkdv_pairs": {
            (128, 2): Config(32, 64, 4, 1),
            (160, 2): Config(16, 64, 4, 1),
        },
        "units_gathered": {
            (192, 2): Config(64, 32, 4, 2),
            (256, 2): Config(64, 16, 4, 2),
        },
        "units_dq_gathered": {
            (192, 2): Config(64, 32, 4, 1),
            (256, 2): Config(64, 16, 4, 1),
        },
    },
    "sm_100": {
        "units": {
            (128, 2): Config(64, 64, 4, 3),
            (192, 2): Config(64, 64, 4, 2),
            (256, 2): Config(64, 32, 4, 2),
            (64, 4): Config(64, 32, 4, 2),
            (128, 4): Config(32, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_dq": {
            (128, 2): Config(64, 64, 4, 2),
            (192, 2): Config(64, 64, 4, 1),
            (256, 2): Config(64, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_dkdv": {
            (64, 2): Config(64, 64, 4, 2),
            (160, 2): Config(64, 64, 8, 1),
            (256, 2): Config(32, 32, 4, 1),
            (64, 4): Config(32, 32, 4, 1),
            (256, 4): Config(32, 16, 4, 1),
        },
        "units_decode": {
            (128, 2): Config(16, 64, 4, 3),
            (192, 2): Config(16, 64, 4, 2),
            (256, 2): Config(16, 32, 4, 3),
            (128, 4): Config(16, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "select": {
            (64, 2): Config(32, 64, 4, 2),
            (128, 2): Config(32, 32, 4, 2),
            (192, 2): Config(16, 32, 4, 2),
            (256, 2): Config(32, 32, 4, 2),
            (256, 4): Config(16, 32, 4, 1),
        },
        "units_gathered": {
            (128, 2): Config(64, 32, 4, 3),
            (192, 2): Config(64, 32, 4, 2),
        },
        "units_decode_gathered": {
            (64, 2): Config(16, 64, 4, 2),
        },
    },
    "gfx942": {
        "units": {
            (128, 2): Config(64, 64, 2, 1),
            (256, 2): Config(64, 32, 2, 1),
            (128, 4): Config(64, 32, 2, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "units_dq": {
            (64, 2): Config(64, 64, 2, 1),
            (256, 2): Config(64, 32, 2, 1),
            (128, 4): Config(32, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "units_dkdv": {
            (64, 2): Config(64, 64, 2, 1),
            (128, 2): Config(32, 64, 2, 1),
            (160, 2): Config(16, 64, 4, 1),
            (256, 2): Config(16, 64, 4, 1),
            (128, 4): Config(32, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "units_decode": {
            (192, 2): Config(16, 64, 1, 1),
            (256, 2): Config(16, 32, 1, 1),
            (128, 4): Config(16, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "select": {
            (192, 2): Config(64, 64, 4, 1),
            (256, 2): Config(64, 32, 2, 1),
            (64, 4): Config(64, 32, 2, 1),
            (128, 4): Config(32, 32, 1, 1),
            (256, 4): Config(16, 16, 1, 1),
        },
        "units_dkdv_pairs": {
            (128, 2): Config(16, 64, 4, 1),
        },
    },
}
