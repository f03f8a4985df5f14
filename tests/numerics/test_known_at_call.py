"""How many units are chosen, and from which score on, where only the call knows it: numbers on the device, by list."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spdsl.oracle import dense
from tests.library import broken
from tests.numerics.cases import Inputs, Shape, inputs_of
from tests.numerics.conftest import Engine
from tests.numerics.patterns import module_from, module_of, pattern_of, printed
from tests.numerics.selected import AT_CALL, by_rank, expect_lists
from tests.numerics.test_attend_paged import check, filled, with_states
from tests.numerics.test_cut import cut_module, cut_text
from tests.numerics.test_selection import checked
from tests.numerics.test_selection_layouts import check_chunks, check_packed, check_padded
from tests.quick import quick

NAMES = list(AT_CALL)
SAME_IN_CHUNKS = [name for name, body in AT_CALL.items() if "length" not in body]


@pytest.mark.parametrize("name", quick(NAMES, NAMES[1:2]))
def test_lists_and_results(engine: Engine, name: str) -> None:
    shape = Shape(21, 75, 2, 4, 2) if engine.name == "interpreted" else Shape(33, 83, 2, 4, 2)
    checked(AT_CALL[name], shape, engine(AT_CALL[name]))


@pytest.mark.parametrize("name", NAMES)
def test_lists_that_are_cut(kernels: Engine, name: str, tmp_path: Path) -> None:
    checked(AT_CALL[name], Shape(17, 75, heads=4, kv_heads=2), kernels(cut_module(AT_CALL[name], tmp_path)))


@pytest.mark.parametrize("name", NAMES)
def test_packed_and_padded(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name != NAMES[3]:
        pytest.skip("the same kernels in fewer patterns")
    check_packed(AT_CALL[name], engine(AT_CALL[name]), [0, 21, 38])
    check_padded(AT_CALL[name], engine(AT_CALL[name]), [21, 0, 18])


@pytest.mark.parametrize("name", SAME_IN_CHUNKS)
def test_chunks_and_steps(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name != NAMES[1]:
        pytest.skip("the same kernels in fewer patterns")
    check_chunks(AT_CALL[name], engine(AT_CALL[name]), 16, [17], 2, 2)


def test_steps_that_are_cut(kernels: Engine, tmp_path: Path) -> None:
    body = AT_CALL[NAMES[1]]
    check_chunks(body, kernels(cut_module(body, tmp_path)), 16, [17], 2, 2)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[1]])
def test_splits_of_a_step(engine: Engine, name: str) -> None:
    """One query of 70 units: its programs rank a share each."""
    body = AT_CALL[name]
    pattern, inputs = pattern_of(body), inputs_of(pattern_of(body), Shape(1, 70 * 16, batch=2))
    expect_lists(engine(body).choices(**inputs), pattern, inputs)


@pytest.mark.parametrize("name", SAME_IN_CHUNKS)
def test_pages_of_the_caller(cpu: Engine, name: str) -> None:
    module, pattern = cpu(AT_CALL[name]), pattern_of(AT_CALL[name])
    pages = filled(pattern, [(40, 9, -1), (50, 1, 0), (0, 1, -1), (7, 7, -1)], 16)
    check(module, pattern, with_states(module, pattern, pages, 9))


@pytest.mark.parametrize("name", NAMES)
def test_every_row_as_the_last(cpu: Engine, name: str) -> None:
    """`length` is the row's own."""
    body, shape = AT_CALL[name], Shape(5, 70)
    pattern, inputs = pattern_of(body), inputs_of(pattern_of(body), shape)
    found = cpu(body).choices(**inputs, phase="decode")["chosen"]
    for row in range(5):
        own = {key: x[:, :, : 66 + row] if x.dim() == 4 and x.shape[2] == 70 else x for key, x in inputs.items()}
        own["q"] = inputs["q"][:, :, row : row + 1]
        wanted = dense.choices(pattern, own)["chosen"][:, :, 0]
        assert torch.equal(found[:, :, row, : wanted.shape[-1]], wanted)


