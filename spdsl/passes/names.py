"""What a name means while a pattern is lowered: parameters, bindings, predeclared words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from spdsl.diagnostics import Applicability, Hint, Report, Span, did_you_mean
from spdsl.ir.pattern import Input
from spdsl.ir.symbols import LENGTH, Expr
from spdsl.primitives.registry import WORDS
from spdsl.primitives.word import Value, main_query, main_stream
from spdsl.syntax import tree
from spdsl.syntax.names import refusal

_BEFORE, _BEHIND = re.compile(r"([A-Za-z0-9_]+-)+\Z"), re.compile(r"(-[A-Za-z0-9_]+)+")
PREDECLARED = ("q", "kv", "all", "length", "prompt", "train", "prefill", "decode")


@dataclass(slots=True)
class Names:
    """The names of one pattern. A name is bound once, before use; nothing shadows."""

    report: Report
    pattern: tree.PatternTree | None = None
    params: dict[str, Fraction] = field(default_factory=dict)
    overridden: set[str] = field(default_factory=set)
    bound: dict[str, Value | Expr] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    open: str = ""  # the name whose value is read
    used: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    inputs: list[Input] = field(default_factory=list)
    numbered: dict[str, int] = field(default_factory=dict)
    query_heads: int | None = None
    kv_heads: int | None = None
    qk_dim: int | None = None
    v_dim: int | None = None
    causal: bool = False
    unit: int = 1  # of the choice whose arguments are read
    of_tokens: bool = False  # whether `length` is at least 1 where the number is read
    stated: dict[str, Any] = field(default_factory=dict)  # by fields of the Pattern

    def claim(self, name: tree.Name) -> bool:
        """Notes that `name` is bound here; false if it still means something else, which stays.

        A name that cannot be bound is an error, and is bound all the same, so that later errors are found.
        """
        text = name.text
        if refusal(text, "binding"):  # told when it was parsed
            self.refused.add(text)
        elif text in PREDECLARED and text != "kv":
            self.report.error(
                "E104", f"`{text}` cannot be bound", name.span, "has a meaning of its own", hint="choose another name"
            )
            self.refused.add(text)
        elif text in self.spans:
            line, _ = self.report.source.position(self.spans[text].start)
            self.report.error(
                "E103",
                f"`{text}` is bound twice",
                name.span,
                "bound again here",
                note=f"first bound in line {line}",
                hint="each name is bound once; choose another name",
            )
            self.refused.add(text)
        free = text not in self.spans and (text not in PREDECLARED or text == "kv")
        self.spans.setdefault(text, name.span)
        self.open = text
        return free

    def find(
        self, name: tree.Name, wanted: type | None = None, declared: str = "..."
    ) -> Value | Expr | Fraction | None:
        """What `name` is bound to, or nothing (and an error).

        Where only `wanted` makes sense, the error names the like of it, or how one is `declared`.
        """
        self.used.add(name.text)
        if name.text in self.params:
            return self.params[name.text]
        if name.text in self.bound:
            return self.bound[name.text]
        if name.text == "kv":
            return main_stream(self.inputs)
        if name.text == "q":
            return main_query(self.inputs)
        if name.text == "length":
            return LENGTH
        if name.text == self.open:
            message = f"`{name.text}` is used in its own value"
            self.report.error("E101", message, name.span, "not bound yet", hint="bind it before its use")
            return None
        if name.text in self.spans:  # bound, but to something that had an error of its own
            return None
        if name.text in ("prompt", "tokens"):
            self.report.error("E105", f"`{name.text}` is not built yet", name.span, "specified, but not built")
            return None
        known = {*self.params, *self.bound, *PREDECLARED}
        if wanted is not None:
            known = {text for text, value in self.bound.items() if isinstance(value, wanted)}
        hint = self.meant(name, known - {name.text}) or _unbound(name.text, declared)
        self.report.error("E101", f"unknown name `{name.text}`", name.span, "not bound here", hint=hint)
        return None

    def meant(self, name: tree.Name, known: set[str]) -> Hint | None:
        """The known name that is meant by an unknown one; `top-k` is a difference of two."""
        text = self.report.source.text
        before, behind = _BEFORE.search(text, 0, name.span.start), _BEHIND.match(text, name.span.end)
        span = Span(before.start() if before else name.span.start, behind.end() if behind else name.span.end)
        dashed = text[span.start : span.end].replace("-", "_")
        if dashed != name.text and dashed in {*known, *self.params, *self.bound, *WORDS}:
            return Hint(f"did you mean `{dashed}`?", Applicability.MAYBE, span, dashed)
        return did_you_mean(name.text, known, name.span)

    def out_of_domain(self, expr: tree.Expr) -> str:
        """The code of a value out of its domain: the caller's doing where an override stands in the expression."""
        return "E502" if any(name.text in self.overridden for name in mentioned(expr)) else "E203"

    def values_in(self, expr: tree.Expr) -> str:
        """What the parameters of an expression are, as a note."""
        params = dict.fromkeys(name.text for name in mentioned(expr) if name.text in self.params)
        return ", ".join(f"`{text}` is {self.params[text]}" for text in params)

    def fresh(self, word: str) -> str:
        """A name for a call that is bound to none: attend, attend_2, ..."""
        self.numbered[word] = self.numbered.get(word, 0) + 1
        number = self.numbered[word]
        candidate = word if number == 1 else f"{word}_{number}"
        return self.fresh(word) if candidate in self.spans or candidate in self._written() else candidate

    def _written(self) -> set[str]:
        """The names of all bindings, those behind too."""
        items = () if self.pattern is None else self.pattern.items
        return {item.name.text for item in items if isinstance(item, tree.Binding)}


def _unbound(text: str, declared: str) -> str:
    if text in ("True", "False", "None"):
        return "there are no such values; `all` is every key, and conditions are written out"
    if text in PREDECLARED or refusal(text, "binding"):
        return "it has no value here"
    return f"bind it before its use: `{text} = {declared}`"


def mentioned(expr: tree.Expr) -> Iterator[tree.Name]:
    """The bare names of an expression, from left to right."""
    match expr:
        case tree.Name():
            yield expr
        case tree.Unary():
            yield from mentioned(expr.operand)
        case tree.Binary():
            yield from (*mentioned(expr.left), *mentioned(expr.right))
        case tree.Restrict():
            yield from (*mentioned(expr.base), *mentioned(expr.index))
        case tree.Call():
            for argument in expr.arguments:
                yield from mentioned(argument.value)
