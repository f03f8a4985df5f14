"""Messages for what users write first: they name the user's words and a way out that works."""

from __future__ import annotations

import pytest

import spdsl
from spdsl.checks.view import NOTHING_MORE
from spdsl.compiler import check
from spdsl.diagnostics import Diagnostic, Source, did_you_mean
from spdsl.fixing import fix
from spdsl.primitives.planned import PLANNED
from spdsl.primitives.registry import WORDS


def found(body: str, **params: float) -> list[Diagnostic]:
    return spdsl.check(f"pattern p {{ causal {body} }}", **params)


def hints(body: str) -> str:
    return " ".join(hint.text for one in found(body) for hint in one.hints)


STEMS = {
    "slide": "sliding", "slid": "sliding", "slider": "sliding", "sliding_window": "sliding", "SLIDING": "sliding",
    "stride": "strided", "dilation": "dilated", "compression": "compress", "comp": "compress", "topk": "top_k",
    "att": "attend", "attention": "attend", "Attend": "attend", "random_blocks": "random", "sink_tokens": "sink",
    "gated": "gate", "thresh": "threshold", "slidng": "sliding", "atend": "attend",
}  # fmt: skip


@pytest.mark.parametrize("word, meant", STEMS.items())
def test_the_word_that_is_meant(word: str, meant: str) -> None:
    hint = did_you_mean(word, {*WORDS, *PLANNED})
    assert hint is not None
    assert hint.replacement == meant


def test_no_word_is_meant() -> None:
    assert did_you_mean("foo", WORDS) is None
    assert did_you_mean("x", WORDS) is None
    assert did_you_mean("", WORDS) is None


@pytest.mark.parametrize("operator", ["+", "*", "/", "|", "&", "-"])
@pytest.mark.parametrize("form", ["return {}", "both = {} return both", "return gate({}, attend(sink(1)))"])
def test_branches_have_no_operators(operator: str, form: str) -> None:
    body = form.format(f"attend(all) {operator} attend(sliding(3))")
    assert [one.code for one in found(body)] == ["E201"]
    assert "`gate(a, b)`" in hints(body)
    assert "`merge(a, b)`" in hints(body)


@pytest.mark.parametrize(
    "body", ["a = attend(all) return a + a", "return 0.5 * attend(all)", "a = attend(all) b = 2 * a return b"]
)
def test_nor_have_weighted_ones(body: str) -> None:
    assert [one.code for one in found(body)] == ["E201"]
    assert "`gate(a, b)`" in hints(body)


@pytest.mark.parametrize(
    "body",
    [
        "return attend(sliding(3) + sink(2))",
        "near = sliding(3) + sink(2) return attend(near)",
        "near = sink(1) return attend(2 * near)",
    ],
)
def test_sets_have_other_operators(body: str) -> None:
    assert [one.code for one in found(body)] == ["E201"]
    assert "`|` (in either)" in hints(body)


def test_a_branch_is_no_set() -> None:
    assert "inside of one `attend`" in hints("return attend(attend(sink(1)) | sliding(3))")


@pytest.mark.parametrize(
    "body, declared",
    [
        ("return attend(where(doc[q] == doc[k]))", "doc = tensor(token, int)"),
        ("return attend(where(doc[k] > 0))", "doc = tensor(token, int)"),
        ("return attend(where(doc[k - 1] > 0))", "doc = tensor(token, int)"),
        ("return attend(all, bias = -slope[h] * (q - k))", "slope = tensor(head)"),
        ("return attend(where(level[h][k] > 0))", "level = tensor(head, token, int)"),
        ("return attend(where(flag[0] > 0))", "flag = tensor(1)"),
        ("return attend(far[all])", "far = stream()"),
        ("return attend(all, query = other)", "other = query()"),
        ("return attend(all, sink_logit = rest)", "rest = tensor(head)"),
    ],
)
def test_what_is_not_declared(body: str, declared: str) -> None:
    """The hint is a declaration with which the body compiles."""
    assert {one.code for one in found(body)} == {"E101"}
    assert f"`{declared}`" in hints(body)
    assert found(f"{declared} {body}") == []


def test_a_declared_tensor_of_nearly_that_name_is_meant() -> None:
    assert hints("docs = tensor(token, int) return attend(where(doc[k] == 1 & docs[k] == 1))") == "did you mean `docs`?"


@pytest.mark.parametrize(
    "body, params, code, message",
    [
        ("param window = 0 return attend(sliding(window))", {}, "E203", "`window` is 0, it must be at least 1"),
        (
            "param window = 4 return attend(sliding(window))",
            {"window": 0},
            "E502",
            "`window` is 0, it must be at least 1",
        ),
        (
            "param window = 4 return attend(sliding(n = window - 4))",
            {},
            "E203",
            "`window - 4` is 0, it must be at least 1",
        ),
        (
            "param window = 4 return attend(sliding(window  /\n 8))",
            {},
            "E203",
            "`window / 8` is 0, it must be at least 1",
        ),
        (
            "param window = 4 heads query = window - 9, kv = 1 return attend(all)",
            {},
            "E203",
            "`window - 9` is -5, it must be at least 1",
        ),
        (
            "param ahead = 4 return attend(sliding(8, ahead = 2 - ahead))",
            {},
            "E203",
            "`2 - ahead` is -2, it must be at least 0",
        ),
        (
            "param wide = 2147483647 return attend(sliding(wide, ahead = 2 * wide - wide + 1))",
            {},
            "E006",
            "the value exceeds 2147483647",
        ),
        ("param step = 0 return attend(where((q - k) % step == 0))", {}, "E203", "the divisor `step` is 0"),
        ("param step = 4 return attend(where((q - k) % (step - 4) == 0))", {}, "E203", "the divisor `(step - 4)` is 0"),
        ("return attend(where((q - k) % length == 0))", {}, "E203", "the divisor `length` may be 0 or less"),
        ("return attend(sliding(0))", {}, "E203", "`n` is 0, it must be at least 1"),
    ],
)
def test_values_are_told_by_the_users_name(body: str, params: dict[str, float], code: str, message: str) -> None:
    (one,) = found(body, **params)
    assert (one.code, one.message) == (code, message)


