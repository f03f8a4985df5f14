"""A `.spat` file is untrusted: within the limits it is checked in 2 s and 500 MB, beyond them it is refused by name."""

from __future__ import annotations

import threading

import pytest

import spdsl
from spdsl import compiler, limits
from spdsl.budget import Budget, TooMuch, at_most, spend
from spdsl.diagnostics import Severity, Source
from spdsl.ir.pattern import Grid
from tests.fuzz.examine import examine
from tests.fuzz.test_fuzz import SLOWER


def pattern(body: str) -> str:
    return f"pattern p {{ causal {body} }}"


def chain(first: str, step: str, n: int) -> str:
    """b0 = first, and n bindings made of the one before."""
    return " ".join([f"b0 = {first}", *(f"b{i} = " + step.format(b=f"b{i - 1}", i=i) for i in range(1, n + 1))])


def chosen(cells: str, unit: str, count: int = 4, more: str = "") -> str:
    return pattern(
        f"cells = {cells} c = attend(cells) y = top_k({count}, score = mass(c), unit = {unit}{more})"
        " return gate(c, attend(y))"
    )


def wheres(n: int, word: str = "merge", form: str = "where(q - k == {i})") -> str:
    return pattern(f"return {word}({', '.join('attend(' + form.format(i=i) + ')' for i in range(n))})")


WHOLE = " return attend(all)"


def many(text: str, n: int, between: str = " ") -> str:
    """The text for 1, 2, ... n in place of `{i}`."""
    return between.join(text.format(i=i) for i in range(1, n + 1))


