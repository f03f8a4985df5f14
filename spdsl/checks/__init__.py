"""Whether a plan fits the machine: one file per subject, one function per code, all of them in `CHECKS`.

Pure arithmetic on the plan and the tables of configurations; nothing here needs a GPU, torch or triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from spdsl.checks.capacity import scores_in_memory, unbounded, whole_budget
from spdsl.checks.dense import slower_than_dense
from spdsl.checks.footprint import does_not_fit, may_not_fit
from spdsl.checks.groups import groups
from spdsl.checks.head_dims import padded, untuned
from spdsl.checks.int32 import maps, pairs_of_units, positions
from spdsl.checks.pages import pages_and_units, small_pages
from spdsl.checks.share import share
from spdsl.checks.tiles import tiles
from spdsl.checks.unit_blocks import unit_blocks
from spdsl.checks.view import View
from spdsl.diagnostics import Diagnostic, Severity

CHECKS: tuple[Callable[[View], Iterator[Diagnostic]], ...] = (
    groups, unit_blocks, pages_and_units, tiles, share, padded, untuned,
    scores_in_memory, unbounded, may_not_fit, small_pages, whole_budget,
    maps, positions, pairs_of_units, does_not_fit,
)  # fmt: skip
# Those that take more than arithmetic on sizes: only for what can run.
ESTIMATES: tuple[Callable[[View], Iterator[Diagnostic]], ...] = (slower_than_dense,)


def findings(view: View) -> Iterator[Diagnostic]:
    """What does not fit, check by check."""
    diagnostics = [diagnostic for check in CHECKS for diagnostic in check(view)]
    yield from diagnostics
    if not any(diagnostic.severity is Severity.ERROR for diagnostic in diagnostics):
        for estimate in ESTIMATES:
            yield from estimate(view)