def test_the_values_behind_an_expression() -> None:
    (one,) = found("param window = 4, sinks = 4 return attend(sliding(window - sinks))")
    assert one.notes == ("`window` is 4, `sinks` is 4",)
    (one,) = found("param block = 4 return attend(fixed(block, 3))", block=2)
    assert (one.code, one.notes) == ("E502", ("`block` is 2",))
    (one,) = found("param window = 0 return attend(sliding(window))")
    assert one.notes == ()


def test_not_binds_tightly() -> None:
    assert "`~(...)`" in hints("return attend(where(~k % 2 == 0))")


SIMPLEST = "pattern p {{ causal blocks = compress(64) return attend(top_k(8, score = dot(blocks){})) }}"


@pytest.mark.parametrize(
    "written", ["", ", share = group", ", force = last(1)", ",\n    share = group,\n    force = last(1)"]
)
def test_the_simplest_choice_is_mended(written: str) -> None:
    text = SIMPLEST.format(written)
    (one,) = spdsl.check(text)
    assert one.code == "E206"
    assert one.hints[0].text.startswith("write `share = sum(group)`, or `max(...)`")
    fixed = fix(Source(text), lambda source: check(source, {}, NOTHING_MORE))
    assert fixed.left == ()
    assert "share = sum(group)" in fixed.source.text
    spdsl.compile(fixed.source.text)


def test_how_entries_are_reduced_is_left_to_the_user() -> None:
    text = "pattern p { causal return attend(top_k(8, score = dot(compress(32, 16)), share = head, unit = 64)) }"
    (one,) = spdsl.check(text)
    assert (one.hints[0].replacement, one.hints[0].applicability.value) == ("max(64)", "maybe-incorrect")
    assert fix(Source(text), lambda source: check(source, {}, NOTHING_MORE)).source.text == text


@pytest.mark.parametrize(
    "text, codes",
    [
        ("pattern p { causal h = sliding(4) return attend(h | slide(3)) }", ["E104", "E102"]),
        ("pattern p { causal v = sliding(0) return attend(v) }", ["E104", "E203"]),
        ("pattern p { causal gates = tensor(head) return attend(all, bias = gates[k]) }", ["E104", "E204"]),
        ("pattern p { causal class = stream() return attend(class[sliding(windw)]) }", ["E104", "E101"]),
        ("pattern p { causal a = sink(1) a = sink(0) return attend(a) }", ["E103", "E203"]),
        ("pattern p { causal tokens = sliding(4) unused = 3 return attend(tokens) }", ["E104"]),
        ("pattern os { causal return attend(slide(3)) }", ["E104", "E102"]),
        (
            "pattern p { causal return attend(slide(1)) } pattern p { causal return attend(slide(2)) }",
            ["E102", "E106", "E102"],
        ),
    ],
)
def test_a_refused_name_hides_no_later_error(text: str, codes: list[str]) -> None:
    assert [one.code for one in spdsl.check(text)] == codes


@pytest.mark.parametrize(
    "body, written, meant",
    [
        ("blocks = compress(64) return attend(top-k(8, score = dot(blocks), share = head))", "top-k", "top_k"),
        ("my_set = sink(4) return attend(my-set)", "my-set", "my_set"),
        ("my_window_size = 4 return attend(sliding(my-window-size))", "my-window-size", "my_window_size"),
    ],
)
def test_a_dash_in_a_name_that_is_used(body: str, written: str, meant: str) -> None:
    text = f"pattern p {{ causal {body} }}"
    hint = spdsl.check(text)[0].hints[0]
    assert hint.text == f"did you mean `{meant}`?"
    assert hint.span is not None
    assert text[hint.span.start : hint.span.end] == written
    assert not [one for one in found(body.replace(written, meant)) if one.severity.value == "error"]


def test_a_difference_of_names_is_one() -> None:
    assert (
        found("param window = 8, sinks = 4, window_sinks = 3 return attend(sliding(window-sinks) | sink(window_sinks))")
        == []
    )


@pytest.mark.parametrize(
    "body, hint",
    [
        ("return all", "attend to the set: `attend(...)`"),
        ("x = True return attend(all)", "there are no such values; `all` is every key, and conditions are written out"),
        ("return attend(train)", "it has no value here"),
    ],
)
def test_no_hint_leads_into_the_next_error(body: str, hint: str) -> None:
    assert hints(body) == hint


@pytest.mark.parametrize("cap, name", [("-1", "`softcap`"), ("0 - 1 / 2", "`softcap`"), ("c", "`c`")])
def test_a_number_below_its_least_value(cap: str, name: str) -> None:
    (error,) = found(f"param c = -3 return attend(all, softcap = {cap}, scale = c)")
    assert error.code == "E203"
    assert error.message.startswith(f"{name} is -")
    assert found("param c = -3 return attend(all, softcap = c + 3, scale = c)") == []


@pytest.mark.parametrize("base", ["slid()", "(4)", "(kv | kv)"])
def test_only_what_has_a_name_is_read_by_an_index(base: str) -> None:
    """It was no value, and no error: the results that were made of it were gone without a word."""
    found = spdsl.check(f"pattern p {{ x = {base}[4] y = attend(x) return y }}")
    assert "E201" in [one.code for one in found]
