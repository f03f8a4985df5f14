"""The body of a pattern, and what a pass makes of it: one file of pairs for each pass, in `pairs`.

A body stands at the margin, what is made of it is indented. `--update-golden` writes the results anew: read the
difference. A pass over values that no pattern shows has a worked example in its docstring.
"""

from __future__ import annotations

import doctest
import importlib
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import spdsl
from spdsl import passes
from tests.passes import language, plans, schedules

FOLDER = Path(__file__).parent / "pairs"
ROOT = Path(passes.__file__).parent


def check(body: str) -> Iterator[str]:
    """What `lower`, `check`, `later_keys` and `choices` say."""
    return (f"{found.code} {found.message}" for found in spdsl.check(f"pattern p {{ {body} }}"))


PAIRS: dict[str, Callable[[str], Iterator[str]]] = {
    made.__name__: made
    for made in (
        check, language.choices, language.later_keys, language.source_numbers, plans.aligned, plans.bias_reads,
        plans.count,
        plans.disjuncts, plans.divergence, plans.joint, plans.listed, plans.overlap, plans.partition, plans.ranges,
        plans.read_lengths, plans.resident, plans.residues, plans.selection, plans.split, plans.tidy, plans.visible,
        schedules.schedule,
    )
}  # fmt: skip
PAIRS |= {
    "lower": language.lower, "set_algebra": language.lower,
    "arithmetic": language.arithmetic, "values": language.arithmetic, "expression_limits": language.arithmetic,
    "evaluate": language.evaluate, "kinds": language.evaluate, "placed_arguments": language.evaluate,
    "names": language.names, "arguments": language.arguments, "codes": language.codes, "grains": language.grains,
    "results": language.results, "skips": check, "schedule/buffers": schedules.buffers,
}  # fmt: skip
PAIRS |= {
    f"schedule/{name}": schedules.of_file(name)
    for name in ("attend", "bias", "choose", "entries", "extras", "pairs", "results", "sums", "units")
}


def _pair(body: str, lines: Iterable[str]) -> str:
    return f"{body}\n{textwrap.indent(chr(10).join(lines) or 'nothing', '    ')}\n"


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"{name}.txt"
    known = path.read_text(encoding="utf-8")
    bodies = [line for line in known.splitlines() if line and not line.startswith(" ")]
    assert bodies
    found = "\n".join(_pair(body, PAIRS[name](body)) for body in bodies)
    if request.config.getoption("--update-golden"):
        path.write_text(found, encoding="utf-8")
        known = found
    assert found == known


def test_every_file_has_its_pass() -> None:
    assert {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.txt")} == set(PAIRS)


def _passes() -> set[str]:
    """The files of passes, a package by its name."""
    files = {path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py")}
    return {name.removesuffix("/__init__") for name in files} - {"__init__"}


def _examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(f"{passes.__name__}.{name.replace('/', '.')}")
    return [found for found in doctest.DocTestFinder().find(module) if found.examples]


@pytest.mark.parametrize("name", sorted(_passes() - set(PAIRS)))
def test_a_pass_without_pairs_has_a_worked_example(name: str) -> None:
    examples = _examples(name)
    assert examples, f"passes/{name}.py: add pairs (tests/passes/pairs) or a doctest"
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0
