"""Results of two checkouts: equal bit by bit, or by how much the newer one is nearer to float64 or farther from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy

from benchmarks.compare.cases import PARAMS, TOKENS, text_of

Arrays = dict[str, numpy.ndarray]
SEEDS = 20  # that errors are taken over where bits differ
SLACK = 1.05  # the largest of 20 errors is itself a draw


class Difference(NamedTuple):
    """Of one tensor of one pattern. Errors: the largest over all seeds, relative to the largest number of float64."""

    pattern: str
    tensor: str
    old: float
    new: float

    @property
    def worse(self) -> bool:
        return not self.new <= self.old * SLACK


def compare(old: Path, new: Path, names: list[str], interpreted: bool) -> Iterator[tuple[str, int, list[Difference]]]:
    """(pattern, tensors that were compared, those that differ) of each pattern."""
    folder = Path(new, "patterns")
    for name in names or sorted(path.stem for path in folder.glob("*.spat")):
        text = text_of(folder / f"{name}.spat")
        mine, theirs = (run(checkout, name, text, [0], interpreted) for checkout in (new, old))
        missing = theirs[0].keys() - mine[0].keys()
        differing = [x for x in mine[0].keys() & theirs[0].keys() if not equal(theirs[0][x], mine[0][x])]
        differences = [Difference(name, x, 0.0, float("inf")) for x in sorted(missing)]
        if differing:
            differences += errors(name, differing, *both(old, new, name, text, interpreted))
        yield name, len(mine[0]), differences


def both(old: Path, new: Path, name: str, text: str, interpreted: bool) -> tuple[list[Arrays], list[Arrays]]:
    seeds = list(range(SEEDS))
    return run(old, name, text, seeds, interpreted), run(new, name, text, seeds, interpreted, reference=True)


def errors(name: str, tensors: list[str], old: list[Arrays], new: list[Arrays]) -> Iterator[Difference]:
    """A tensor without a reference of its own (a list, a step) may not differ at all: its new error is infinite."""
    for tensor in sorted(tensors):
        meaning = tensor.replace("attention.", "reference.")
        if meaning == tensor or meaning not in new[0]:
            yield Difference(name, tensor, 0.0, float("inf"))
            continue
        pairs = [
            [error(x[tensor], wanted[meaning]) for x, wanted in zip(side, new, strict=True)] for side in (old, new)
        ]
        yield Difference(name, tensor, max(pairs[0]), max(pairs[1]))


def error(found: numpy.ndarray, wanted: numpy.ndarray) -> float:
    """The largest difference of finite numbers over the largest finite number; infinite where infinities differ."""
    finite = numpy.isfinite(wanted)
    if not equal(numpy.isfinite(found), finite):
        return float("inf")
    scale = numpy.abs(wanted[finite]).max(initial=1e-30)
    return float(numpy.abs(found[finite].astype(numpy.float64) - wanted[finite]).max(initial=0.0) / scale)


def equal(a: numpy.ndarray, b: numpy.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and numpy.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def run(
    checkout: Path, name: str, text: str, seeds: list[int], interpreted: bool, reference: bool = False
) -> list[Arrays]:
    """What the worker finds in `checkout`, one dictionary for each seed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "SPDSL_TUNE": "off"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    with TemporaryDirectory() as folder:
        job = {"text": text, "params": PARAMS.get(name, {}), "tokens": TOKENS, "seeds": seeds}
        worker = Path(__file__).with_name("worker.py")
        subprocess.run(
            [sys.executable, str(worker)],
            input=json.dumps(job | {"folder": folder, "reference": reference}),
            text=True, check=True, cwd=checkout, env=environment | {"SPDSL_CACHE_DIR": f"{folder}/cache"},
        )  # fmt: skip
        return [dict(numpy.load(Path(folder, f"{seed}.npz"))) for seed in seeds]