# (source, what the error says: its code, the number and the limit)
REFUSED = {
    "sums of scores": (
        pattern(chain("relative(dot(kv))", "relative({b}) + {b}", 40) + " c = top_k(2, score = b40, share = head, "
        "unit = max(16)) return attend(c)"), "E312", "64", "64"),
    "dim": (pattern(f"dim qk = 100000000 {WHOLE}"), "E203", "100000000", "4096"),
    "dim v": (pattern(f"dim v = 2147483647 {WHOLE}"), "E203", "2147483647", "4096"),
    "heads": (pattern(f"heads query = 2000000000, kv = 1 {WHOLE}"), "E203", "2000000000", "4096"),
    "stream qk": (pattern("a = stream(qk = 99999999) return attend(a)"), "E203", "99999999", "4096"),
    "query heads": (pattern("a = query(heads = 99999999) return attend(all, query = a)"), "E203", "99999999", "4096"),
    "batch": (pattern(f"expect(length = 4096, batch = 2147483647) {WHOLE}"), "E203", "2147483647", "65536"),
    "squares": (pattern(chain("1/3", "{b} * {b} + 1/7", 23) + " return attend(sliding(b23))"), "E006", "58", "40"),
    "squares alone": (pattern(chain("3/2", "{b} * {b} / 2", 23) + " return attend(sliding(b23))"), "E006", "", "40"),
    "denominators": (pattern(chain("1", "{b} + 1 / (1000000007 + {i})", 60) + WHOLE), "E006", "", "40"),
    "roots": (pattern(chain("sqrt(2)", "sqrt({b} + {i})", 60) + " return attend(sliding(b60))"), "E307", "9", "8"),
    "cells": (chosen("compress(2147483647, 1)", "max(64)"), "E203", "2,147,483,710", "1,024"),
    "strides": (chosen("compress(2147483647, 16)", "max(64)"), "E203", "134,217,731", "1,024"),
    "units": (chosen("compress(2, 1)", "max(16777216)"), "E203", "16,777,217", "1,024"),
    "tokens": (pattern("y = top_k(4, score = dot(kv), unit = max(1048576)) return attend(y)"), "E203", "1,048,576", ""),
    "merge": (wheres(120), "E312", "120", "32"),
    "gate": (wheres(33, "gate"), "E312", "33", "32"),
    "merge of merges": (pattern(chain("attend(sink(4))", "merge({b}, {b})", 40) + " return b40"), "E312", "64", "32"),
    "patterns": ("".join(f"pattern p{i} {{ {WHOLE} }}" for i in range(1000)), "E001", "1,000", "32"),
    "33 patterns": ("".join(f"pattern p{i} {{ {WHOLE} }}" for i in range(33)), "E001", "33", "32"),
    "streams": (
        pattern(many("x{i} = stream()", 400) + f" return attend({many('x{i}', 90, ' | ')})"), "E312", "401", "128",
    ),
    "results": (pattern(many("return attend(sliding({i})) if length < {i}", 60) + WHOLE), "E312", "61", "32"),
    "softmaxes": (
        pattern(many("return gate(attend(sliding({i})), attend(sink({i}))) if length < {i}", 20) + WHOLE),
        "E312", "41", "32",
    ),
    "nested functions": (pattern(f"return attend(where({'abs(' * 30}q{' - k)' * 30} < 9))"), "E307", "9", "8"),
    "reads of reads": (
        pattern(f"doc = tensor(token, int) return attend(where({'doc[' * 40}k{']' * 40} > 0))"), "E307", "10", "8",
    ),
    "powers": (
        pattern(f"return attend(where({' * '.join(['(q + k + h + 1)'] * 20)} < 9))"), "E307", "256", "64",
    ),
    "doubled sets": (
        pattern(chain("sliding(9)", "({b} | sink({i})) & ({b} | strided({i}))", 40) + " return attend(b40)"),
        "E307", "1,024", "",
    ),
}  # fmt: skip
ALLOWED = {
    "gate over a cover": pattern(
        "return gate(attend(last(4) & first(3) - cover(sliding(1020, ahead = 3), rows = 1020, unit = 3)), attend(all))"
    ),
    "merge": wheres(32),
    "gate": wheres(32, "gate", "sliding({i} + 1)"),
    "gate of remainders": wheres(32, "gate", "where((q + {i}) % 46349 == k % 65537)"),
    "32 patterns": "".join(
        f"pattern p{i} {{ causal return attend(sliding({i + 1}) | sink(4)) }}" for i in range(32)
    ),
    "coprime periods": pattern(f"return attend({' | '.join(f'strided({n})' for n in (997, 1009, 10007, 65537))})"),
    "huge steps": pattern("return attend(dilated(2147483647, 2147483647) | fixed(2147483647, 2147483647))"),
    "huge cells": pattern("cells = compress(2147483647, 2147483647) return gate(attend(cells), attend(sliding(4)))"),
    "units of huge cells": pattern("causal return attend(top_k(2, score = dot(compress(499999968)), share = head))"),
    "huge cover": pattern("return attend(cover(sliding(2147483647), rows = 2147483647, unit = 2147483629))"),
    "forced units": chosen("compress(32, 16)", "64", 100_000, ", force = first(33333333) | last(2, ahead = 0)"),
    "entries of a unit": chosen("compress(2, 1)", "max(1008)"),
    "huge draw": pattern("return attend(random(2147483647, unit = 2147483647, rows = 2147483647, seed = 2147483647))"),
    "given": pattern("y = given(unit = 2147483647, rows = 2147483647) return attend(y)"),
    "long": f"# {'x' * 100_000}\r\n{pattern(WHOLE)}\r\n",
    "length": pattern("expect(length = 2147483647, page = 2147483632) return attend(sliding(9) | strided(65521))"),
    "remainders": pattern(chain("1", "({b} + 1/3) * ({b} % 7) / 100000007", 60) + WHOLE),
    "reads of reads": pattern(f"doc = tensor(token, int) return attend(where({'doc[' * 4}k{']' * 4} > 0))"),
    "comparisons": "pattern p { return attend(where("
    + many("(length * {i} - k * ({i} + 1) + q * ({i} + 2) > {i})", 35, " & ") + ")) }",
    "quotients": pattern(f"return attend(where({many('(q // ({i} + 2) == k // ({i} + 3))', 40, ' | ')}))"),
    "tiles of tiles": pattern(f"return attend({many('last({i}, unit = {i} + 2)', 50, ' & ')})"),
    "merge of draws": wheres(32, form="random(3, seed = {i})"),
    "gate of lists": pattern(
        many("g{i} = given(unit = 16 * {i})", 32) + f" return gate({many('attend(g{i} | sliding({i}))', 32, ', ')})"
    ),
    "gate of tensors": pattern(
        many("t{i} = tensor(token, int)", 60)
        + f" return gate({many('attend(where(t{i}[k] == t{i}[q]))', 32, ', ')})"
    ),
    "later keys": many(
        "pattern p{i} {{ doc = tensor(token, int) return attend("
        + " | ".join(f"where(doc[k] == {j} & (q - k) % {j + 2} > 0)" for j in range(12)) + ") }}", 32,
    ),
    "unknown names": pattern(many("name_{i} = {i}", 500) + f" return gate({many('attend(nome_{i})', 480, ', ')})"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_beyond_a_limit_a_source_is_refused(name: str) -> None:
    text, code, number, limit = REFUSED[name]
    finding = examine(text, slower=SLOWER)
    assert finding.wrong == []
    errors = [found for found in spdsl.check(text) if found.severity is Severity.ERROR]
    assert code in {found.code for found in errors}, errors
    said = next(found.message for found in errors if found.code == code)
    assert number in said, said
    assert limit in said, said


@pytest.mark.parametrize("name", ALLOWED)
def test_within_the_limits_a_source_is_quick(name: str) -> None:
    """Or it is refused for something else."""
    assert examine(ALLOWED[name], compiles=True, slower=SLOWER).wrong == []


@pytest.mark.parametrize("query, stream", [("query(heads = 1)", "kv"), ("q", "stream(heads = 16)")])
def test_heads_that_do_not_divide_are_an_error(query: str, stream: str) -> None:
    """The cost model divided by their group, 0."""
    text = f"heads query = 8, kv = 8 expect(length = 64) return attend({stream}[sliding(4)], query = {query})"
    (found,) = spdsl.check(f"pattern p {{ {text} }}")
    assert found.code == "E306"
    assert "do not divide the" in found.message


def steps(text: str) -> int:
    """What checking a source takes."""
    budget = Budget(limits.CHECK_STEPS)
    compiler.check(Source(text), {}, budget=budget)
    return budget.steps - budget.left


def test_a_file_ends_where_its_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pattern("return attend(sliding(64))")
    text = first + " pattern r { causal return attend(sink(4)) }"
    most = steps(first) + 50
    monkeypatch.setattr(compiler, "CHECK_STEPS", most)
    (found,) = spdsl.check(text)
    assert found.code == "E312"
    assert found.message == f"pattern `r` takes more work than the {most:,} steps that a file may take"
    assert found.span is not None
    assert text[found.span.start : found.span.end] in ("attend(sink(4))", "return attend(sink(4))", "r")
    monkeypatch.setattr(compiler, "CHECK_STEPS", 100)
    with pytest.raises(spdsl.SpatError, match="E312"):
        spdsl.compile(pattern("return attend(sliding(64))"))


@pytest.mark.parametrize("body", ["param n = n return attend(sliding(n))", "s = sink(4) | s return attend(s)"])
def test_a_name_in_its_own_value_is_an_error(body: str) -> None:
    """It was nothing at all: `check` was silent, and `compile` ended in an exception of a template."""
    (found,) = spdsl.check(f"pattern p {{ {body} }}")
    assert (found.code, found.message.split("` ")[1]) == ("E101", "is used in its own value")


def test_the_steps_of_a_source_are_the_same_again() -> None:
    """Caches make the second time quicker, not cheaper: a file is refused always or never."""
    text = pattern("return attend((sliding(77) | sink(5)) & strided(3))")
    assert steps(text) == steps(text) > 100


def test_budgets_are_apart() -> None:
    with at_most(10) as outer:
        spend(5)
        with pytest.raises(TooMuch), at_most(3):
            spend(4)
        assert outer.left == 5
        threading.Thread(target=lambda: spend(100)).start()  # a thread has none of its own: its work is free
        assert outer.left == 5
    spend(10**9)


@pytest.mark.parametrize("grid", [Grid(32, 16), Grid(8, 4, 4), Grid(5, 5), Grid(7, 3, 2), Grid(16, 1), Grid(9, 2, 8)])
def test_entries_of_a_unit_are_computed(grid: Grid) -> None:
    for unit in range(1, 70):
        starts = {i: i * grid.stride - grid.before for i in range(-100, 200)}
        met = [i for i, start in starts.items() if any(0 <= token < unit for token in range(start, start + grid.width))]
        assert list(grid.overlapping(unit)) == met


def test_modules_made_at_once_are_those_made_one_by_one() -> None:
    """Threads share the parsed templates."""
    texts = [f"pattern p {{ causal return attend(sliding({n})) }}" for n in (5, 6, 7)]
    alone = [spdsl.compile(text).text for text in texts]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i, text=text: found.update({i: spdsl.compile(text).text}))
        for i, text in enumerate(texts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == alone
