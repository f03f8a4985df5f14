"""expressions: a sympy expression as Python text in one of three dialects.

`//` and `%` of Triton round toward zero, sympy's toward minus infinity, so a division whose numerator may be negative
goes through the device functions `floor_div` and `floor_mod`. Tensor reads are printed by the caller's `read`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from spdsl.ir.compared import Compared
from spdsl.ir.symbols import K
from spdsl.ir.ties import Above, sides

Read = Callable[[AppliedUndef, Callable[[sympy.Basic], str]], str]

_SUM, _PRODUCT, _ATOM = 1, 2, 3  # how tightly a printed expression binds
_RELATIONS = {"Equality": "==", "Unequality": "!=", "LessThan": "<=", "StrictLessThan": "<", "GreaterThan": ">=",
              "StrictGreaterThan": ">"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of text spells what the kinds spell differently."""

    name: str
    maximum: str
    minimum: str
    sqrt: str
    absolute: str
    conjunction: str
    disjunction: str
    negation: str
    above: str  # the derivative of a maximum
    floors: bool  # `//` and `%` round toward minus infinity
    true: str
    false: str


TRITON = Dialect(
    "triton", "tl.maximum", "tl.minimum", "tl.sqrt", "tl.abs", " & ", " | ", "~", "rt.above", False,
    "(k >= 0)", "(k < 0)",
)  # fmt: skip
TORCH = Dialect(
    "torch", "rt.maximum", "rt.minimum", "torch.sqrt", "abs", " & ", " | ", "~", "rt.above_of", True,
    "(k >= 0)", "(k < 0)",
)  # fmt: skip
PYTHON = Dialect("python", "max", "min", "rt.root", "abs", " and ", " or ", "not ", "", True, "True", "False")


_MIRROR = str.maketrans("<>", "><")


class UnreadableError(Exception):
    """A tensor read where the dialect has none."""


def no_reads(read: AppliedUndef, text: Callable[[sympy.Basic], str]) -> str:
    raise UnreadableError(str(read))


def expression(value: sympy.Basic, dialect: Dialect, read: Read = no_reads) -> str:
    """The text of an expression or a condition."""
    return _Printer(dialect, read).text(value)


def _whole(difference: sympy.Expr) -> sympy.Expr:
    """The difference times the least number that clears its fractions: a relation stays the same."""
    return sympy.expand(difference * _denominator(difference))


def _denominator(value: sympy.Expr) -> sympy.Integer:
    """The least number that clears the fractions of its terms."""
    coefficients = value.as_coefficients_dict().values()
    return sympy.ilcm(1, 1, *(number.q for number in coefficients if number.is_Rational))


