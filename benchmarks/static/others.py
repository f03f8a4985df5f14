"""The rows of peers: compiled where they are at hand, else as an earlier run left them or as they were written down."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.static import kept
from benchmarks.static.rows import Row, from_data
from spdsl.targets import Target

PEERS = ("mdy666", "xunhao", "fla", "flex", "tutorial")
HEADS = (64, 4)  # of recorded figures
RECORDED = Path(__file__).with_name("recorded.toml")


def rows(before: Sequence[Row], folders: Iterable[Path], target: Target, console: Console) -> Iterator[Row]:
    """Of every peer."""
    for module in PEERS:
        peer = import_module(f"benchmarks.static.peers.{module}")
        old = [row for row in before if row.of == peer.NAME and row.code]
        root = find(peer.FILE, folders)
        if root is None:
            yield from (replace(row, kept=True) for row in old) if old else recorded(peer.NAME)
            continue
        digest = kept.of_folder(root / peer.FOLDER)
        if old and all(row.digest == digest for row in old):
            yield from (replace(row, kept=False) for row in old)
        else:
            console.print(f"[dim]compiling kernels of {peer.NAME}", highlight=False)
            yield from compiled(module, root, digest, target)


def find(file: str, folders: Iterable[Path]) -> Path | None:
    """The folder that has the peer: one of those given, or where its package is installed."""
    for folder in folders:
        for root in (folder, *folder.glob("*")):
            if (root / file).is_file():
                return root
    spec = importlib.util.find_spec(Path(file).parts[0]) if "-" not in file else None
    for place in spec.submodule_search_locations or () if spec else ():
        root = Path(place).parent
        if (root / file).is_file():
            return root
    return None


def compiled(module: str, root: Path, digest: str, target: Target) -> Iterator[Row]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.static.peers", module, str(root), target.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for data in json.loads(done.stdout.splitlines()[-1]):
        yield from_data(data | {"digest": digest})


def beside(ours: Sequence[Row], peers: Iterable[Row]) -> Iterator[Row]:
    """Each with what a call asks of our kernel beside it."""
    for row in peers:
        demand = next((one.demand for one in ours if row.stands_beside(one)), None)
        yield replace(row, demand=replace(demand, turns=0.0) if demand else None)


def recorded(name: str) -> Iterator[Row]:
    """Figures that were written down once, where nothing newer is there."""
    data: dict[str, list[dict[str, Any]]] = tomllib.loads(RECORDED.read_text(encoding="utf-8"))
    for one in data.get(name, ()):
        place = {key: one.pop(key) for key in ("pattern", "kernel", "beside", "gathers") if key in one}
        yield from_data(
            {"of": name, "dtype": "bf16", "heads": HEADS, "dims": one.pop("dims"), **place, "recorded": one}
        )
