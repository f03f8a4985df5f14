"""Random patterns, typed by the registry's own parameters: a new word takes part as soon as it is registered."""

from __future__ import annotations

import random
from collections.abc import Callable

from spdsl.primitives.registry import WORDS
from spdsl.primitives.word import REQUIRED, UNIT_OF_CHOICE, Kind, Parameter, Word

USUAL = (1, 2, 3, 4, 8, 16, 32, 64, 128, 512, 1024)
EXTREME = (
    "0", "2147483647", "2147483646", "1073741824", "16777216", "65537", "46349", "1020", "997", "1/3", "0.5", "-1",
    "1/999999937", "0.000000001", "999999937/2", "2147483647*2147483647", "1/(1/7)", "2147483648", "sqrt(2)", "length",
)  # fmt: skip
CODES = ("W107", "W402", "W403", "W501", "W504", "W505", "W508", "W509", "W510")
DEPTH = 3  # of sets, conditions and numbers within one another


class Programs:
    """Draws sources from one seed; the same seed gives the same sources."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bound: dict[Kind, list[str]] = {}
        self.tensors: dict[str, int] = {}  # with the number of their axes
        self.wild = 0.0  # how often a value is of the wrong kind, or an extreme number

    def source(self) -> str:
        """One pattern, rarely several."""
        self.wild = self.rng.choice([0.0, 0.0, 0.02, 0.15])
        several = self.rng.random() < 0.05
        return "\n".join(self._pattern(f"p{i}") for i in range(self.rng.randint(2, 6) if several else 1))

    def _pattern(self, name: str) -> str:
        self.bound, self.tensors = {}, {}
        lines: list[str] = []
        if self._chance(0.4):
            kv = self.rng.choice([1, 2, 4, 8])
            lines.append(f"heads query = {self._size(kv * self.rng.choice([1, 2, 4, 16]))}, kv = {self._size(kv)}")
        if self._chance(0.4):
            lines.append(f"dim qk = {self._size(self.rng.choice([64, 128, 192]))}, v = {self._size(64)}")
        if self._chance(0.5):
            self.bound[Kind.NUMBER] = [f"n{i}" for i in range(self.rng.randint(1, 4))]
            lines.append("param " + ", ".join(f"{one} = {self._size()}" for one in self.bound[Kind.NUMBER]))
        if self._chance(0.7):
            lines.append("causal")
        kinds = [Kind.STREAM, Kind.QUERY, Kind.TENSOR, Kind.SET, Kind.SET, Kind.SCORE, Kind.SET, Kind.BRANCH]
        for i in range(self.rng.randint(0, 6)):
            kind = self.rng.choice(kinds)
            text = self.value(kind, DEPTH)
            if kind is Kind.TENSOR:
                self.tensors[f"x{i}"] = text.count(",") + 1 if "()" not in text else 0
            lines.append(f"x{i} = {text}")
            self.bound.setdefault(kind, []).append(f"x{i}")
        if self._chance(0.5):
            lines.append(f"expect(length = {self._size(65536)}, page = {self.rng.choice([16, 64, 128])})")
        lines.append("allow(" + ", ".join(self.rng.sample(CODES, 3)) + ")")
        return f"pattern {name} {{\n    " + "\n    ".join([*lines, *self._results()]) + "\n}\n"

    def _results(self) -> list[str]:
        extras = ", ".join(self.value(Kind.RESULT, 2) for _ in range(self._chance(0.15)))
        found = [f"return {self.value(Kind.BRANCH, 2)}" + (f", {extras}" if extras else "")]
        if self._chance(0.2):
            guards = ["train", "prefill", "decode", "length < 4096", "~train", "train & length > n0"]
            found.insert(0, f"return {self.value(Kind.BRANCH, 2)} if {self.rng.choice(guards)}")
        return found

    # ---- values

    def value(self, kind: Kind, depth: int) -> str:
        """An expression of a kind; of another one now and then."""
        if self._chance(self.wild / 4):
            kind = self.rng.choice(list(Kind))
        if kind in self.bound and self._chance(0.4):
            return self.rng.choice(self.bound[kind])
        made: dict[Kind, Callable[[int], str]] = {
            Kind.SIZE: lambda _: self._size(), Kind.COUNT: self._of_call, Kind.LEVEL: self._of_call,
            Kind.NUMBER: self._number, Kind.ELEMENT: self._element,
            Kind.CONDITION: self._condition, Kind.SET: self._set, Kind.UNITS: self._set,
            Kind.AXIS: lambda _: self.rng.choice(["head", "kv_head", "token", "query", self._size(4)]),
            Kind.CODE: lambda _: self.rng.choice(CODES), Kind.VECTORS: self._vectors,
            Kind.CHOICE: lambda _: self.rng.choice(["own", "key", "drop", "keep", "head", "group"]),
            Kind.GRAIN: lambda _: self._grain(("head", "group")), Kind.CELLS: lambda _: "mean",
        }  # fmt: skip
        return made[kind](depth) if kind in made else self._call(kind, depth)

    def _chance(self, part: float) -> bool:
        return self.rng.random() < part

    def _size(self, usual: int | None = None) -> str:
        if self._chance(self.wild):
            return self.rng.choice(EXTREME)
        if self.bound.get(Kind.NUMBER) and self._chance(0.2):
            return self.rng.choice(self.bound[Kind.NUMBER])
        return str(usual or self.rng.choice(USUAL))

    def _number(self, depth: int) -> str:
        if depth <= 0 or self._chance(0.6):
            return self._size()
        return f"({self._number(depth - 1)} {self.rng.choice('+ - * / // %'.split())} {self._number(depth - 1)})"

    def _of_call(self, depth: int) -> str:
        """A number of a list, now and then one that only a call knows (or that has a position in it)."""
        return self._element(min(depth, 1)) if self._chance(0.2) else self._size()

    def _element(self, depth: int) -> str:
        if depth <= 0 or self._chance(0.3):
            atoms = ["q", "k", "h", "q", "k", "length", self._size()]
            atoms += [name + self._index() * axes for name, axes in self.tensors.items()]
            return self.rng.choice(atoms)
        way = self.rng.choice(["two", "two", "two", "abs", "min", "-"])
        inner = self._element(depth - 1)
        if way in ("abs", "-"):
            return f"{way}({inner})"
        other = self._element(depth - 1) if self._chance(0.7) else self._size()
        if way == "min":
            return f"{self.rng.choice(['min', 'max'])}({inner}, {other})"
        return f"({inner} {self.rng.choice('+ - * / // %'.split())} {other})"

    def _index(self) -> str:
        return f"[{self.rng.choice(['q', 'k', 'h', 'k - 1', 'q // 4'])}]"

    def _condition(self, depth: int) -> str:
        if depth <= 0 or self._chance(0.5):
            sign = self.rng.choice("< <= > >= == !=".split())
            return f"{self._element(2)} {sign} {self._element(2)}"
        if self._chance(0.2):
            return f"~({self._condition(depth - 1)})"
        return f"({self._condition(depth - 1)}) {self.rng.choice('&|')} ({self._condition(depth - 1)})"

    def _set(self, depth: int) -> str:
        if depth <= 0 or self._chance(0.4):
            return "all" if self._chance(0.1) else self._call(Kind.SET, depth)
        if self._chance(0.15):
            return f"~({self._set(depth - 1)})"
        if self._chance(0.1):
            return f"{self.value(Kind.STREAM, depth - 1)}[{self._set(depth - 1)}]"
        return f"({self._set(depth - 1)} {self.rng.choice('|||&&-')} {self._set(depth - 1)})"

    def _vectors(self, depth: int) -> str:
        return self.value(self.rng.choice([Kind.STREAM, Kind.STREAM, Kind.QUERY]), depth)

    def _grain(self, words: tuple[str, ...]) -> str:
        size = self.rng.choice(words) if words else self._size(64)
        return f"{self.rng.choice(['max', 'sum', 'mean'])}({size})" if self._chance(0.5) else size

    # ---- calls

    def _call(self, kind: Kind, depth: int) -> str:
        known = [word for word in WORDS.values() if word.makes is kind or kind in _ALSO.get(word.makes, ())]
        if not known or depth < -1 or (kind in _PLAIN and self._chance(0.3)):
            return _PLAIN.get(kind, "4")
        if kind in (Kind.BRANCH, Kind.UNGATED) and self._chance(0.7):
            return self.call(WORDS["attend"], depth - 1)
        return self.call(self.rng.choice(known), depth - 1)

    def call(self, word: Word, depth: int) -> str:
        """A call of a word with random arguments."""
        arguments: list[str] = []
        for parameter in word.parameters:
            part = 0.1 if parameter.kind is Kind.SKIP else 0.3  # its rows fit one phase, and a result has several
            if parameter.default is REQUIRED or parameter.many or self._chance(part):
                values = [self._argument(parameter, depth) for _ in range(self._count(parameter))]
                named = parameter.default is not REQUIRED and not parameter.many
                arguments += [f"{parameter.name} = {value}" if named else value for value in values]
        return f"{word.name}({', '.join(arguments)})"

    def _count(self, parameter: Parameter) -> int:
        return self.rng.randint(1, 3) if parameter.many else 1

    def _argument(self, parameter: Parameter, depth: int) -> str:
        if parameter.kind is Kind.GRAIN and self._chance(0.95):
            return self._grain(parameter.words)
        if parameter.words and self._chance(0.95):
            return self.rng.choice(parameter.words)
        if parameter.kind is Kind.SIZE and parameter.default is UNIT_OF_CHOICE and self._chance(0.5):
            return "16"
        if parameter.kind is Kind.TENSOR and self._chance(0.9):
            return "tensor(head)"
        if parameter.kind is Kind.QUERY and self._chance(0.6):
            return "q"  # most queries that are made of it fit few words
        return self.value(parameter.kind, depth)


# What stands for a value of a kind where calls end.
_PLAIN = {
    Kind.STREAM: "kv", Kind.QUERY: "q", Kind.SET: "sliding(64)", Kind.TENSOR: "tensor(head)", Kind.SCORE: "dot(kv)",
    Kind.BRANCH: "attend(sliding(16))", Kind.UNGATED: "attend(sink(4))", Kind.RESULT: "attend(sliding(8))",
}  # fmt: skip
_ALSO = {
    Kind.BRANCH: (Kind.RESULT, Kind.UNGATED),
    Kind.SCORE: (Kind.RESULT,),
}