FREE = (
    "causal {tensors} index = stream(value = none) units = compress(16, of = index) chosen = {rule} "
    "return attend(chosen)"
)
COUNTED = FREE.format(
    tensors="n = tensor()", rule="top_k(n, score = dot(units, scale = 1), share = head, force = first(1), most = 3)"
)
WHOLE = FREE.format(
    tensors="n = tensor(head, int)",
    rule="top_k(n[h] * 100 / 300, score = dot(units, scale = 1), share = head, most = 3)",
)
PASSED = FREE.format(
    tensors="x = tensor()", rule="threshold(x, score = dot(units, scale = 1), share = head, least = 1, most = 4)"
)
ABOVE = FREE.format(tensors="x = tensor()", rule="threshold(x, score = dot(units, scale = 1), share = head)")
FILLED = FREE.format(
    tensors="n = tensor()",
    rule="threshold(0, score = dot(units, scale = 1), share = head, least = n, most = 4, force = first(1))",
)
SCORES = [-2.0, 1.0, -0.0, 3.0, -1.0]
Case = tuple[float, list[int]]  # the number of the call; the units that are chosen of SCORES
COUNTS: list[Case] = [
    (0, []), (-3, []), (1, [0]), (2, [0, 3]), (2.99, [0, 3]), (3, [0, 1, 3]), (4, [0, 1, 3]), (1e30, [0, 1, 3]),
    (inf, [0, 1, 3]), (-inf, []), (nan, []),
]  # fmt: skip
LEVELS: list[Case] = [
    (2, [3]), (0.0, [1, 2, 3]), (-0.0, [1, 2, 3]), (1, [1, 3]), (-9, [1, 2, 3, 4]), (9, [3]), (inf, [3]),
    (-inf, [1, 2, 3, 4]), (nan, [3]), (-nan, [3]),
]  # fmt: skip
ALONE: list[Case] = [(2, [3]), (0.0, [1, 2, 3]), (-0.0, [1, 2, 3]), (9, []), (nan, []), (-inf, [0, 1, 2, 3, 4])]
LEASTS: list[Case] = [(0, [0, 1, 2, 3]), (-1, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3]), (nan, [0, 1, 2, 3])]
RULES = {"counts": (COUNTED, COUNTS), "levels": (PASSED, LEVELS), "alone": (ABOVE, ALONE), "least": (FILLED, LEASTS)}


def scored(body: str, numbers: Tensor, name: str) -> Inputs:
    """A sequence for each number, whose one row scores five closed units by SCORES. A last unit stays open."""
    inputs = inputs_of(pattern_of(body), Shape(1, 95, len(numbers), 1))
    inputs["q"], inputs["k_index"] = torch.zeros_like(inputs["q"]), torch.zeros_like(inputs["k_index"])
    inputs["q"][..., 0] = 1
    inputs["k_index"][:, 0, :80, 0] = torch.tensor(SCORES, dtype=torch.float64).repeat_interleave(16)
    return {**inputs, name: numbers}


