"""What `make quick` runs: under a minute on two cores, from syntax to one interpreted shape of each loop form.

Files that are cheap are taken whole. Elsewhere a test, or one of its parameters, has the marker `quick`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

WHOLE = (
    "syntax/", "checks/", "golden/", "test_catalogue.py", "diagnostics/test_codes.py", "diagnostics/test_selection.py",
    "diagnostics/test_first_contact.py", "passes/test_count.py", "passes/test_joint.py", "passes/test_later_keys.py",
    "passes/test_pairs.py", "passes/test_residues.py", "passes/test_selection.py", "passes/test_split.py",
    "passes/test_read_lengths.py", "runtime/test_cache.py", "runtime/test_choose.py",
)  # fmt: skip


def quick(names: Iterable[str], chosen: Collection[str]) -> list[Any]:
    """Parameters of a test, of which the chosen ones are quick."""
    return [pytest.param(name, marks=pytest.mark.quick) if name in chosen else name for name in names]
