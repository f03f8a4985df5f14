"""What generated modules start is what their schedules say: kernels in order, operators of torch by number."""

from __future__ import annotations

import pytest

from spdsl.cost.kernels import Call, Options
from spdsl.cost.machine import Machine
from spdsl.cost.phases import kernels, launches
from spdsl.resources import folder
from spdsl.runtime.tuning import unit_configs
from tests.cost import calls
from tests.cost.calls import TOKENS, both, case, recorded

pytestmark = pytest.mark.crosscompile  # it records what would be compiled

MACHINE = Machine("sm_90", 1)
PATTERNS = sorted(path.stem for path in folder("patterns").glob("*.spat"))
TEXTS = (
    calls.MEANS, calls.POOLS, calls.EARLY, calls.UNION, calls.SUNK, calls.BOTH_CASES, calls.KEYS, calls.APART,
    calls.THREE, calls.GIVEN, calls.DRAWN, calls.LONG, calls.TILED, calls.COSINE, calls.DECODED, calls.FILLED,
    calls.LIMITS, calls.GIVEN_LISTS, calls.SHORT, calls.DECODED_LISTS, calls.PAIRS, calls.QUERY_CELLS,
    calls.CELLS_OF_A_PROMPT, calls.LISTS_OF_CELLS, *calls.BRANCHES_OF_CELLS, *calls.SHORT_CELLS, *calls.ALL_ROWS,
    calls.NESTED, calls.CELLS, calls.COMBINED,
)  # fmt: skip
# Torch runs more than the schedule counts: what tests of tiles read, casts of arguments, scores in memory.
MORE = (
    "alibi", "big_bird", "block_sparse", "document", "longformer", "prefix_lm", "seer_attention",
    calls.DRAWN, calls.PAIRS, calls.TILED, calls.NESTED, calls.CELLS, calls.COMBINED, "vsa", "xattention",
    calls.QUERY_CELLS, *calls.ALL_ROWS,
)  # fmt: skip


@pytest.mark.parametrize("name", [*PATTERNS, *TEXTS], ids=lambda name: name.split("{")[0].strip()[-18:])
def test_launches_are_those_of_the_schedule(name: str) -> None:
    """Every kernel of every phase, in its order; and as many operators of torch."""
    module, found, shape = case(name)
    for phase in module.PHASES:
        for stage, names, operators in both(recorded(module, shape, phase), phase):
            assert launches(Call(found, stage, TOKENS, shape, MACHINE, Options())) == names, stage
            own = sum(one.operators for one in kernels(found, stage, TOKENS, shape, MACHINE))
            assert own <= operators if name in MORE else own == operators, stage


@pytest.mark.parametrize("name", calls.LEARNED, ids=lambda name: name.split("{")[0].split()[-1])
def test_launches_of_biases_that_learn(name: str) -> None:
    """With and without gradients of what they read: who wants none starts nothing for it."""
    module, found, shape = case(name)
    for learned in (False, True):
        for stage, names, _ in both(recorded(module, shape, "train", learned=learned), "train"):
            assert launches(Call(found, stage, TOKENS, shape, MACHINE, Options(learned=learned))) == names, stage
        assert any("dbias" in one for one in names) == learned


def test_heads_go_by_turns_where_their_parts_need_much_memory() -> None:
    tokens, (module, found, shape) = 2048, case("moba", count=128)
    for stage, names, _ in both(recorded(module, shape, "train", tokens), "train"):
        assert launches(Call(found, stage, tokens, shape, MACHINE, Options())) == names
        assert sum(name in ("merge_pairs", "add_pairs") for name in names) > 1


def test_rows_go_by_turns_where_their_scores_need_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_configs, "CUT_BYTES", 1 << 14)
    module, found, shape = case(calls.LONG)
    for stage, names, _ in both(recorded(module, shape, "prefill"), "prefill"):
        assert launches(Call(found, stage, TOKENS, shape, MACHINE, Options())) == names
        assert names.count("cut_lists") > 4


def test_what_has_no_entries_starts_no_kernels() -> None:
    """Of a sequence shorter than a cell."""
    tokens, (module, found, shape) = 16, case(calls.MEANS)
    for phase in ("train", "prefill"):
        for stage, names, _ in both(recorded(module, shape, phase, tokens), phase):
            assert launches(Call(found, stage, tokens, shape, MACHINE, Options())) == names, stage