@pytest.mark.parametrize("way", ["ranked", "cut"])
@pytest.mark.parametrize("rule", RULES)
def test_numbers_by_hand(engine: Engine, rule: str, way: str, tmp_path: Path) -> None:
    body, cases = RULES[rule]
    if way == "cut" and engine.name == "cpu":
        pytest.skip("torch has one way")
    module = engine(cut_module(body, tmp_path) if way == "cut" else body)
    numbers = torch.tensor([number for number, _ in cases], dtype=torch.float64)
    inputs = scored(body, numbers, "n" if "n = tensor" in body else "x")
    found = module.choices(**inputs)["chosen"][:, 0, 0].tolist()
    assert [[unit for unit in own if unit >= 0] for own in found] == [wanted for _, wanted in cases]
    expect_lists(module.choices(**inputs), pattern_of(body), inputs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_whole_numbers_of_few_bits_do_not_wrap(cpu: Engine, dtype: torch.dtype) -> None:
    """And a third of 6 is 2, whatever a floating-point third is."""
    inputs = scored(WHOLE, torch.tensor([[6], [3], [9], [2], [100]], dtype=dtype), "n")
    counts = [int((own >= 0).sum()) for own in cpu(WHOLE).choices(**inputs)["chosen"][:, 0, 0]]
    assert counts == [2, 1, 3, 0, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_level_is_compared_as_scores_are(cpu: Engine, dtype: torch.dtype) -> None:
    """0.1 in 16 bits is another number than in 64: as written in the pattern it is that of the scores' type."""
    inputs = scored(ABOVE, torch.tensor([0.1, 0.1]).to(dtype), "x")
    inputs["k_index"][:, 0, 16:32, 0] = torch.tensor(0.1).to(dtype).double()
    given = {key: x if key == "x" else x.to(dtype) for key, x in inputs.items()}
    assert cpu(ABOVE).choices(**given)["chosen"][:, 0, 0].tolist() == [[1, 3, -1, -1, -1, -1]] * 2


def test_one_graph_for_all_numbers() -> None:
    module = module_of(AT_CALL[NAMES[1]])
    inputs = inputs_of(pattern_of(AT_CALL[NAMES[1]]), Shape(40, 40), torch.float32)
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager")
    compiled(**inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for change in (1, 20, 70):
            other = {**inputs, "n": inputs["n"] + change, "level": inputs["level"] - change}
            assert torch.equal(compiled(**other), module.attention(**other))


def test_one_graph_for_all_lengths() -> None:
    """Also where `length` decides."""
    body = AT_CALL["a number by length"]
    module, pattern = module_of(body), pattern_of(body)
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(**inputs_of(pattern, Shape(112, 112, batch=3), torch.float32))
    with torch.compiler.set_stance("fail_on_recompile"):
        inputs = inputs_of(pattern, Shape(144, 144, batch=5), torch.float32)
        assert torch.equal(compiled(**inputs), module.attention(**inputs))


def test_no_gradient_reaches_what_the_call_says(cpu: Engine) -> None:
    body = AT_CALL["numbers of heads"]
    inputs = inputs_of(pattern_of(body), Shape(20, 60))
    inputs["level"].requires_grad_()
    inputs["v"].requires_grad_()
    cpu(body).attention(**inputs).sum().backward()
    assert inputs["level"].grad is None
    assert inputs["v"].grad is not None


@pytest.mark.parametrize("name", ["limits", "lists", "level", "least", "inputs", "layout", "chosen_limits"])
def test_a_number_may_have_any_name(cpu: Engine, name: str) -> None:
    rule = f"top_k({name}[h] % 4, score = rank, share = head, unit = max(16), most = 3)"
    body = by_rank(rule, more=f"causal {name} = tensor(head, int)")
    inputs = inputs_of(pattern_of(body), Shape(20, 60))
    expect_lists(cpu(body).choices(**inputs), pattern_of(body), inputs)


def test_the_reference_keeps_what_the_call_says(cpu: Engine) -> None:
    body = AT_CALL[NAMES[0]]
    inputs = inputs_of(pattern_of(body), Shape(40, 40, batch=4))
    inputs["n"] = torch.tensor([0, 1, 2, 3])
    out = cpu(body).reference(**inputs)
    assert out[0].eq(0).all()
    torch.testing.assert_close(cpu(body).attention(**inputs), out)


Check = tuple[str, Inputs]


def of_heads() -> Check:
    """Lists of heads and sequences that differ in their numbers; one head scores all units as high as its level."""
    body = AT_CALL["numbers of heads"]
    inputs = inputs_of(pattern_of(body), Shape(3, 80, batch=2, heads=4, kv_heads=2))
    inputs["n"] = torch.tensor([[40, 0, 20, 40], [0, 40, 20, 0]])
    inputs["level"] = torch.tensor([[9.0, 0.3, 0.1, 0.0], [0.2, 9.0, 0.5, -2.0]])
    inputs["q"][0, 3] = 0
    return body, inputs


def of_counts() -> Check:
    body = AT_CALL["a number"]
    return body, {**inputs_of(pattern_of(body), Shape(3, 80, batch=4)), "n": torch.tensor([0, 1, 2, 3])}


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
def test_counts_stay_on_the_device(cpu: Engine, phase: str) -> None:
    """As many as the rule leaves: for a row that sees fewer units, fewer; none of a list of no unit."""
    inputs = {**inputs_of(pattern_of(COUNTED), Shape(20, 80, 4, 1)), "n": torch.tensor([0.0, 1.0, 2.0, 9.0])}
    lists, counts = cpu(COUNTED).choices(**inputs, phase=phase, return_counts=True)
    assert counts["chosen"].dtype == torch.int32
    assert torch.equal(counts["chosen"], lists["chosen"].ge(0).sum(-1).int())
    assert counts["chosen"][:, 0, -1].tolist() == [0, 1, 2, 3]


def test_no_choice_has_no_count(cpu: Engine) -> None:
    chosen = "chosen = top_k(2, score = dot(compress(16)), share = head)"
    body = f"causal {chosen} return attend(chosen) if prefill return attend(all)"
    assert cpu(body).choices(**inputs_of(pattern_of(body), Shape()), phase="decode", return_counts=True) == ({}, {})
    with pytest.raises(TypeError, match="return_counts"):
        cpu(body).choices(**inputs_of(pattern_of(body), Shape()), return_counts=1)


def test_examples_have_full_lists(cpu: Engine) -> None:
    """What a report or a tuner measures is the most that the call may ask for."""
    module = cpu(COUNTED)
    sizes = module.example_inputs(1, 96, heads=1, kv_heads=1, qk_dim=16, v_dim=16, dtype=torch.float32, device="cpu")
    assert (module.choices(**sizes)["chosen"][0, 0, -1] >= 0).all()


BUGS = [
    ("all lists have as many", of_counts, printed, "place < most_of(limits)", "place < S.WIDTH"),
    ("least is what is most", of_heads, printed, "tl.load(limits).to(tl.int32)", "tl.load(limits + 1).to(tl.int32)"),
    ("the first list's", of_heads, printed, "num_programs(1) + list_head) * LIMITS", "num_programs(1)) * LIMITS"),
    ("the first sequence's", of_heads, printed, "tl.cast(s, tl.int64) * tl.num_programs(1) + list_head", "list_head"),
    ("all cut lists have as many", of_counts, cut_text, "most_of(limits), least_of", "tiles.most, least_of"),
    ("no cut list is filled up", of_heads, cut_text, "most_of(limits), least_of(limits)", "most_of(limits), 0"),
    ("at the level is not above it", of_heads, cut_text, "score_bits(level) - 1", "score_bits(level)"),
    ("a cut list has another's level", of_heads, cut_text, "limits, rows.s, list_head)", "limits, rows.s, 0)"),
]  # fmt: skip
FAULTS = pytest.mark.parametrize("case, text, old, new", [bug[1:] for bug in BUGS], ids=[bug[0] for bug in BUGS])


@FAULTS
def test_a_seeded_fault_is_seen(
    kernels: Engine, case: Callable[[], Check], text: Callable[[str], str], old: str, new: str, tmp_path: Path
) -> None:
    body, inputs = case()
    module = kernels(broken(text(body), old, new, tmp_path))
    with pytest.raises(AssertionError):
        expect_lists(module.choices(**inputs), pattern_of(body), inputs)


@pytest.mark.parametrize("text", [printed, cut_text])
@pytest.mark.parametrize("case", [of_heads, of_counts])
def test_without_a_fault_none_is_seen(
    kernels: Engine, case: Callable[[], Check], text: Callable[[str], str], tmp_path: Path
) -> None:
    body, inputs = case()
    module = kernels(module_from(text(body), tmp_path / "generated.py"))
    expect_lists(module.choices(**inputs), pattern_of(body), inputs)
