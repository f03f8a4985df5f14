"""Reading the data files of the GPUs and finding one by name."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Target:
    """What a kernel can use on one GPU. Sizes in bytes; the file `<name>.toml` gives the source of every number.

    On AMD an SM is a compute unit, a warp a wavefront, and shared memory the LDS.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    architecture: str
    """As vendors write it: `sm_90`, `gfx942`."""
    backend: str
    """Triton's backend, `cuda` or `hip`; with `arch` and `warp_size` it makes Triton's own target."""
    arch: int | str
    warp_size: int

    sm_count: int
    memory: int
    bandwidth: float
    """Bytes per second."""
    l2: int
    clock: float
    """Boost clock in hertz: what the rates are given for."""
    exponentials: float
    """Base-2 exponentials per second of the special-function units; 0 where no source tells."""

    shared_per_sm: int
    shared_per_block: int
    """The most one block may ask for (NVIDIA: after opting in)."""
    shared_reserved: int
    """Taken from the SM for each block on top of what the block asks for."""
    tensor_memory_columns: int
    registers_per_sm: int
    registers_per_thread: int
    register_unit: int
    """Registers of a thread are handed out in multiples of this."""
    warps_per_sm: int
    blocks_per_sm: int
    schedulers: int
    """Parts of an SM that own an equal share of the registers; a warp lives in one of them."""

    mma: tuple[str, ...]
    """Matrix instructions, fastest first: `tcgen05`, `wgmma`, `mma`, `mfma`."""
    async_copy: tuple[str, ...]
    rates: tuple[tuple[str, float], ...]
    shapes: tuple[tuple[str, tuple[str, ...]], ...]
    """For each dtype the shapes of one matrix instruction: `m16n8k16`, `m64n8..256k16`; on AMD `32x32x8`."""

    def rate(self, dtype: str) -> float:
        """Dense matrix FLOP/s for a dtype such as `bf16`. ValueError when this GPU has no such rate."""
        for name, value in self.rates:
            if name == dtype:
                return value
        raise ValueError(f"{self.name} has no matrix rate for {dtype}; it has {', '.join(n for n, _ in self.rates)}")


USUAL = "h100"  # where none is named


def names() -> tuple[str, ...]:
    """The names of all known GPUs, sorted."""
    return tuple(path.stem for path in _files())


def find(name: str) -> Target:
    """The GPU of that name or alias; case and separators do not count (`RTX 4090`, `sm_90`, `gfx942`).

    An architecture stands for one GPU that has it: `sm_90` for h100, `sm_89` for rtx4090.
    ValueError for an unknown name, with the nearest and all known ones.
    """
    known = _spellings()
    plain = _plain(name)
    if plain in known:
        return _all()[known[plain]]
    near = dict.fromkeys(known[close] for close in get_close_matches(plain, known, n=3, cutoff=0.6))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"unknown target {name!r}: {hint}known are {', '.join(names())}")


def _files() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.toml"))


@cache
def _all() -> dict[str, Target]:
    return {path.stem: _read(path) for path in _files()}


@cache
def _spellings() -> dict[str, str]:
    """Every accepted spelling without case and separators, and the GPU it means."""
    return {_plain(text): t.name for t in _all().values() for text in (t.name, t.title, *t.aliases)}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _read(path: Path) -> Target:
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    rates = tuple((dtype, float(value)) for dtype, value in data.pop("rates").items())
    shapes = tuple((dtype, tuple(found)) for dtype, found in data.pop("shapes").items())
    lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
    return Target(name=path.stem, **{**data, **lists, "rates": rates, "shapes": shapes})
