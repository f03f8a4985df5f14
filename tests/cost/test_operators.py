"""The table of operators of torch is what generated modules run: counted again, it is the same.

Each probe is a call that is recorded. Its operators are those of its schedule, a sum of numbers of the table; all
numbers together follow from the probes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy

import spdsl.cost.operators as counted
from spdsl.cost.conditions import turns
from spdsl.cost.kernels import Call, Options
from spdsl.cost.machine import Machine
from spdsl.cost.phases import Stage, started
from spdsl.ir.plan import Plan
from spdsl.ir.pool import Closing
from spdsl.ir.schedule import Kind
from spdsl.machine import survey
from spdsl.passes.count import Shape
from spdsl.primitives.pools import POOLS
from tests.cost import calls
from tests.cost.calls import TOKENS, both, case, recorded

pytestmark = pytest.mark.crosscompile

TABLE = Path(counted.__file__).with_name("operators.toml")
LEARNED = tuple(name for name in calls.LEARNED if name != calls.MAPPED)  # what its test reads comes on top
PROBES = [  # phase, pattern, batch
    *(("train", name, 2) for name in (
        "nsa", "moba", "msa_minimax", "dilated", calls.EARLY, calls.POOLS, calls.SUNK, calls.KEYS, calls.APART,
        calls.THREE, calls.GIVEN, calls.DRAWN, calls.BEFORE, calls.SUMS, calls.LIMITS,
        calls.GIVEN_LISTS, calls.SHORT, calls.LISTS_OF_CELLS, *calls.BRANCHES_OF_CELLS,
    )),
    *(("prefill", name, 2) for name in ("nsa", "moba", "infllm_v2", calls.EARLY, calls.GIVEN, calls.DRAWN,
        calls.GIVEN_LISTS, calls.LISTS_OF_CELLS, *calls.BRANCHES_OF_CELLS, *calls.SHORT_CELLS,
    )),
    *(("prefill", name, 1) for name in ("nsa", "moba")),
    ("prefill", calls.CASES, 2),
    *(("decode", name, 2) for name in (calls.LISTS_OF_CELLS, *calls.ALL_ROWS)),
    *(("train", calls.pooled(pool, clipped), 2) for pool in POOLS.values() for clipped in (False, True)),
    *(("prefill", calls.pooled(pool, True), 1) for pool in POOLS.values() if pool.closing is not Closing.STREAMED),
    *(("prefill", calls.pooled(pool, False), 1) for pool in POOLS.values() if not pool.named),
]  # fmt: skip
HEAD = """\
# How many operators of torch the functions of the library run that stand between kernels, by the kind of step.
# Counted in generated modules: `pytest tests/cost/test_operators.py --update-golden` counts again.
"""
# No call tells these alone: of a list of tiles, where what the test of the pattern reads comes on top; of a condition.
UNSEEN = {kind: counted.table()[kind] for kind in ("tiles", "holds", "sets")}
Places = list[tuple[str, str]]


def test_the_table_is_what_modules_run(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    places = [(kind, name) for kind, own in counted.table().items() if kind not in UNSEEN for name in own]
    rows, wanted = [], []
    for phase, name, batch in PROBES:
        monkeypatch.setattr(survey, "BATCH", batch)
        module, plan, shape = case(name)
        recorded(module, shape, phase)  # what is drawn once is there
        for stage, _, operators in both(recorded(module, shape, phase), phase):
            none, *each = _sums(plan, stage, shape, places, False, monkeypatch)
            rows.append([one - none for one in each])
            wanted.append(operators - none)
    for name in LEARNED:  # what their gradients come on top of is not exact: arguments are cast
        module, plan, shape = case(name)
        found = [
            sum(recorded(module, shape, "train", learned=learned).back_steps.values()) for learned in (False, True)
        ]
        without, those = (_sums(plan, Stage.BACKWARD, shape, places, one, monkeypatch) for one in (False, True))
        none, *each = (one - other for one, other in zip(those, without, strict=True))
        rows.append([one - none for one in each])
        wanted.append(found[1] - found[0] - none)
    matrix = sympy.Matrix(rows)
    untold = {places[i] for one in matrix.nullspace() for i, number in enumerate(one) if number}
    assert untold == set(), "no probe tells these numbers"
    numbers, _ = matrix.gauss_jordan_solve(sympy.Matrix(wanted))
    found = {place: int(number) for place, number in zip(places, numbers, strict=True)}
    if request.config.getoption("--update-golden", default=False):
        TABLE.write_text(HEAD + _written(found), encoding="utf-8")
    assert found == {(kind, name): counted.table()[kind][name] for kind, name in places}


def _sums(
    plan: Plan, stage: Stage, shape: Shape, places: Places, learned: bool, patch: pytest.MonkeyPatch
) -> list[int]:
    """Operators of the schedule with a table of zeros, then with a one at each of the places."""
    steps = list(started(call := Call(plan, stage, TOKENS, shape, Machine("sm_90", 1), Options(learned=learned))))
    found = []
    for one in (None, *places):
        zeros = {
            kind: {name: int((kind, name) == one) for name in own} for kind, own in counted.table().items()
        } | UNSEEN
        with patch.context() as within:
            within.setattr(counted, "table", lambda zeros=zeros: zeros)
            found.append(sum(len(step.filled) + turns(call, step) * counted.operators(call, step) for step in steps))
    return found


def _written(found: dict[tuple[str, str], int]) -> str:
    table: dict[str, dict[str, int]] = {**UNSEEN}
    for (kind, name), number in found.items():
        table.setdefault(kind, {})[name] = number
    kinds = [kind.value for kind in Kind if kind.value in table]
    lines = (f"\n[{kind if kind.isidentifier() else f'{kind!r}'}]\n" + _lines(table[kind]) for kind in kinds)
    return "".join(lines).replace("'", '"')


def _lines(own: dict[str, int]) -> str:
    return "".join(f"{name} = {number}\n" for name, number in own.items())
