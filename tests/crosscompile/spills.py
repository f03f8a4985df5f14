"""Registers in local memory that no configuration tried avoids, by target, element size, kernel and dims."""

from __future__ import annotations

import triton

MEASURED = triton.__version__ == "3.7.1"  # what the tables are made with
# (target, bytes per element, kernel, dims up to) -> most spills in any pattern, triton 3.7.1
# At a head dimension of 256 an fp32 tile as three tf32 parts has more values than 8 warps have registers.
ALLOWED: dict[tuple[str, int, str, int], int] = {
    ("sm_90", 4, "forward", 256): 2,
    # Each of 8 warps along the keys holds the operands of 16 rows; 59 where it computed every score 4 times.
    ("sm_90", 4, "dq", 256): 382,
    ("sm_80", 4, "dq", 256): 406,
    ("sm_90", 4, "dkdv", 256): 122,
}
# The same for one pattern whose set test needs more registers.
ALLOWED_IN: dict[tuple[str, str, int, str, int], int] = {
    ("document", "sm_80", 2, "forward", 256): 50,
}

# What remains elsewhere is 2 to 21 local loads and stores beside hundreds of matrix instructions, in the masked loop of
# patterns that read tensors or walk several ranges; a smaller tile would cost more. `test_hopper` allows none.
FEW = 32
# With another triton: 3.9.0 spills 77 to 107 words on sm_80 in forward at 128, 73 and 77 in dQ at 64, 181 in forward
# of streaming_llm at 256; for sm_90 see ON_HOPPER.
OF_OTHERS = {"sm_80": 181, "sm_90": 50}

# Kernels over units have none, but for these: the assembler spills 2 to 4 words to fit one block more on an SM.
ALLOWED_UNITS: dict[tuple[str, str], int] = {
    ("sm_90", "select"): 2,
    ("sm_100", "select"): 4,
}

# Of dK and dV on sm_90 under `test_hopper` and for numbers of pairs. 3.6.0 leaves 6 words at 64 and 26 at 128. 3.9.0
# leaves 4 of alibi at 64; at 128, where a test stands beside the causal one, 16 (mask by pairs), 29 (sliding_window),
# 35 (big_bird) and 50 (document), all at 255 registers, and none of causal. The next smaller tile,
# 32 x 64, reads Q and dout twice as often, so the row stays.
ON_HOPPER = 0 if MEASURED else 50
# Of dQ of a window on sm_90: 3.9.0 leaves 10 in nsa.
DQ_ON_HOPPER = 0 if MEASURED else 10
# Of a kernel over units or of entries: 3.9.0 leaves 4 in dQ of nsa on sm_80 and 4 of moba on sm_100. 3.6.0 leaves 2 in
# cut_lists on sm_80 (48 registers) and 4 in pool_entries of maxima on sm_90 (64): there too for one block more.
# 3.9.0 leaves 8 in the select kernel of long lists on sm_80.
UNITS_ELSEWHERE = 0 if MEASURED else 8

_STEPS = (64, 128, 192, 256)


def most_spills(pattern: str, kernel: str, target: str, dtype: str, dims: tuple[int, int]) -> int:
    size = 4 if dtype == "fp32" else 2
    step = min(step for step in _STEPS if step >= max(dims))
    own = ALLOWED_IN.get((pattern, target, size, kernel, step), 0)
    others = 0 if MEASURED else OF_OTHERS.get(target, 0)
    return max(own, ALLOWED.get((target, size, kernel, step), 0), FEW, others)
