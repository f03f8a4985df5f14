"""skips: where a softmax may leave tiles out while it runs, and in which phases."""

from __future__ import annotations

from spdsl.diagnostics import Report
from spdsl.ir.pattern import Case, Pattern, Phase, Softmax, Stream, Tensor
from spdsl.ir.skip import Skip
from spdsl.ir.symbols import H, lookup_name, lookups


def check_skips(pattern: Pattern, report: Report) -> None:
    """Adds what is wrong with the skips of `pattern` to `report`."""
    for softmax in pattern.softmaxes():
        if softmax.skip is not None:
            _one_stream(pattern, softmax, report)
            _whole_lists(pattern, softmax, report)
    for case in pattern.cases:
        for step in pattern.steps(case):
            if isinstance(step, Softmax) and step.skip is not None:
                _rows_of_phases(case, step, step.skip, report)
                _no_learned_bias(pattern, case, step, report)


def _one_stream(pattern: Pattern, softmax: Softmax, report: Report) -> None:
    streams = [pattern.input(term.stream) for term in softmax.terms]
    if len(streams) == 1 and isinstance(streams[0], Stream) and streams[0].grid.is_tokens:
        return
    what = "several streams" if len(streams) > 1 else "cells of tokens"
    report.error(
        "E105", f"a softmax over {what} that skips tiles is not built yet", softmax.span, "tiles hold tokens",
        hint="attend to the tokens of one stream, and put branches together with `merge`",
    )  # fmt: skip


def _whole_lists(pattern: Pattern, softmax: Softmax, report: Report) -> None:
    """What is walked by units has no tiles of keys: their order and ends are those of a list."""
    chosen = next((choice for choice in pattern.choices_of(softmax) if choice.listed), None)
    if chosen is not None:
        report.error(
            "E105", f"skipping tiles of `{chosen.name}` is not built yet", softmax.span,
            "it is a list of units for each query",
            hint="skip where sets of positions, tensors, or given maps of tiles (`rows` > 1) say what is seen",
        )  # fmt: skip


def _rows_of_phases(case: Case, softmax: Softmax, skip: Skip, report: Report) -> None:
    """A step has one query; the others vote in tiles."""
    many = [phase for phase in (Phase.TRAIN, Phase.PREFILL) if phase in case.phases]
    names = " and ".join(f"`{phase.value}`" for phase in many)
    if Phase.DECODE in case.phases and skip.rows > 1:
        report.error(
            "E203", f"rows = {skip.rows} in a result for `decode`, which has one query", softmax.span,
            "votes in tiles of queries",
            hint="give decode a result of its own: `return attend(.., skip = below(..)) if decode`",
        )  # fmt: skip
    elif many and skip.rows == 1:
        report.error(
            "E203", f"rows = 1 in a result for {names}", softmax.span, "needs a tile of queries",
            hint="say how many queries vote together: `rows = 128`; or return this one `if decode`",
        )  # fmt: skip
    elif many and skip.share == "group" and any(H in term.test.free_symbols for term in softmax.terms):
        report.error(
            "E105", f"`share = group` over a set that differs by head, in a result for {names}, is not built yet",
            softmax.span, "heads that vote together visit the same keys", hint="let each head vote: `share = head`",
        )  # fmt: skip


def _no_learned_bias(pattern: Pattern, case: Case, softmax: Softmax, report: Report) -> None:
    """The kernels of a bias that learns know no kept tiles."""
    read = [] if softmax.bias is None else [pattern.input(lookup_name(found)) for found in lookups(softmax.bias)]
    learned = next((one for one in read if isinstance(one, Tensor) and one.dtype == "float"), None)
    if Phase.TRAIN in case.phases and learned is not None:
        report.error(
            "E105", f"a bias that reads `{learned.name}` beside `skip`, in a result for `train`, is not built yet",
            softmax.span, "would have a gradient",
            hint="skip in other phases: `return ... if prefill`; or read no tensor of floats",
        )  # fmt: skip
