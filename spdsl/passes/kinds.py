"""kinds: what kind of value an expression makes, and what to say where another kind is wanted."""

from __future__ import annotations

from typing import Any

from spdsl.ir.pattern import Gate, Kept, Kl, Logits, Mass, Merge, Pooled, Query, Softmax, Stream, Tensor
from spdsl.ir.skip import Skip
from spdsl.passes.names import Names
from spdsl.passes.values import MATH
from spdsl.primitives.registry import WORDS
from spdsl.primitives.word import Kind, SetValue
from spdsl.syntax import tree

INPUTS: dict[Kind, tuple[type, str]] = {
    Kind.STREAM: (Stream, "stream()"), Kind.QUERY: (Query, "query()"), Kind.TENSOR: (Tensor, "tensor(head)"),
}  # fmt: skip
_TYPES: dict[Kind, type | tuple[type, ...]] = {
    Kind.SET: SetValue, Kind.STREAM: Stream, Kind.QUERY: Query, Kind.TENSOR: Tensor,
    Kind.BRANCH: (Softmax, Gate, Merge), Kind.SCORE: (Logits, Mass), Kind.VECTORS: (Stream, Query),
    Kind.RESULT: (Softmax, Gate, Merge, Logits, Mass, Pooled, Kl, Kept), Kind.UNGATED: (Softmax, Merge),
    Kind.SKIP: Skip,
}  # fmt: skip


def kind_of(names: Names, expr: tree.Expr) -> Kind:
    """What kind of value an expression makes, read off its outermost word."""
    match expr:
        case tree.Call() if expr.function.text in WORDS:
            return WORDS[expr.function.text].makes
        case tree.Call() if expr.function.text in MATH:
            return Kind.NUMBER
        case tree.Name(text="all"):
            return Kind.SET
        case tree.Name():
            bound = names.bound.get(expr.text)
            return next((kind for kind, types in _TYPES.items() if isinstance(bound, types)), Kind.NUMBER)
        case tree.Restrict():
            base = names.bound.get(expr.base.text) if isinstance(expr.base, tree.Name) else None
            return Kind.SET if isinstance(base, Stream) or is_main_stream(expr.base) else Kind.ELEMENT
        case tree.Unary():
            return kind_of(names, expr.operand)
        case tree.Binary():
            left = kind_of(names, expr.left)  # once: expressions nest
            if left is Kind.NUMBER and (right := kind_of(names, expr.right)) in (Kind.SCORE, Kind.BRANCH, Kind.SET):
                return right
            if left is Kind.STREAM:
                return Kind.SET
            return (
                left if left in (Kind.SCORE, Kind.BRANCH, Kind.SET) or expr.operator in ("|", "&", "-") else Kind.NUMBER
            )
    return Kind.NUMBER


def is_main_stream(expr: tree.Expr) -> bool:
    return isinstance(expr, tree.Name) and expr.text == "kv"


def of_kind(names: Names, value: Any, kind: Kind, expr: tree.Expr) -> Any:
    if value is None or isinstance(value, _TYPES[kind]):
        return value
    hint = ""
    if kind in (Kind.BRANCH, Kind.UNGATED, Kind.RESULT) and isinstance(value, SetValue):
        hint = "attend to the set: `attend(...)`"
    elif kind in (Kind.SET, Kind.UNITS) and isinstance(value, Softmax | Gate | Merge):
        hint = "put sets together inside of one `attend`, branches with `merge(...)` or `gate(...)`"
    elif kind is Kind.UNGATED and isinstance(value, Gate):
        hint = "gate all branches together: `gate(a, b, c)`"
    elif kind is Kind.SCORE and isinstance(value, Softmax):
        hint = "take its probabilities: `mass(...)`"
    elif kind is Kind.SCORE and isinstance(value, Stream):
        hint = "take its logits: `dot(...)`"
    names.report.error("E201", f"{kind.value} is expected here", expr.span, f"not {kind.value}", hint=hint)
    return None


def how_joined(names: Names, expr: tree.Expr) -> str:
    """How branches, or sets, are put together, where that was tried by an operator that they do not have."""
    if not isinstance(expr, tree.Binary):
        return "attend to the set: `attend(...)`" if kind_of(names, expr) is Kind.SET else ""
    kinds = {kind_of(names, expr.left), kind_of(names, expr.right)}
    if kinds & {Kind.BRANCH}:
        return (
            "`gate(a, b)` adds branches by the caller's weights, `merge(a, b)` is one softmax over disjoint keys, "
            "`attend(x | y)` one over both sets"
        )
    if kinds & {Kind.SET, Kind.STREAM}:
        return "sets are put together by `|` (in either), `&` (in both) and `-` (in the first only)"
    return "make a condition a set with `where(...)`"
