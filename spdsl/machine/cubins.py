"""Writing the binaries of a module's launches with a manifest and the loader that runs them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from spdsl.machine import cubin_loader
from spdsl.machine.crosscompile import built
from spdsl.machine.launches import Argument, Launch
from spdsl.targets import Target
from spdsl.version import __version__

MANIFEST, LOADER = "manifest.json", "cubin_loader.py"
_ENDINGS = {"cuda": "cubin", "hip": "hsaco"}


@dataclass(frozen=True, slots=True)
class Binary:
    """One compiled launch."""

    image: bytes
    entry: dict[str, Any]
    """Its lines of the manifest."""


def write(folder: Path, jobs: Iterable[tuple[Launch, Target]]) -> list[Path]:
    """The binaries, the manifest and the loader in `folder`, the manifest last; every file whole or not at all.

    Equal launches of two targets of one architecture share a file. ValueError for launches of several modules;
    RuntimeError for a kernel that does not compile, or needs memory that the loader does not give.
    """
    jobs = list(jobs)
    module = _module_of([launch for launch, _ in jobs])
    folder.mkdir(parents=True, exist_ok=True)
    binaries: dict[tuple[str, str], Binary] = {}
    for launch, target in jobs:
        place = (target.architecture, key(launch))
        if place not in binaries:
            binaries[place] = build(launch, target)
    kernels = [binary.entry for binary in binaries.values()]
    runtime = {"version": 2, "spdsl": __version__, "triton": triton.__version__}
    manifest = json.dumps({**runtime, "module": module, "kernels": kernels}, indent=1) + "\n"
    loader = Path(cubin_loader.__file__).read_bytes()
    files = {binary.entry["file"]: binary.image for binary in binaries.values()}
    files |= {LOADER: loader, MANIFEST: manifest.encode()}
    for name, data in files.items():
        _replace(folder / name, data)
    return [folder / name for name in files]


def _module_of(launches: Sequence[Launch]) -> dict[str, Any]:
    """The module that all of them are of, but for the kernels of its library."""
    every = [launch.kernel.fn.__globals__ for launch in launches]
    found = [cubin_loader.identity(names) for names in every if "MODULE" in names]
    if not found or any(one != found[0] for one in found):
        raise ValueError(f"binaries are of one module, got launches of {len({str(one) for one in found})}")
    return found[0]


def build(launch: Launch, target: Target) -> Binary:
    """The binary of a launch; Triton's cache has it if it was compiled before."""
    made = built(launch, target)
    known, ending = made.metadata, _ENDINGS[target.backend]
    scratch = int(getattr(known, "global_scratch_size", 0) or 0) + int(getattr(known, "profile_scratch_size", 0) or 0)
    if scratch or getattr(known, "num_ctas", 1) != 1:
        raise RuntimeError(f"{launch.name} needs scratch memory or clusters, which the loader does not give")
    image = bytes(made.asm[ending])
    digest = hashlib.sha256(image).hexdigest()
    name = f"{re.sub(r'[^A-Za-z0-9_]', '_', launch.name)}_{target.architecture}_{digest[:16]}.{ending}"
    entry = {
        "file": name, "sha256": digest, "kernel": launch.name, "entry": str(known.name), "key": key(launch),
        "architecture": target.architecture, "backend": target.backend,
        "signature": [leaf.type for _, _, leaf in launch.leaves() if leaf.type != "constexpr"],
        "constexprs": {name: str(getattr(value, "__name__", value)) for name, value in launch.constexprs.items()},
        "options": dict(launch.options), "threads": int(known.num_warps) * target.warp_size,
        "shared": int(known.shared), "triton": triton.__version__, "workload": str(launch.workload or ""),
    }  # fmt: skip
    return Binary(image, entry)


def key(launch: Launch) -> str:
    """As the loader computes it from the arguments of a call."""
    options = dict(launch.options)
    leaves = [_text(leaf) for _, _, leaf in launch.leaves()]
    return cubin_loader.key_of(launch.name, leaves, options["num_warps"], options["num_stages"])


def _text(leaf: Argument) -> str:
    if leaf.type == "constexpr":
        return cubin_loader.constant_text(leaf.value)
    return cubin_loader.leaf_text(leaf.type, leaf.divisible)


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp gives 0600
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
