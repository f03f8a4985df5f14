"""What a configuration takes of one block: shared memory and registers, without compiling.

Buffers as Triton allocates them; benchmarks/footprint.py has compared them with what it gives. Rows of tensors are
taken as aligned to 16 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

from spdsl.runtime.tuning.configs import Config, power_of_2, split_dim
from spdsl.runtime.tuning.footprint_terms import FACTORS, REGISTERS, SHARED_LIMITS

_BACKWARD = ("dq", "dkdv", "units_dq", "units_dkdv")
_MOST_LANES = 64
_ALIGNED = 1024  # bytes to which tiles of the large matrix units are aligned


class KernelShape(NamedTuple):
    """A kernel of a call: `forward dq dkdv decode units units_dq units_dkdv units_decode select`."""

    name: str
    qk: int
    v: int
    size: int  # bytes per element
    group: int = 1  # query heads per list of units, or per kv head
    bias: bool = False
    paged: bool = False  # rows are found through a page table
    listed: bool = False  # blocks are found in a list
    reads: int = 0  # bytes that the mask reads for each key
    guarded: bool = False  # decode skips the blocks that tensors leave out


class Tile(NamedTuple):
    """Bytes of one step: rows that stay (`q`; in a backward `v`, too) and those that the loop loads (`k`, `value`)."""

    q: int
    v: int
    k: int
    value: int
    part: int  # the wider of the first parts of k and value
    scores: int
    resident: int  # rows that stay
    looped: int  # rows of a step


def shared_bytes(kernel: KernelShape, config: Config, architecture: str) -> int:
    """Shared memory of one block in bytes, never under what the compiler gives. `config` as in the tables."""
    config = config._replace(block_m=rows_of(kernel, config))
    unit = matrix_unit(kernel, config, architecture)
    known = {"mfma": _mfma, "mma": _mma, "wgmma": _wgmma, "tcgen05": _tcgen05}[unit]
    tile = tile_of(kernel, config)
    return round((known(kernel, config, tile) + _given_mask(kernel, config, tile, unit)) * FACTORS[unit])


def rows_of(kernel: KernelShape, config: Config) -> int:
    """Rows of a tile: in decode the heads of a group, over units some queries times their heads.

    A list of one head may have any number of rows, as rows are gathered; the union of 64 queries takes no more.
    """
    heads = power_of_2(kernel.group)
    if kernel.name.endswith("decode"):
        return max(16, heads)
    if not kernel.name.startswith("units") and kernel.name != "select":
        return config.block_m
    if heads == 1 and kernel.name != "select":
        return max(config.block_m, 16)
    return max(min(max(config.block_m, heads, 16) // heads, _MOST_LANES) * heads, 16)


def matrix_unit(kernel: KernelShape, config: Config, architecture: str) -> str:
    """`mma`, `wgmma`, `tcgen05` or `mfma`: the two large ones multiply 64 rows at least, with 4 warps at least."""
    if not architecture.startswith("sm_"):
        return "mfma"
    rows = config.block_n if kernel.name.endswith("dkdv") else rows_of(kernel, config)
    number = int(architecture.removeprefix("sm_"))
    if rows < 64 or config.num_warps < 4 or number < 90 or number >= 120:
        return "mma"
    return "wgmma" if number < 100 else "tcgen05"


def tile_of(kernel: KernelShape, config: Config) -> Tile:
    qk, v = split_dim(kernel.qk), split_dim(kernel.v) if kernel.name != "select" else (0, 0)
    resident, looped = config.block_m, config.block_n
    if kernel.name.endswith("dkdv"):
        resident, looped = looped, resident
    backward = kernel.name in _BACKWARD
    size = kernel.size
    return Tile(
        resident * sum(qk) * size, resident * sum(v) * size if backward else 0,
        looped * sum(qk) * size, looped * sum(v) * size, looped * max(qk[0], v[0]) * size,
        config.block_m * config.block_n * size, resident, looped,
    )  # fmt: skip


def depth_of(kernel: KernelShape, config: Config, amd: bool) -> int:
    """Steps whose rows are loaded ahead."""
    return 0 if _narrow(kernel) else _ahead(kernel, config, amd)


def _narrow(kernel: KernelShape) -> bool:
    """Rows of 2-byte elements that are no multiple of 16 are loaded too narrowly for asynchronous copies.

    In a forward kernel they may come from a cache, where rows of several heads lie side by side and are wide enough.
    """
    return kernel.size == 2 and kernel.name in _BACKWARD and kernel.qk % 16 + kernel.v % 16 > 0


def _ahead(kernel: KernelShape, config: Config, amd: bool) -> int:
    """Steps for which anything is loaded ahead. Triton spreads the stages over a chain of loads."""
    if config.num_stages == 1 or (kernel.guarded and kernel.name == "decode"):
        return 0
    stages = config.num_stages + min((kernel.paged + kernel.listed) * (config.num_stages - 1), 2)
    if not (kernel.paged or (kernel.listed and kernel.reads)):
        return stages - 1
    return stages - 2 if amd else (stages - 1) // 2


def _small(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """Numbers of blocks, lse and delta of rows and over units the numbers of pairs, what a mask reads; barriers."""
    of_row = {"dkdv": 8, "units_dkdv": 12}.get(kernel.name, 0) + 2 * kernel.reads
    of_step = tile.looped * of_row + 40
    return _ahead(kernel, config, amd=False) * of_step + _ranks(kernel, config)


def _ranks(kernel: KernelShape, config: Config) -> int:
    """Of `select`: 8 bytes for each query and unit of a step, as they are sorted."""
    queries = config.block_m // power_of_2(kernel.group)
    several = 4 if queries > 1 and config.block_m <= 16 * config.num_warps else 2  # warps have the scores of a head
    scores = config.block_m * config.block_n * several if config.num_warps > 4 or config.block_m > 64 else 0
    least = (512 if queries > 1 else 256) * config.num_warps
    return max(queries * config.block_n * 8, least, scores) if kernel.name == "select" else 0


def _mask(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """The mask of a list that a tensor gives, in another layout than narrow scores."""
    given = kernel.guarded and kernel.listed and not kernel.reads and max(kernel.qk, kernel.v) <= 16
    return config.block_m * config.block_n * 2 if given else 0


def _given_mask(kernel: KernelShape, config: Config, tile: Tile, unit: str) -> int:
    """The same for wide scores: a byte for each pair where they are many, and the scores themselves beside 128 keys.

    Where a warp has more than the 16 rows of one product, its part of the mask goes through shared memory, too.
    """
    if not (kernel.guarded and kernel.listed and not kernel.reads) or kernel.name not in ("forward", "dq", "dkdv"):
        return 0
    pairs, narrow = config.block_m * config.block_n, max(kernel.qk, kernel.v) < 128
    if unit == "mfma":
        return 2 * pairs if kernel.name == "forward" and config.block_n >= 128 else 0
    if unit == "tcgen05":
        return _given_in_tensor_memory(kernel, tile, 4 * pairs, narrow)
    apart = tile.resident > 16 * config.num_warps
    if kernel.name == "dkdv":
        return pairs if apart or pairs >= 8192 else 0
    if config.block_n >= 128:
        return pairs if kernel.name == "dq" else (4 if narrow else 2) * pairs
    return config.num_warps * (2048 if kernel.name == "forward" and unit == "mma" else 512) * apart


def _given_in_tensor_memory(kernel: KernelShape, tile: Tile, scores: int, narrow: bool) -> int:
    if kernel.size == 4:
        return 0
    if kernel.name == "dkdv":
        if narrow and tile.looped >= 64:
            return 4096 if tile.resident >= 256 else 0
        return scores if tile.resident >= 128 else 0
    if tile.looped < 128:
        return 0
    return scores if narrow else 4096


def _staged(kernel: KernelShape, tile: Tile) -> bool:
    """Whether scores go through shared memory between two products: their rows do not stay with one warp."""
    qk, v = (part[1] or part[0] for part in (split_dim(kernel.qk), split_dim(kernel.v)))
    return tile.resident < {"dq": qk, "units_dq": qk, "dkdv": max(qk, v), "units_dkdv": max(qk, v)}.get(kernel.name, v)


def _mma(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """sm_80 and sm_89, and small tiles elsewhere. An fp32 operand has two tf32 parts, and one layout for each use."""
    depth = depth_of(kernel, config, amd=False)
    scores, small = tile.scores * _staged(kernel, tile), _small(kernel, config, tile)
    stays, ring = tile.q + tile.v, depth * (tile.k + tile.value)
    if kernel.size == 4:
        if kernel.name.endswith("dkdv"):
            return 2 * stays + tile.part + max(2 * scores, tile.part) + small
        if kernel.name.endswith("dq"):
            return 2 * stays + depth * tile.value + (tile.part if depth else max(tile.part, 2 * scores)) + small
        if depth:
            return 2 * stays + ring + 2 * scores + small
        return stays * (1 if kernel.guarded and kernel.name == "decode" else 2) + max(tile.part, 2 * scores) + small
    if depth:
        last = tile.part if kernel.paged and kernel.listed else 0  # the loop over masked blocks keeps one part more
        return stays + ring + max(scores, last) + _mask(kernel, config, tile) + small
    if kernel.name == "select":
        return stays + max(tile.part, small)
    if kernel.name.endswith("dkdv"):
        return stays + max(tile.k, tile.value) + 2 * tile.part + small
    if kernel.name.endswith("dq"):
        return stays + tile.k + max(scores, tile.part) + small
    return stays + max(tile.part, tile.value) + scores + small


def _wgmma(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """sm_90: products run while the next ones are started, so that one step more is kept."""
    depth = depth_of(kernel, config, amd=False)
    stays, small = tile.q + tile.v, _small(kernel, config, tile)
    backward = kernel.name in _BACKWARD
    if kernel.size == 2:
        once = tile.k + tile.value if backward else max(tile.k, tile.value)
        steps = (depth + 1) * (tile.k + tile.value)
        return stays + small + (steps + min(_ALIGNED, 64 + (stays + steps) // 16) if depth else once)
    if kernel.name.endswith("dkdv"):
        second = 5 * depth * (tile.k + tile.value - 2 * tile.part) // 3 if depth else 0
        return 2 * stays + tile.part * (4 + depth if depth else 2) + max(second, 0) + small
    if backward:
        again = 5 * tile.part + 3 * max(tile.k - tile.part, 0) if depth else 2 * tile.part
        return 2 * stays + depth * tile.value + again + small
    return 2 * stays + depth * (tile.k + tile.value) + 2 * tile.part + small


def _tcgen05(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """sm_100: as above; fp32 operands that stay lie in tensor memory."""
    depth = depth_of(kernel, config, amd=False)
    stays, small = tile.q + tile.v, _small(kernel, config, tile)
    if kernel.size == 4:
        padded = sum(split_dim(kernel.qk)) > kernel.qk and tile.looped == 16
        twice = kernel.name == "units" or padded or (kernel.name.endswith("dkdv") and config.num_warps > 4)
        scores = tile.scores * (2 if twice else 1)
        return _aligned(depth * (tile.k + tile.value) + max(2 * tile.part, scores) + small)
    used_twice = {"dq": 1, "units_dq": 1, "dkdv": 2, "units_dkdv": 2}.get(kernel.name, 0)
    once = tile.k + tile.value if used_twice else max(tile.k, tile.value)
    steps = (depth + 1) * (tile.k + tile.value) if depth else once
    again = tile.k + (tile.value if used_twice == 2 else 0) if used_twice and config.num_stages > 1 else 0
    wide = (split_dim(kernel.qk), split_dim(kernel.v))[:used_twice]
    two_parts = sum(tile.looped * first * kernel.size for first, second in wide if second and depth)
    scores = 2 * tile.scores if used_twice == 2 and depth and min(tile.resident, tile.looped) == 128 else 0
    return _aligned(stays + steps + again + two_parts + scores + small)


def _aligned(total: int) -> int:
    """With the gaps in front of tiles that begin at multiples of 1 KB."""
    return total + min(4160, 64 + total // 12)


def _mfma(kernel: KernelShape, config: Config, tile: Tile) -> int:
    """gfx942: rows that stay are kept in registers."""
    depth = depth_of(kernel, config, amd=True)
    first = tile.resident * max(split_dim(kernel.qk)[0], split_dim(kernel.v)[0] if tile.v else 0) * kernel.size
    both = 2 if kernel.reads and kernel.name == "dkdv" and config.num_stages > 1 else 1  # p and ds
    scores = both * tile.scores
    ranks = _ranks(kernel, config)
    if depth:
        slim = 16 * 16 * kernel.size * (split_dim(kernel.qk)[1] == 16) if tile.looped == 16 and kernel.size == 2 else 0
        slim *= 2 if kernel.v == kernel.qk else 1  # a part of 16 x 16 is too small to be loaded ahead
        return max(first, depth * (tile.k + tile.value - slim) + slim + scores + ranks)
    together = split_dim(kernel.v)[1] and tile.resident >= 64
    return max(first, tile.part + scores if together else max(tile.part, scores), ranks)


def spills(kernel: KernelShape, config: Config, architecture: str) -> bool:
    """Whether a thread needs more words for accumulators and scores than any kernel of the tables has.

    A coarse bound: operands are not in it. benchmarks/NOTES.md, "Footprint of a block", says how often it is right.
    """
    config = config._replace(block_m=rows_of(kernel, config))
    unit = matrix_unit(kernel, config, architecture)
    return registers(kernel, config, unit) > REGISTERS[unit]


def registers(kernel: KernelShape, config: Config, unit: str) -> int:
    """Of a thread, for accumulators and scores alone."""
    qk, v = sum(split_dim(kernel.qk)), sum(split_dim(kernel.v))
    threads = config.num_warps * (64 if unit == "mfma" else 32)
    rows = config.block_n if kernel.name.endswith("dkdv") else config.block_m
    width = {"dq": qk, "units_dq": qk, "dkdv": qk + v, "units_dkdv": qk + v, "select": 0}.get(kernel.name, v)
    scores = config.block_m * config.block_n * (2 if kernel.name in _BACKWARD else 1)
    return (rows * width + scores) // threads


def fits(kernel: KernelShape, config: Config, architecture: str) -> bool:
    """Shared memory within the limit of one block, and no spills predicted."""
    limit = SHARED_LIMITS.get(architecture, min(SHARED_LIMITS.values()))
    return shared_bytes(kernel, config, architecture) <= limit and not spills(kernel, config, architecture)
