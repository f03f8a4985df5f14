"""What the patterns of the library launch, compiled for a GPU that need not be there; equal kernels once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from types import ModuleType

import spdsl
from spdsl import targets
from spdsl.machine.crosscompile import Compiled, compile_launch
from spdsl.machine.kernel_text import whole_text
from spdsl.machine.launches import Argument, Launch
from spdsl.machine.survey import survey
from spdsl.resources import folder

Dims = tuple[int, int]

_compiled: dict[tuple[object, ...], Compiled] = {}


@cache
def load(pattern: str) -> ModuleType:
    return spdsl.load(folder("patterns") / f"{pattern}.spat")


@cache
def nsa_of_group(group: int) -> ModuleType:
    """The pattern nsa with that many query heads for each kv head, and head dims left open."""
    text = (folder("patterns") / "nsa.spat").read_text()
    text = re.sub(r"heads .*", f"heads  query = {2 * group}, kv = 2", text)
    return spdsl.load(re.sub(r"dim .*\n", "", text))


def kernels(
    pattern: str | ModuleType,
    target: str,
    dtype: str,
    dims: Dims,
    phases: tuple[str, ...],
    wanted: Callable[[Launch], bool] = lambda launch: True,
) -> Iterator[Compiled]:
    """Every wanted kernel of a pattern in these phases, with the configurations of the target."""
    module, gpu = load(pattern) if isinstance(pattern, str) else pattern, targets.find(target)
    for launch in survey(module, (dtype,), (dims,), gpu):
        assert launch.workload is not None
        if launch.workload.phase in phases and wanted(launch):
            yield compiled(launch, gpu)


def compiled(launch: Launch, gpu: targets.Target) -> Compiled:
    """`launch` for `gpu`; a kernel of the same text, in whatever module, is compiled once."""
    leaves = [(path, replace(leaf, container=None)) for path, _, leaf in launch.leaves()]
    text = whole_text(launch.kernel)
    assert not (asked := tuples_asked(launch.arguments, text)), f"{launch.kernel}: {asked}"
    key = (gpu.name, text, repr(leaves), launch.options)
    if key not in _compiled:
        _compiled[key] = compile_launch(launch, gpu)
    return _compiled[key]


def tuples_asked(arguments: Iterable[Argument], text: str) -> list[str]:
    """Tuples with nothing in some place of which a kernel asks whether they are None; no triton before 3.7 compiles it.

    By their names, which the functions called by a kernel keep. What is in a place may be asked.
    """
    found = []
    for one in arguments:
        empty = any(item.type == "constexpr" and item.value is None for item in one.items)
        if empty and (asked := re.search(rf"\b{one.name} is (not )?None", text)):
            found.append(asked[0])
        found += tuples_asked(one.items, text)
    return found


def kind(one: Compiled) -> str:
    """`forward`, `dq`, `dkdv`, `decode`, `select`; of row_delta, join_splits, add_slots and so on the last word."""
    return one.kernel.rsplit("_", 1)[-1]
