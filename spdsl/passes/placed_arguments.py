"""placed_arguments: which parameter of a word each argument of a call is for."""

from __future__ import annotations

from spdsl.diagnostics import did_you_mean
from spdsl.passes.names import Names
from spdsl.primitives.word import Parameter, Word
from spdsl.syntax import tree


def placed_arguments(names: Names, word: Word, expr: tree.Call) -> tuple[list[tuple[Parameter, tree.Expr]], bool]:
    """Which parameter each argument is for, and whether one is for none."""
    parameters = {parameter.name: parameter for parameter in word.parameters}
    places = list(word.parameters)
    placed: list[tuple[Parameter, tree.Expr]] = []
    failed = False
    for argument in expr.arguments:
        parameter = parameters.get(argument.name.text) if argument.name else (places[0] if places else None)
        if parameter is None or (parameter not in places and not parameter.many):
            _wrong_argument(names, word, argument, list(parameters))
            failed = True
            continue
        placed.append((parameter, argument.value))
        if not parameter.many:
            places.remove(parameter)
    return placed, failed


def _wrong_argument(names: Names, word: Word, argument: tree.Argument, known: list[str]) -> None:
    if argument.name is None:
        names.report.error(
            "E202",
            f"`{word.name}` takes fewer arguments",
            argument.value.span,
            "one too many",
            note=f"its parameters: {', '.join(known) or 'none'}",
        )
        return
    text = argument.name.text
    if text in word.planned:
        names.report.error(
            "E105", f"`{text}` of `{word.name}` is not built yet", argument.name.span, "specified, but not built"
        )
        return
    message = f"`{text}` is given twice" if text in known else f"`{word.name}` has no parameter `{text}`"
    names.report.error(
        "E202",
        message,
        argument.name.span,
        "unknown here",
        note=f"its parameters: {', '.join(known) or 'none'}",
        hint="" if text in known else did_you_mean(text, known, argument.name.span) or "",
    )