@dataclass(slots=True)
class _Printer:
    dialect: Dialect
    read: Read

    def text(self, value: sympy.Basic, tight: int = 0) -> str:
        printed, binding = self._print(value)
        return printed if binding >= tight else f"({printed})"

    def _print(self, value: sympy.Basic) -> tuple[str, int]:
        d = self.dialect
        if value is sympy.true or value is sympy.false:
            return (d.true if value is sympy.true else d.false), _ATOM
        if isinstance(value, sympy.And | sympy.Or):
            joiner = d.conjunction if isinstance(value, sympy.And) else d.disjunction
            parts = sorted(value.args, key=sympy.default_sort_key)
            return joiner.join(self.text(part, _ATOM) for part in parts), 0
        if isinstance(value, sympy.Not):
            return d.negation + self.text(value.args[0], _ATOM), 0
        if isinstance(value, Relational):
            return self._relation(value), 0
        if isinstance(value, Compared):
            return self._compared(value)
        if isinstance(value, sympy.Symbol):
            return value.name, _ATOM
        if isinstance(value, AppliedUndef):
            return self.read(value, self.text), _ATOM
        if value.is_number:
            return self._number(value)
        return self._operation(value)

    def _relation(self, value: Relational) -> str:
        """As one would write it: whole numbers, no minus in front, k on the left: `k <= q`, `q - k < 512`."""
        difference = _whole(sympy.expand(value.lhs - value.rhs))
        terms = sympy.Add.make_args(difference)
        moving = [term for term in terms if not term.is_number]
        left = sympy.Add(*(term for term in moving if not term.could_extract_minus_sign()))
        right = sympy.Add(*(-term for term in moving if term.could_extract_minus_sign()))
        constant = -sympy.Add(*(term for term in terms if term.is_number))
        operator = _RELATIONS[type(value).__name__]
        if left == 0 or (right.has(K) and not left.has(K) and constant == 0):
            left, right, constant, operator = right, left, -constant, operator.translate(_MIRROR)
        if constant < 0 and right != 0:
            left, right, constant, operator = right, left, -constant, operator.translate(_MIRROR)
        if operator == "<=" and constant > 0 and difference.is_integer:
            operator, constant = "<", constant + 1
        if constant > 0 and right != 0 and len(sympy.Add.make_args(left)) == 1:
            return f"{self.text(left - right)} {operator} {self.text(constant)}"
        return f"{self.text(left)} {operator} {self.text(right + constant)}"

    def _compared(self, value: Compared) -> tuple[str, int]:
        """As it is written: a number that moves to the other side may be NaN there. Only fractions go."""
        left, right = map(sympy.expand, value.sides)
        scale = sympy.ilcm(_denominator(left), _denominator(right))
        sides = [self.text(sympy.expand(side * scale)) for side in (left, right)]
        text = f" {_RELATIONS[value.relation.__name__]} ".join(sides)
        return (text, 0) if value.holds else (f"{self.dialect.negation}({text})", 0)

    def _number(self, value: sympy.Basic) -> tuple[str, int]:
        if value.is_Integer:
            return str(int(value)), _ATOM if int(value) >= 0 else _PRODUCT
        return repr(float(value)), _ATOM if float(value) >= 0 else _PRODUCT

    def _operation(self, value: sympy.Basic) -> tuple[str, int]:
        d = self.dialect
        if isinstance(value, sympy.Add):
            return self._sum(value), _SUM
        if isinstance(value, sympy.Mul):
            return self._product(value)
        if isinstance(value, sympy.floor):
            return self._floor(value)
        if isinstance(value, sympy.Mod):
            left, right = value.args
            if d is TRITON and not value.is_integer:  # // and % are those of integers
                whole = f"tl.floor({self.text(left, _PRODUCT)} / {self.text(right, _ATOM)})"
                return f"{self.text(left, _SUM)} - {whole} * {self.text(right, _ATOM)}", _SUM
            if d.floors or left.is_nonnegative:
                return f"{self.text(left, _ATOM)} % {self.text(right, _ATOM)}", _PRODUCT
            return f"rt.floor_mod({self.text(left)}, {self.text(right)})", _ATOM
        if isinstance(value, sympy.Max | sympy.Min):
            return self._extremum(d.maximum if isinstance(value, sympy.Max) else d.minimum, value), _ATOM
        if isinstance(value, Above):
            return f"{d.above}({self.text(value.args[0])}, {self.text(value.args[1])})", _ATOM
        if isinstance(value, sympy.Abs):
            return f"{d.absolute}({self.text(value.args[0])})", _ATOM
        if isinstance(value, sympy.Pow) and value.exp == sympy.S.Half:
            return f"{d.sqrt}({self._fractional(value.base)})", _ATOM
        if isinstance(value, sympy.Pow) and value.exp.is_Rational and value.exp.q == 2:
            if value.exp < 0:
                return f"1.0 / {self.text(1 / value, _ATOM)}", _PRODUCT
            whole = value.base ** (value.exp - sympy.S.Half)
            return f"{self.text(whole, _ATOM)} * {self.text(sympy.sqrt(value.base))}", _PRODUCT
        if isinstance(value, sympy.Pow) and value.exp.is_Integer and value.exp > 0:
            return " * ".join([self.text(value.base, _ATOM)] * int(value.exp)), _PRODUCT
        if isinstance(value, sympy.Pow) and value.exp.is_Integer and value.exp < 0:
            return f"1.0 / {self.text(1 / value, _ATOM)}", _PRODUCT
        raise UnreadableError(f"no text for {value}")

    def _sum(self, value: sympy.Add) -> str:
        """Positive terms first, the number last."""
        terms = sorted(value.args, key=lambda term: (term.is_number, term.could_extract_minus_sign(), str(term)))
        text = self.text(terms[0], _SUM)
        for term in terms[1:]:
            negative = term.could_extract_minus_sign()
            text += f" - {self.text(-term, _PRODUCT)}" if negative else f" + {self.text(term, _PRODUCT)}"
        return text

    def _product(self, value: sympy.Mul) -> tuple[str, int]:
        coefficient, rest = value.as_coeff_Mul()
        if coefficient == -1:
            return f"-{self.text(rest, _ATOM)}", _PRODUCT  # -(a // b) is not -a // b
        factors = sympy.Mul.make_args(rest) if coefficient == 1 else (coefficient, *sympy.Mul.make_args(rest))
        if self.dialect is TORCH and not coefficient.is_integer:  # whole numbers last: their product is exact
            if rest.is_integer:
                return f"{self._fractional(rest)} * {self.text(coefficient, _ATOM)}", _PRODUCT
            factors = sorted(factors, key=lambda factor: (bool(factor.is_integer), factor.is_number))
        return " * ".join(self.text(factor, _ATOM) for factor in factors), _PRODUCT

    def _fractional(self, value: sympy.Expr, tight: int = 0) -> str:
        """What a fraction or a root is taken of: of tensors of whole numbers it would be a float32."""
        if self.dialect is TORCH and value.is_integer:
            return f"rt.exact({self.text(value)})"
        return self.text(value, tight)

    def _floor(self, value: sympy.floor) -> tuple[str, int]:
        numerator, denominator = sympy.fraction(sympy.together(value.args[0]))
        numerator = sympy.expand(numerator)
        if self.dialect is TRITON and not numerator.is_integer:
            return f"tl.floor({self.text(numerator, _PRODUCT)} / {self.text(denominator, _ATOM)})", _ATOM
        if self.dialect.floors or numerator.is_nonnegative:
            return f"{self.text(numerator, _ATOM)} // {self.text(denominator, _ATOM)}", _PRODUCT
        return f"rt.floor_div({self.text(numerator)}, {self.text(denominator)})", _ATOM

    def _extremum(self, function: str, value: sympy.Max | sympy.Min) -> str:
        parts = [self.text(part) for part in sides(value)]
        if self.dialect is PYTHON:
            return f"{function}({', '.join(parts)})"
        # Of a number and NaN, torch says NaN; Triton does where it is told to.
        nan = ", tl.PropagateNan.ALL" if self.dialect is TRITON and not value.is_integer else ""
        text = parts[-1]
        for part in reversed(parts[:-1]):
            text = f"{function}({part}, {text}{nan})"
        return text
