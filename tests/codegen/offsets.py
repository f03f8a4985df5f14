"""Reads the functions of kernels for products of an index and a stride of which neither is 64 bits wide.

Wide is what is converted to int64, what is computed from it, a name set to it, a parameter that every call gives it to,
and what a function returns of it. `C.POOL.add(...)` calls every function that stands as `add` in a record.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# What a place is multiplied by: strides of tensors, of lists and maps, the dims of buffers that lie in one piece.
_STRIDES = re.compile(
    r"(\w+\.)+(token|batch|head|page_width|width|entries|jobs|queries|splits|DIM|QK_DIM|V_DIM|HIDDEN)"
    r"|t\.\w+_(\d+|sequence)|stride|tiles|most|lists\.sequence|tl\.num_programs\(\d\)"
)


@dataclass
class _Function:
    node: ast.FunctionDef
    wide: dict[str, bool]  # parameters
    returns: list[bool] = field(default_factory=list)  # of the parts of what it returns
    env: dict[str, bool] = field(default_factory=dict)


def narrow_products(text: str) -> list[str]:
    """`function:line: product` of each product that may pass 2^31."""
    body = ast.parse(text).body
    nodes = [node for node in body if isinstance(node, ast.FunctionDef) and _is_jit(node)]
    return _Reading({node.name: _Function(node, {}) for node in nodes}, _of_records(body)).narrow()


def _of_records(body: list[ast.stmt]) -> dict[str, set[str]]:
    """The names that stand in each field of a record: of a named tuple that is made on the level of the module."""
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    fields = {one.name: [ast.unparse(x.target) for x in one.body if isinstance(x, ast.AnnAssign)] for one in classes}
    found: dict[str, set[str]] = {}
    for call in (call for node in body if isinstance(node, ast.Assign) for call in _calls(node)):
        assert isinstance(call.func, ast.Name)
        for name, given in zip(fields.get(call.func.id, []), call.args, strict=False):
            found.setdefault(name, set()).add(ast.unparse(given))
    return found


def _is_jit(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) in ("jit", "triton.jit") for decorator in node.decorator_list)


class _Reading:
    """All start as wide; what is not falls, until nothing falls any more."""

    def __init__(self, functions: dict[str, _Function], records: dict[str, set[str]]) -> None:
        self.functions, self.records = functions, records
        calls = [call for one in functions.values() for call in (*_calls(one.node), *_calls_of_records(one.node))]
        called = {callee.node.name for call in calls for callee in self._callees(call)}
        for name, one in functions.items():
            one.wide = {arg.arg: name in called for arg in one.node.args.args}
            one.returns = [True] * 8

    def narrow(self) -> list[str]:
        while True:
            before = str([(one.wide, one.returns) for one in self.functions.values()])
            for one in self.functions.values():
                self._read(one)
            if str([(one.wide, one.returns) for one in self.functions.values()]) == before:
                break
        return [found for one in self.functions.values() for found in self._products(one)]

    def _read(self, one: _Function) -> None:
        one.env = dict(one.wide)
        for statement in sorted(_statements(one.node), key=lambda found: found.lineno):
            if isinstance(statement, ast.Assign):
                for target in statement.targets:
                    self._assign(one.env, target, statement.value)
            elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
                one.env[name] = one.env.get(name, False) or self._wide(statement.value, one.env)
            elif isinstance(statement, ast.Return) and statement.value is not None:
                one.returns = [
                    a and b for a, b in zip(self._parts(statement.value, one.env), one.returns, strict=False)
                ]
        for call in (*_calls(one.node), *_calls_of_records(one.node)):
            self._pass(call, one.env)

    def _pass(self, call: ast.Call, env: dict[str, bool]) -> None:
        for callee in self._callees(call):
            for name, given in zip(callee.wide, call.args, strict=False):
                callee.wide[name] = callee.wide[name] and self._wide(given, env)

    def _callees(self, call: ast.Call) -> list[_Function]:
        """Fields of one name in two kinds of records differ in their parameters."""
        of_record = isinstance(call.func, ast.Attribute)
        names = (
            self.records.get(call.func.attr, ()) if isinstance(call.func, ast.Attribute) else [ast.unparse(call.func)]
        )
        found = [self.functions[name] for name in names if name in self.functions]
        return [one for one in found if not of_record or len(one.node.args.args) == len(call.args)]

    def _assign(self, env: dict[str, bool], target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = self._wide(value, env)
        elif isinstance(target, ast.Tuple):
            parts = [*self._parts(value, env), *[False] * len(target.elts)]
            for name, wide in zip(target.elts, parts, strict=False):
                if isinstance(name, ast.Name):
                    env[name.id] = wide

    def _parts(self, value: ast.expr, env: dict[str, bool]) -> list[bool]:
        """Of a tuple, or of what a function returns."""
        if isinstance(value, ast.Tuple):
            return [self._wide(part, env) for part in value.elts]
        callee = self._callee(value)
        return [self._wide(value, env)] if callee is None else callee.returns

    def _callee(self, value: ast.expr) -> _Function | None:
        plain = isinstance(value, ast.Call) and isinstance(value.func, ast.Name)
        return self.functions.get(value.func.id) if plain else None  # type: ignore[attr-defined]

    def _wide(self, value: ast.expr, env: dict[str, bool]) -> bool:
        if isinstance(value, ast.Call):
            if any(ast.unparse(given) == "tl.int64" for given in [*value.args, *(k.value for k in value.keywords)]):
                return True
            callee = self._callee(value)
            if callee is not None:
                return callee.returns[:1] == [True]
            kept = isinstance(value.func, ast.Attribute) and ast.unparse(value.func) in _KEEPING
            return kept and any(self._wide(given, env) for given in value.args)
        if isinstance(value, ast.BinOp):
            return self._wide(value.left, env) or self._wide(value.right, env)
        if isinstance(value, ast.UnaryOp):
            return self._wide(value.operand, env)
        if isinstance(value, ast.Subscript):
            return self._wide(value.value, env)
        return isinstance(value, ast.Name) and env.get(value.id, False)

    def _products(self, one: _Function) -> Iterator[str]:
        for node in ast.walk(one.node):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
                continue
            sides = node.left, node.right
            if any(map(_is_stride, sides)) and not (all(map(_is_constant, sides)) or self._wide(node, one.env)):
                yield f"{one.node.name}:{node.lineno}: {ast.unparse(node)}"


_KEEPING = ("tl.zeros_like", "tl.maximum", "tl.minimum", "tl.where", "tl.min", "tl.max")


def _statements(node: ast.AST) -> list[ast.stmt]:
    return [found for found in ast.walk(node) if isinstance(found, ast.stmt)]


def _is_constant(value: ast.expr) -> bool:
    """A number, `C.BLOCK_N`, or made of these."""
    leaves = [leaf for leaf in ast.walk(value) if isinstance(leaf, ast.Name | ast.Attribute | ast.Constant)]
    names = [leaf.attr if isinstance(leaf, ast.Attribute) else getattr(leaf, "id", "") for leaf in leaves]
    return all(name.upper() == name for name in names)


def _calls(node: ast.AST) -> list[ast.Call]:
    return [call for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]


def _calls_of_records(node: ast.AST) -> list[ast.Call]:
    """`C.POOL.add(...)`"""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)]
    return [call for call in calls if ast.unparse(call.func).startswith("C.POOL.")]


def _is_stride(value: ast.expr) -> bool:
    """One, or a sum of some."""
    if isinstance(value, ast.BinOp):
        return _is_stride(value.left) or _is_stride(value.right)
    return _STRIDES.fullmatch(ast.unparse(value)) is not None
