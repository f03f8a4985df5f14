"""joint: which merges are one operator: its parts run one after another, and share the merged log-sum-exp backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from spdsl.ir.pattern import Branch, Extra, Gate, Merge, Pattern, Phase, Softmax
from spdsl.ir.plan import Joint, Role, SoftmaxPlan
from spdsl.ir.symbols import lookup_name, lookups


def joints(pattern: Pattern, softmaxes: tuple[SoftmaxPlan, ...]) -> tuple[Joint, ...]:
    """The merges of training results of which no part is read by itself, nor goes by residue class."""
    plans = {softmax.name: softmax for softmax in softmaxes}
    results = [result for case in pattern.cases_of(Phase.TRAIN) for result in (case.branch, *case.extras)]
    merges = dict.fromkeys(leaves(merge) for result in results for merge in _merges(result))
    read = Counter(
        name for names in dict.fromkeys(names for result in results for names in _read(result)) for name in names
    )
    alone = pattern.probabilities()

    def fits(name: str) -> bool:
        whole = plans[name].of_class is None and plans[name].softmax.skip is None
        return read[name] == 1 and name not in alone and whole

    return tuple(
        Joint(_free(f"{names[0]}_joint", {*plans, *(an_input.name for an_input in pattern.inputs)}), names)
        for names in merges
        if len(set(names)) == len(names) > 1
        and all(fits(name) and plans[name].role is Role.BRANCH for name in names)
        and _sinks_alone([plans[name].softmax for name in names])
    )


def _free(name: str, taken: set[str]) -> str:
    """A name that no softmax or choice has: steps go by it."""
    return _free(f"{name}_1", taken) if name in taken else name


def _sinks_alone(softmaxes: list[Softmax]) -> bool:
    """An operator has one argument for each tensor: with a gradient, as a sink, or without, as what is read."""
    return not {softmax.sink for softmax in softmaxes} & {
        name for softmax in softmaxes for name in tensors_read(softmax)
    }


def tensors_read(softmax: Softmax) -> set[str]:
    """What its tests, its bias and its skip read."""
    reads = [read for term in softmax.terms for read in lookups(term.test)]
    for number in (softmax.bias, softmax.skip and softmax.skip.level):
        reads += [] if number is None else lookups(number)
    return {lookup_name(read) for read in reads}


def leaves(branch: Branch) -> tuple[str, ...]:
    """The softmaxes of a branch; a merge of merges is one merge."""
    if isinstance(branch, Softmax):
        return (branch.name,)
    return tuple(name for inner in branch.branches for name in leaves(inner))


def _merges(result: Extra) -> Iterator[Merge]:
    """The outermost ones."""
    if isinstance(result, Merge):
        yield result
    elif isinstance(result, Gate):
        for inner in result.branches:
            yield from _merges(inner)


def _read(result: Extra) -> Iterator[tuple[str, ...]]:
    """What a result is made of: softmaxes by themselves, or all parts of a merge together."""
    if isinstance(result, Gate):
        for inner in result.branches:
            yield from _read(inner)
    elif isinstance(result, Softmax | Merge):
        yield leaves(result)
