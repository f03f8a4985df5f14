"""Writing the binaries of a module's launches with a manifest and the loader that runs them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from spdsl.runtime import cubin_loader
from spdsl.runtime.launches import Argument, Launch
from spdsl.targets import Target

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

    Equal launches of two targets of one architecture share a file. RuntimeError for a kernel that does not compile,
    or needs memory that the loader does not give.
    """
    folder.mkdir(parents=True, exist_ok=True)
    binaries: dict[tuple[str, str], Binary] = {}
    for launch, target in jobs:
        place = (target.architecture, key(launch))
        if place not in binaries:
            binaries[place] = build(launch, target)
    kernels = [binary.entry for binary in binaries.values()]
    manifest = json.dumps({"version": 1, "triton": triton.__version__, "kernels": kernels}, indent=1) + "\n"
    loader = Path(cubin_loader.__file__).read_bytes()
    files = {binary.entry["file"]: binary.image for binary in binaries.values()}
    files |= {LOADER: loader, MANIFEST: manifest.encode()}
    for name, data in files.items():
        _replace(folder / name, data)
    return [folder / name for name in files]


def build(launch: Launch, target: Target) -> Binary:
    """The binary of a launch; Triton's cache has it if it was compiled before."""
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    built = triton.compile(launch.source(target.backend), target=gpu, options=dict(launch.options))
    known, ending = built.metadata, _ENDINGS[target.backend]
    scratch = int(getattr(known, "global_scratch_size", 0) or 0) + int(getattr(known, "profile_scratch_size", 0) or 0)
    if scratch or getattr(known, "num_ctas", 1) != 1:
        raise RuntimeError(f"{launch.name} needs scratch memory or clusters, which the loader does not give")
    image = bytes(built.asm[ending])
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
