"""check: what a well-formed pattern may still get wrong, proved from its element tests."""

from __future__ import annotations

from itertools import combinations

import sympy

from spdsl.budget import working_on
from spdsl.diagnostics import Report
from spdsl.ir.branch import softmaxes_in
from spdsl.ir.compared import rooted
from spdsl.ir.pattern import Branch, Case, Gate, Kept, Kl, Merge, Pattern, Phase, Pooled, Query, Softmax, Stream, Term
from spdsl.ir.symbols import K, Q
from spdsl.limits import SET_CASES
from spdsl.passes.choices import check_choices
from spdsl.passes.disjuncts import TooComplex, disjuncts
from spdsl.passes.joint import tensors_read
from spdsl.passes.later_keys import later_key
from spdsl.passes.overlap import Overlaps
from spdsl.passes.skips import check_skips
from spdsl.passes.source_numbers import new_item
from spdsl.primitives.pools import POOLS
from spdsl.syntax.tree import PatternTree

MOST_RESULTS = 8  # that are searched for later keys


def check(pattern: Pattern, report: Report, tree: PatternTree | None = None) -> None:
    """Adds what is wrong or doubtful about the meaning of `pattern` to `report`; `tree` is where it is written."""
    overlaps = Overlaps()
    for softmax in pattern.softmaxes():
        working_on(softmax.span)
        for term in softmax.terms:
            _simple_enough(term, report)
    if report.failed:
        return
    check_choices(pattern, report)
    check_skips(pattern, report)
    for case in pattern.cases:
        _known_ends(pattern, case, report)
    for softmax in pattern.softmaxes():
        working_on(softmax.span)
        _disjoint_streams(pattern, softmax, overlaps, report)
        _sink_alone(softmax, report)
        _whole_groups(pattern, softmax, report)
    _one_set_of_gates(pattern, report)
    _later_keys(pattern, report, tree)
    for case in pattern.cases:
        for branch in (case.branch, *case.extras):
            if isinstance(branch, Pooled | Kl | Kept):
                continue
            working_on(branch.span)
            _disjoint_merges(branch, overlaps, report)
            if pattern.causal:
                _first_query(pattern, branch, report)


def _simple_enough(term: Term, report: Report) -> None:
    try:
        conjuncts = disjuncts(term.test)
    except TooComplex:
        report.error(
            "E307",
            f"the set has more than {SET_CASES} cases",
            term.span,
            "too complex",
            hint="split it over several branches with `merge`",
        )
        return
    if not conjuncts:
        report.error("E305", "no query can ever see a key of this set", term.span, "always empty")


def _known_ends(pattern: Pattern, case: Case, report: Report) -> None:
    """A cache grows: where its sequences end is not known, so no cell closes there."""
    outputs = pattern.outputs(case)
    softmaxes = [step for step in pattern.steps(case) if isinstance(step, Softmax)]
    for stream, softmax in ((pattern.input(term.stream), one) for one in softmaxes for term in one.terms):
        # In a prefill the last key of the call closes it for scores, and the next call makes it anew.
        asked = (Phase.PREFILL, Phase.DECODE) if softmax.name in outputs else (Phase.DECODE,)
        phases = " and ".join(f"`{phase.value}`" for phase in asked if phase in case.phases)
        if phases and isinstance(stream, Stream) and stream.grid.partial:
            report.error(
                "E311",
                f"the last cell of `{stream.name}` closes when the sequence ends, and a result for {phases} sees it",
                softmax.span,
                "a cache does not know the end",
                hint="return it `if train`, and for the other phases one with `partial = drop`",
            )
            return
        if isinstance(stream, Stream) and stream.grid.partial and Phase.PREFILL in case.phases and _learned(stream):
            report.error(
                "E105",
                f"a result for `prefill` scores the short cell of `{stream.name}`, "
                "which is not built yet for learned pools",
                softmax.span,
                "specified, but not built",
                hint="use `by = mean`, `max` or `min`, or `partial = drop`",
            )
            return


def _learned(entries: Stream) -> bool:
    """Whether numbers of the caller go into its pool."""
    assert entries.compress is not None
    pool = POOLS[entries.compress.by]
    return bool(pool.weights) or pool.weighs


def _disjoint_streams(pattern: Pattern, softmax: Softmax, overlaps: Overlaps, report: Report) -> None:
    """Entries of two token-grid streams at one position would count the token twice (docs/language.md)."""
    on_tokens = [term for term in softmax.terms if _on_tokens(pattern, term)]
    for left, right in combinations(on_tokens, 2):
        if overlaps.of(left.test, right.test)[0]:
            report.error(
                "E303",
                f"`{left.stream}` and `{right.stream}` may both bring an entry of the same token into one softmax",
                softmax.span,
                "not provably disjoint",
                hint="subtract one set from the other, or use `merge` or `gate`",
            )


def _on_tokens(pattern: Pattern, term: Term) -> bool:
    stream = pattern.input(term.stream)
    return isinstance(stream, Stream) and stream.grid.is_tokens


