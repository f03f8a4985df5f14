"""Terms of `footprint`, fitted to compiled samples (benchmarks/results/footprint) by benchmarks/footprint_fit.py."""

from __future__ import annotations

FITTED_WITH = "3.7.1"  # triton

# architecture -> bytes of shared memory that one block can have (spdsl/targets)
SHARED_LIMITS = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}

# matrix unit -> what the arithmetic is multiplied with: never under a sample it was fitted to
FACTORS = {"mma": 1.001, "wgmma": 1.001, "tcgen05": 1.001, "mfma": 1.01}

# matrix unit -> words of a thread for accumulators and scores with which some kernel of the tables does not spill
REGISTERS = {"mma": 160, "wgmma": 224, "tcgen05": 224, "mfma": 160}
