"""How many blocks of a kernel one SM holds at the same time, and what stops it from holding more."""

from __future__ import annotations

from dataclasses import dataclass

from spdsl.targets import Target


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Resident blocks of one SM; 0 when not even one fits."""

    blocks: int
    limit: str
    """What runs out first: `warps`, `blocks`, `shared` or `registers`."""
    warps: int
    """Warps the blocks have together."""


def occupancy(target: Target, registers: int, shared: int, num_warps: int) -> Occupancy:
    """Blocks per SM from registers per thread, shared bytes per block and warps per block.

    The rules of NVIDIA's occupancy calculator and of LLVM's for AMD, which agree in form: a warp takes its registers
    from one scheduler's share, in units; each block takes its shared memory and the system's part.
    """
    per_thread = -(-max(registers, 1) // target.register_unit) * target.register_unit
    share = target.registers_per_sm // target.schedulers
    by_registers = share // (per_thread * target.warp_size) * target.schedulers
    limits = {  # on a tie the first is named: what no kernel can change comes before what this one could
        "warps": target.warps_per_sm // num_warps,
        "blocks": target.blocks_per_sm,
        "shared": _by_shared(target, shared),
        "registers": by_registers // num_warps,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit, limits[limit] * num_warps)


def _by_shared(target: Target, shared: int) -> int:
    if shared > target.shared_per_block:
        return 0
    taken = shared + target.shared_reserved
    return target.shared_per_sm // taken if taken else target.blocks_per_sm