def _sink_alone(softmax: Softmax, report: Report) -> None:
    """A sink has a gradient; what tests and biases read has none."""
    if softmax.sink in tensors_read(softmax):
        report.error(
            "E205",
            f"`{softmax.sink}` is the logit of the sink and is read in an expression, too",
            softmax.span,
            "has a gradient here, and none there",
            hint="declare two tensors, and pass the same one twice",
        )


def _whole_groups(pattern: Pattern, softmax: Softmax, report: Report) -> None:
    """Each head of a stream is read by as many query heads, where both are declared."""
    query = pattern.input(softmax.query)
    asking = query.heads if isinstance(query, Query) and query.heads else pattern.query_heads
    for term in softmax.terms:
        stream = pattern.input(term.stream)
        assert isinstance(stream, Stream)
        own = stream.heads or pattern.kv_heads  # entries have those of their source
        if asking and own and asking % own:
            message = f"{own} heads of `{stream.name}` do not divide the {asking} heads of `{softmax.query}`"
            report.error("E306", message, softmax.span, "no whole group for each head")


def _one_set_of_gates(pattern: Pattern, report: Report) -> None:
    gates = [branch for case in pattern.cases for branch in (case.branch, *case.extras) if isinstance(branch, Gate)]
    for gate in gates[1:]:
        if len(gate.branches) != len(gates[0].branches):
            report.error(
                "E202",
                f"gates of {len(gates[0].branches)} and of {len(gate.branches)} branches in one pattern",
                gate.span,
                "there is one argument `gates` for all of them",
                hint="gate as many branches in each result, or write two patterns",
            )


def _later_keys(pattern: Pattern, report: Report, tree: PatternTree | None) -> None:
    """A cache grows from left to right: who learns from later keys finds none of them there."""
    phases = {phase for case in pattern.cases for phase in case.phases}
    cached = " and ".join(f"`{phase.value}`" for phase in (Phase.PREFILL, Phase.DECODE) if phase in phases)
    if pattern.causal or not cached:
        return
    for case in pattern.cases[:MOST_RESULTS]:
        seen = later_key(pattern, case) if case.phases != {Phase.DECODE} else None  # its one query is the last
        if seen is not None:
            entry = "key" if seen.stream.grid.is_tokens else "entry"
            report.warning(
                "W404",
                f"queries see later keys in a pattern with {cached}: "
                "write `causal`, or say that it is meant: `return ... if train` or `allow(W404)`",
                seen.softmax.span, f"query {seen.place.q} sees {entry} {seen.place.k} of `{seen.stream.name}`",
                note="a model that generates would learn from tokens that it is about to predict",
                hint=new_item(tree, report.source.text, "causal", "write `causal`"),
            )  # fmt: skip
            return


def _disjoint_merges(branch: Branch, overlaps: Overlaps, report: Report) -> None:
    if isinstance(branch, Softmax):
        return
    for inner in branch.branches:
        _disjoint_merges(inner, overlaps, report)
    if not isinstance(branch, Merge):
        return
    terms = [_terms(inner) for inner in branch.branches]
    for left, right in combinations(terms, 2):
        for a in left:
            for b in right:
                _disjoint_terms(branch, a, b, overlaps, report)


def _terms(branch: Branch) -> list[Term]:
    if isinstance(branch, Softmax):
        return list(branch.terms)
    return [term for inner in branch.branches for term in _terms(inner)]


def _disjoint_terms(merge: Merge, a: Term, b: Term, overlaps: Overlaps, report: Report) -> None:
    if a.stream != b.stream:
        return
    may, certain = overlaps.of(a.test, b.test)
    message = (
        f"branches of this merge {'share' if certain else 'may share'} keys of `{a.stream}`, which then count twice"
    )
    hint = "subtract one set from the other: `attend(a), attend(b - a)`"
    if certain:
        report.error("E304", message, merge.span, "overlapping sets", hint=hint)
    elif may:
        report.warning("W403", message, merge.span, "not provably disjoint", hint=hint)


def _first_query(pattern: Pattern, branch: Branch, report: Report) -> None:
    """With `causal`, query 0 may see key 0 alone: a set without that pair leaves the first queries empty."""
    if isinstance(branch, Gate):
        for inner in branch.branches:
            _first_query(pattern, inner, report)
        return
    softmaxes = list(softmaxes_in(branch))
    terms = [term for softmax in softmaxes for term in softmax.terms]
    if any(rooted(term.test) for term in terms):  # of a number below 0 it is none to compare
        return
    if not all(_on_tokens(pattern, term) for term in terms):  # no cell is closed yet: that is what cells are
        return
    first = [term.test.xreplace({Q: sympy.S.Zero, K: sympy.S.Zero}) for term in terms]
    if any(softmax.sink for softmax in softmaxes) or sympy.Or(*first) is not sympy.false:
        return
    report.warning(
        "W402", "the first queries see no key", branch.span, "their output is 0",
        hint="add the query's own token: `... | sliding(1)`",
    )  # fmt: skip
