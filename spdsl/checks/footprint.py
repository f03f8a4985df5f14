"""footprint: kernels that do not fit on the GPU that is named, by the model of shared memory and registers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from spdsl.checks.kernels import Launch, launches
from spdsl.checks.view import View, warning
from spdsl.diagnostics import Diagnostic, Hint
from spdsl.runtime.tuning.footprint import shared_bytes, spills
from spdsl.targets import Target

# The model is never under what the compiler takes, and within a tenth of it for nine kernels of ten. So what is above
# the limit by more cannot run, and what is above it by less may.
MARGIN = 1.1


class Need(NamedTuple):
    launch: Launch
    shared: int  # bytes of one block
    spills: bool  # more registers than a thread has


def does_not_fit(view: View) -> Iterator[Diagnostic]:
    """More shared memory than a block can have: the launch fails."""
    for target, own in _by_step(view):
        over = [need for need in own if need.shared > MARGIN * target.shared_per_block]
        if over:
            worst = max(over, key=lambda need: need.shared)
            yield Diagnostic(
                "E522", _too_much(worst, target), worst.launch.span, "does not fit",
                tuple(_tile(need.launch) for need in over), (_SMALLER,),
            )  # fmt: skip


def may_not_fit(view: View) -> Iterator[Diagnostic]:
    """More registers than a thread has, or about as much shared memory as there is."""
    if any(does_not_fit(view)):
        return
    for target, own in _by_step(view):
        over = [need for need in own if need.spills or need.shared > target.shared_per_block]
        if not over:
            continue
        worst = max(over, key=lambda need: (need.shared > target.shared_per_block, need.shared))
        message = _too_much(worst, target) if worst.shared > target.shared_per_block else (
            f"{_kernel(worst)} is predicted to need more registers than a thread of {target.name} has: they spill"
        )  # fmt: skip
        yield warning(
            "W511", message, worst.launch.span, "may not fit", *(_tile(need.launch) for need in over),
            hints=(Hint(f"`spdsl compile --target {target.name} --report` compiles it and tells"), _SMALLER),
        )  # fmt: skip


_SMALLER = Hint("smaller head dims, or fewer query heads on a list, make smaller tiles")


def _by_step(view: View) -> Iterator[tuple[Target, list[Need]]]:
    """The kernels of each softmax and each choice."""
    if view.target is None:
        return
    architecture = view.target.architecture
    steps: dict[str, list[Need]] = {}
    for launch in launches(view):
        shared = shared_bytes(launch.kernel, launch.config, architecture)
        steps.setdefault(launch.of, []).append(Need(launch, shared, spills(launch.kernel, launch.config, architecture)))
    for own in steps.values():
        yield view.target, own


def _too_much(need: Need, target: Target) -> str:
    return (
        f"{_kernel(need)} needs up to {need.shared:,} bytes of shared memory, a block of {target.name} has "
        f"{target.shared_per_block:,}"
    )


def _kernel(need: Need) -> str:
    return f"the kernel `{need.launch.kernel.name}` of `{need.launch.of}`"


def _tile(launch: Launch) -> str:
    form, config = launch.kernel, launch.config
    return (
        f"{form.name}: tiles of {config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} "
        f"stages, head dims {form.qk} and {form.v}, {form.size} bytes per element, {form.group} heads"
    )
