"""Reading what the compilers made: registers, spills and the instructions that decide speed.

NVIDIA: `cuobjdump` from the triton wheel prints a cubin's resources and its SASS. AMD: the assembly text carries the
code object's metadata (LLVM, "User Guide for AMDGPU Backend", code object V3 metadata and later).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

from spdsl.machine.sass import Instruction, instructions, loops

# CUDA Binary Utilities, instruction set reference.
_SASS_MMA = (
    ("tcgen05", re.compile(r"UTC\w*MMA\b")),
    ("wgmma", re.compile(r"[HIQBD]GMMA\b")),
    ("mma", re.compile(r"[HIQOBD]MMA\b")),
)
_SASS_COPY = {"LDGSTS": "cp.async", "UBLKCP": "cp.async.bulk", "UTMALDG": "tma", "UTMASTG": "tma"}
_SASS_LOAD = re.compile(r"(?:LDG|LDGSTS)\.(?P<modifiers>.*)")
_SASS_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}

# AMD Instinct MI300 (CDNA3) instruction set architecture.
_GCN_LINE = re.compile(r"^(?P<label>\.L\w+):|^\s+(?P<op>[a-z]+_\w+)(?P<operands>[^;\n]*)", re.MULTILINE)
_GCN_MMA = re.compile(r"v_s?mfmac?_")
_GCN_LOAD = re.compile(r"(?:global|buffer)_load_(?:lds_)?(?P<width>[a-z]+\d?)")
_GCN_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


@dataclass(frozen=True, slots=True)
class Code:
    """What was read from one compiled kernel."""

    registers: int
    """32-bit registers of a thread; on AMD vector and accumulation registers together. Says nothing when it spills:
    ptxas may give up and leave 32 registers and thousands of spills."""
    spills: int
    """NVIDIA: STL and LDL instructions. AMD: spilled vector registers. 0 means that nothing is spilled."""
    scalar_spills: int
    """AMD: scalar registers moved into vector registers, which is cheap. NVIDIA: 0."""
    scratch: int
    """Local memory in bytes per thread."""
    mma: tuple[tuple[str, int], ...]
    """Matrix instructions by kind: `wgmma`, `mma`, `tcgen05`, `mfma`."""
    loop_mma: tuple[tuple[str, int], ...]
    """Those of them that stand in a loop; a product before or behind it is run once."""
    async_copies: tuple[tuple[str, int], ...]
    """Copies from global to shared memory without registers, by kind."""
    widest_load: int
    """The widest load from global memory, in bits per thread; 0 when all loads are bulk copies."""


def read_cubin(cubin: bytes) -> Code:
    """The code of a cubin with one kernel. RuntimeError when no cuobjdump is found or it fails."""
    return read_sass(*dump(cubin))


def dump(cubin: bytes) -> tuple[str, int, int]:
    """The SASS of a cubin with one kernel, its registers and its bytes of local memory, as cuobjdump prints them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, sass = _cuobjdump("-res-usage", path), _cuobjdump("-sass", path)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump printed no resources: {usage.strip()[:200]}")
    return sass, int(resources[1]), int(resources[2])


def read_sass(sass: str, registers: int, scratch: int) -> Code:
    """The code of a SASS listing; the two numbers are not in it."""
    listing = instructions(sass)
    stems = Counter(one.stem for one in listing)
    mma = [(one.place, kind) for one in listing if (kind := matrix_kind(one)) is not None]
    inside = frozenset[int]().union(*(loop.places for loop in loops(listing)))
    copies = (kind for one in listing if (kind := copy_kind(one)) is not None)
    return Code(
        registers=registers,
        spills=stems["STL"] + stems["LDL"],
        scalar_spills=0,
        scratch=scratch,
        mma=_counts(kind for _, kind in mma),
        loop_mma=_counts(kind for place, kind in mma if place in inside),
        async_copies=_counts(copies),
        widest_load=max((_sass_width(one.op) for one in listing), default=0),
    )


def matrix_kind(one: Instruction) -> str | None:
    """`wgmma`, `mma` or `tcgen05` for an instruction of the matrix unit."""
    return next((kind for kind, pattern in _SASS_MMA if pattern.match(one.op)), None)


def copy_kind(one: Instruction) -> str | None:
    """`cp.async`, `cp.async.bulk` or `tma` for a copy between global and shared memory."""
    return _SASS_COPY.get(one.stem)


def read_amdgcn(assembly: str) -> Code:
    """The code of an AMD assembly file with one kernel. RuntimeError when it has no metadata."""
    body, _, metadata = assembly.partition(".amdgpu_metadata")
    matches = list(_GCN_LINE.finditer(body))
    places = [(place, match["op"]) for place, match in enumerate(matches) if match["op"]]
    lines = [(match["op"], match["operands"]) for match in matches if match["op"]]
    loops = list(_gcn_loops(matches))
    loads = [(match["width"], operands) for op, operands in lines if (match := _GCN_LOAD.match(op))]
    to_lds = sum(op.startswith("global_load_lds_") or _writes_lds(op, operands) for op, operands in lines)
    return Code(
        registers=_number(metadata, "vgpr_count"),
        spills=_number(metadata, "vgpr_spill_count"),
        scalar_spills=_number(metadata, "sgpr_spill_count"),
        scratch=_number(metadata, "private_segment_fixed_size"),
        mma=_counts("mfma" for op, _ in lines if _GCN_MMA.match(op)),
        loop_mma=_counts("mfma" for place, op in places if _GCN_MMA.match(op) and _inside(place, loops)),
        async_copies=(("buffer_load_lds", to_lds),) if to_lds else (),
        widest_load=max((_gcn_width(width) for width, _ in loads), default=0),
    )


def _gcn_loops(matches: Iterable[re.Match[str]]) -> Iterator[tuple[int, int]]:
    """First and last line of every loop: what a backward branch runs again. The goal of a branch is a label."""
    labels: dict[str, int] = {}
    for place, match in enumerate(matches):
        if match["label"]:
            labels[match["label"]] = place
        elif match["op"].startswith(("s_branch", "s_cbranch")) and match["operands"].strip() in labels:
            yield labels[match["operands"].strip()], place


def _inside(place: int, loops: Iterable[tuple[int, int]]) -> bool:
    return any(first <= place <= last for first, last in loops)


def _writes_lds(op: str, operands: str) -> bool:
    return op.startswith("buffer_load_") and operands.split()[-1:] == ["lds"]


def _counts(kinds: Iterable[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(kinds).items()))


def _sass_width(op: str) -> int:
    load = _SASS_LOAD.match(op)
    if load is None:
        return 0
    # A load without a width moves 32 bits; 256 is written ENL2.256.
    return max((_SASS_WIDTHS[part] for part in load["modifiers"].split(".") if part in _SASS_WIDTHS), default=32)


def _gcn_width(width: str) -> int:
    if width in _GCN_WIDTHS:
        return _GCN_WIDTHS[width]
    return 16 if "short" in width else 8


def _number(metadata: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s*(\d+)", metadata)
    if found is None:
        raise RuntimeError(f"the assembly's metadata has no {key}")
    return int(found[1])


def _cuobjdump(option: str, path: Path) -> str:
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError("no cuobjdump: the triton package has none and none is on PATH")
    done = subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout
