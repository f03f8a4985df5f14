"""Compressed streams, scores and choices, as the lowering makes them of words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy

from spdsl.ir.pattern import Choice, Compress, Grid, Kl, Logits, Mass, Pooled, Stream, Values, Weight
from spdsl.ir.rule import Size, Threshold, TopK
from spdsl.ir.symbols import H, K, Q, membership
from tests.passes.lowered import choice, lowered, of_file, softmax

FIRST_64 = 64 > K  # the first unit of 64
SMALL = "causal blocks = compress(16) "


def own(unit: int, before: int = 0) -> sympy.Basic:
    """The query's own unit and `before` units before it."""
    mine = sympy.floor(Q / sympy.Integer(unit))
    return sympy.And(unit * (mine - before) <= K, unit * (mine + 1) > K)


def closed(width: int, stride: int) -> sympy.Basic:
    return stride * K + width - 1 <= Q


def stream(name: str, body: str) -> Stream:
    found = lowered(body).input(name)
    assert isinstance(found, Stream)
    return found


def test_nsa() -> None:
    nsa = of_file("nsa")
    assert [found.name for found in nsa.inputs] == [
        "q", "rough", "picked", "recent", "entries", "entries_k_position", "entries_k_up", "entries_k_down",
        "entries_v_position", "entries_v_up", "entries_v_down", "chosen",
    ]  # fmt: skip
    coarse = softmax(nsa, "coarse")
    assert [(term.stream, term.test) for term in coarse.terms] == [("entries", closed(32, 16))]
    assert nsa.input("entries") == Stream("entries", grid=Grid(32, 16), compress=Compress("rough", "mlp"))
    assert choice(nsa, "chosen") == Choice(
        "chosen", TopK(Size.of(16)), 64, 1, "group", score=Mass(coarse), heads_by="sum", unit_by="sum",
        force=sympy.Or(FIRST_64, own(64, 1)),
    )  # fmt: skip
    read = membership("chosen", H, Q, sympy.floor(K / sympy.Integer(64)))
    (term,) = softmax(nsa, "fine").terms
    assert (term.stream, term.test) == ("picked", sympy.And(K <= Q, sympy.Ne(read, 0)))
    case = nsa.cases[0]
    assert [step.name for step in nsa.steps(case)] == ["coarse", "chosen", "fine", "near"]


def test_infllm_v2() -> None:
    pattern = of_file("infllm_v2")
    found = choice(pattern, "chosen")
    assert found == Choice(
        "chosen", TopK(Size.of(64)), 64, 1, "group", score=Mass(softmax(pattern, "ranking")), heads_by="sum",
        unit_by="max", force=FIRST_64, within=sympy.Not(own(64, 31)),
    )  # fmt: skip
    assert [str(case.condition) for case in pattern.cases] == ["length < 8192", "None"]
    dense = pattern.steps(pattern.cases[0])
    assert [step.name for step in dense] == ["attend"], "the dense case selects nothing"


def test_msa_minimax() -> None:
    pattern = of_file("msa_minimax")
    rank = Logits(softmax(pattern, "rank"))
    assert (rank.softmax.query, rank.grain.stream, rank.softmax.terms[0].test) == ("q_index", "index", K <= Q)
    assert choice(pattern, "chosen") == Choice(
        "chosen", TopK(Size.of(16)), 128, 1, "group", score=rank, unit_by="max", force=own(128)
    )
    mass = Mass(softmax(pattern, "fine"))
    assert pattern.cases[0].extras == (
        Kl(Pooled(mass, 1, 1, "group", heads_by="mean"), Pooled(rank, 1, 1, "group")),
    )  # fmt: skip


def test_moba() -> None:
    pattern = of_file("moba")
    ranking = softmax(pattern, "ranking")
    assert ranking.terms[0].test == closed(4096, 4096)
    assert choice(pattern, "chosen") == Choice(
        "chosen", TopK(Size.of(12)), 4096, 1, "head", score=Logits(ranking), force=own(4096)
    )


def test_compress_takes_over_the_shape_of_its_source() -> None:
    found = stream("e", "causal far = stream(heads = 2, qk = 8, v = 4) e = compress(6, 2, of = far) return attend(e)")
    assert found == Stream("e", 2, 8, 4, grid=Grid(6, 2), compress=Compress("far", "mean"))
    assert stream("e", "e = compress(6) return attend(e)").grid == Grid(6, 6)


@pytest.mark.parametrize("value, sides", [("own", "kv"), ("key", "k")])
def test_weights_of_a_side(value: str, sides: str) -> None:
    shapes = {
        "weighted": {"weight": ("heads", 4), "position": ("heads", 4, "dim")},
        "mlp": {
            "position": ("heads", 4, "dim"),
            "up": ("heads", 4, "dim", "hidden"),
            "down": ("heads", "hidden", "dim"),
        },
        "max": {},
        "min": {},
    }
    for by, roles in shapes.items():
        pattern = lowered(f"causal kv = stream(value = {value}) e = compress(4, by = {by}) return attend(e)")
        names = [found.name for found in pattern.inputs]
        weights = tuple(found for found in pattern.inputs if isinstance(found, Weight))
        assert weights == tuple(
            Weight(f"e_{side}_{role}", "e", tuple({"k": "qk", "v": "v"}[side] if x == "dim" else x for x in axes))
            for side in sides
            for role, axes in roles.items()
        )
        assert names.index("e") + 1 == len(names) - len(weights)


def test_compress_by_softmax_keeps_the_stream_of_logits() -> None:
    pattern = lowered("causal z = stream() e = compress(4, by = softmax(z)) return attend(e)")
    assert pattern.input("e") == Stream("e", grid=Grid(4, 4), compress=Compress("kv", "softmax", "z"))
    assert [found.name for found in pattern.inputs] == ["q", "kv", "z", "e"]


def test_entries_without_values_can_be_scored() -> None:
    pattern = lowered("causal z = stream(value = none) e = compress(16, of = z) c = top_k(2, score = dot(e), "
                      "share = head) return attend(c)")  # fmt: skip
    entries = pattern.input("e")
    assert isinstance(entries, Stream)
    assert entries.value is Values.NONE


def test_without_causal_all_entries_are_visible() -> None:
    assert softmax(lowered("return attend(compress(8, 4))"), "attend").terms[0].test is sympy.true


def test_a_dot_has_its_own_query_scale_and_name() -> None:
    pattern = lowered(SMALL + "asks = query() rank = dot(blocks, query = asks, scale = 1 / 8) "
                      "return attend(top_k(2, score = rank, share = head))")  # fmt: skip
    found = softmax(pattern, "rank")
    assert (found.query, found.scale) == ("asks", sympy.Rational(1, 8))
    assert "rank" not in pattern.outputs(pattern.cases[0])
    assert choice(pattern, "top_k").score == Logits(found)


def test_one_dot_as_logits_and_as_probabilities_is_one_softmax() -> None:
    pattern = lowered(SMALL + "rank = dot(blocks) a = top_k(2, score = rank, share = head) "
                      "b = top_k(3, score = softmax(rank)) return merge(attend(a - b), attend(b))")  # fmt: skip
    assert [found.name for found in pattern.softmaxes()].count("rank") == 1
    assert choice(pattern, "b").score == Mass(softmax(pattern, "rank"))


HEADS = "heads query = 8, kv = 2 "


@pytest.mark.parametrize(
    "before, score, grains, wanted",
    [
        ("", "dot(blocks)", "share = head", (16, 1, "head", None, None, None)),
        ("", "dot(blocks)", "share = max(group)", (16, 1, "group", "max", None, None)),
        ("", "softmax(dot(blocks))", "", (16, 1, "group", "sum", None, None)),
        ("", "softmax(dot(blocks))", "share = mean(group), unit = 32", (32, 1, "group", "mean", None, "sum")),
        ("heads query = 4, kv = 4 ", "dot(blocks)", "share = group", (16, 1, "group", None, None, None)),
        ("heads query = 4, kv = 4 ", "dot(blocks)", "share = sum(group)", (16, 1, "group", None, None, None)),
        (HEADS, "dot(blocks)", "share = head, rows = max(4), unit = mean(48)", (48, 4, "head", None, "max", "mean")),
        (HEADS, "dot(laps)", "share = head, unit = max(16)", (16, 1, "head", None, None, "max")),
        (HEADS, "dot(laps)", "share = head, unit = max(48)", (48, 1, "head", None, None, "max")),
        (HEADS, "dot(kv)", "share = head", (1, 1, "head", None, None, None)),
        (HEADS + "i = query(heads = 2) ", "dot(blocks, query = i)", "", (16, 1, "group", None, None, None)),
        (HEADS + "i = query(heads = 4) ", "dot(blocks, query = i)", "share = sum(group)",
         (16, 1, "group", "sum", None, None)),
        (HEADS + "i = query(heads = 8) ", "dot(blocks, query = i)", "share = head", (16, 1, "head", None, None, None)),
    ],
)  # fmt: skip
def test_grains(before: str, score: str, grains: str, wanted: tuple[object, ...]) -> None:
    text = f"{before} {SMALL} laps = compress(32, 8) c = top_k(2, score = {score}, {grains})".replace(", )", ")")
    found = choice(lowered(f"{text} return attend(c) if prefill"))
    reduced = (found.unit, found.rows, found.share, found.heads_by, found.rows_by, found.unit_by)
    assert reduced == wanted


def test_first_and_last_inside_a_choice_count_its_units() -> None:
    for unit in ("", "unit = max(48), "):  # before and after `force`, and left to the score
        size = 48 if unit else 16
        for order in (f"{unit}force = first(2) | last(1)", f"force = first(2) | last(1), {unit}".rstrip(", ")):
            found = choice(
                lowered(f"{SMALL} c = top_k(4, score = dot(blocks), share = head, {order}) return attend(c)")
            )
            assert found.force == sympy.Or(2 * size > K, own(size)), order


def test_units_that_are_written_or_bound_outside_stay() -> None:
    text = SMALL + ("near = last(3) c = top_k(4, score = dot(blocks), share = head, force = first(2, unit = 4), "
                    "within = ~near) return attend(c | first(5))")  # fmt: skip
    found = choice(lowered(text))
    assert (found.force, found.within) == (8 > K, sympy.Not(own(1, 2)))
    (term,) = softmax(lowered(text), "attend").terms
    chosen = sympy.Ne(membership("c", H, Q, sympy.floor(K / sympy.Integer(16))), 0)
    assert term.test == sympy.And(K <= Q, sympy.Or(chosen, 5 > K)), "outside of the choice a unit is a token"


@pytest.mark.parametrize(
    "bounds, count", [("", 6), (", least = 8", 8), (", most = 4", 4), (", least = 2, most = 7", 6)]
)
def test_least_and_most_bound_k(bounds: str, count: int) -> None:
    found = choice(lowered(f"{SMALL} c = top_k(6, score = dot(blocks), share = head{bounds}) return attend(c)"))
    assert (found.count, found.capacity) == (count, count)


def test_threshold() -> None:
    found = choice(
        lowered(SMALL + "c = threshold(1 / 4, score = dot(blocks), share = head, most = 3) return attend(c)")
    )
    assert (found.rule, found.level, found.count, found.capacity) == (Threshold(sympy.Rational(1, 4)), 0.25, None, 3)


def test_least_of_a_threshold() -> None:
    bare, *bounded = (
        choice(
            lowered(f"{SMALL} c = threshold(1, score = dot(blocks), share = head, most = 3{least}) return attend(c)")
        )
        for least in ("", ", least = 0", ", least = 3")
    )
    assert bounded == [bare, replace(bare, least=3)]
    assert [found.sized for found in (bare, *bounded)] == [False, False, True]


def test_scores_as_results() -> None:
    pattern = lowered("heads query = 8, kv = 2 causal laps = compress(8, 4) i = query(heads = 2) a = attend(laps) "
                      "return a, mass(a), dot(laps, query = i), pool(mass(a), share = group, unit = max(16), "
                      "rows = mean(2)), kl(mass(a), dot(laps))")  # fmt: skip
    probability, logits = Mass(softmax(pattern, "a")), Logits(softmax(pattern, "ranking"))
    other = Logits(softmax(pattern, "ranking_2"))
    assert pattern.cases[0].extras == (
        Pooled(probability, 4, 1, "head"),
        Pooled(logits, 4, 1, "group"),
        Pooled(probability, 16, 2, "group", heads_by="sum", rows_by="mean", unit_by="max"),
        Kl(Pooled(probability, 4, 1, "head"), Pooled(other, 4, 1, "head")),
    )


def test_what_no_result_needs_is_no_input() -> None:
    pattern = lowered(
        SMALL + "e = compress(4, by = mlp) c = top_k(2, score = dot(blocks), share = head) return attend(all)"
    )
    assert [found.name for found in pattern.inputs] == ["q", "kv"]
