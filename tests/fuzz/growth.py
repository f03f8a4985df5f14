"""Sources that grow: a construct repeated, chained or nested, with coprime, huge or tiny numbers. Each has a size."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 997, 1009, 10007, 46349, 65537, 1000003)
HUGE = (2**31 - 1, 2**30, 2**24, 10**8, 10**6, 99991, 4097)
SIZES = (2, 5, 10, 20, 33, 65, 120, 300, 990)


class Growth:
    """Draws growing sources from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def source(self) -> str:
        way = self.rng.choice(WAYS)
        return way(self, self.rng.choice(SIZES))

    def prime(self) -> int:
        return self.rng.choice(PRIMES)

    def huge(self) -> int:
        return self.rng.choice(HUGE)

    def number(self) -> int:
        return self.rng.choice([self.prime(), self.huge(), self.rng.randint(1, 64)])

    def atom(self, i: int) -> str:
        """A set; `i` makes it another one than the others."""
        a, b = self.number() + i, self.prime()
        return self.rng.choice([
            f"where(q - k == {i})", f"where((q + {i}) % {b} == k % {b})", f"sink({a})", f"sliding({a})",
            f"dilated({i + 1}, {b})", f"strided({a})", f"fixed({b + i}, {b})", f"first({i + 1}, unit = {b})",
            f"last({i + 1}, unit = {b}, rows = {b})", f"where(k // {b} < q // {self.prime()} + {i})",
            f"cover(sliding({a}), rows = {self.prime()}, unit = {b})", f"open({a})", f"random(2, unit = {a})",
            f"where(h % {b} == {i})", f"where(abs(q - {i} * k) < {a})", f"where(min(q, {a}) > max(k, {i}))",
            f"where(q * k % {b} == {i % 2})", f"where(length - k < {a})", f"where((q * {a} + k) / {b} > {i})",
        ])  # fmt: skip

    def head(self) -> str:
        return self.rng.choice(["", "causal", "causal expect(length = 65536)", "heads query = 64, kv = 8"])

    def pattern(self, body: str) -> str:
        return f"pattern p {{ {self.head()} {body} }}"

    def same(self) -> Callable[[int], str]:
        """One kind of set for a whole source, with numbers that differ."""
        state = self.rng.getstate()
        if self.rng.random() < 0.3:
            return self.atom

        def one(i: int) -> str:
            after = self.rng.getstate()
            self.rng.setstate(state)
            text = self.atom(i)
            self.rng.setstate(after)
            return text

        return one


def union(g: Growth, n: int) -> str:
    one = g.same()
    return g.pattern(f"return attend({g.rng.choice([' | ', ' & ', ' - ']).join(one(i) for i in range(min(n, 95)))})")


def product(g: Growth, n: int) -> str:
    one = g.same()
    return g.pattern(
        "return attend(" + " & ".join(f"({one(2 * i)} | {one(2 * i + 1)})" for i in range(min(n, 60))) + ")"
    )


def negated(g: Growth, n: int) -> str:
    one = g.same()
    return g.pattern("return attend(all" + "".join(f" - ({one(2 * i)} & {one(i)})" for i in range(min(n, 60))) + ")")


def branches(g: Growth, n: int) -> str:
    one, word = g.same(), g.rng.choice(["merge", "gate"])
    return g.pattern(f"return {word}({', '.join(f'attend({one(i)})' for i in range(n))})")


def nested(g: Growth, n: int) -> str:
    text, one = f"attend({g.atom(0)})", g.same()
    for i in range(min(n, 60)):
        text = f"merge({text}, attend({one(i)}))"
    return g.pattern(f"return {text}")


def doubling(g: Growth, n: int) -> str:
    """Each name is made of the one before, twice."""
    step, start = g.rng.choice([
        ("{b} * {b} + 1/7", "1/3"), ("{b} + {b} / 3", "1/3"), ("{b} * {b}", "3/2"), ("{b} / 3 - {b} * 2", "1"),
        ("{b} & {b} | {a}", "sink(4)"), ("{b} | ~{b}", "sliding(4)"), ("({b} | {a}) & ({b} | {c})", "sliding(9)"),
        ("cover({b} | {a}, rows = 7, unit = 5)", "sliding(9)"), ("merge({b}, {b})", "attend(sink(4))"),
        ("{b} - {b} // 3", "2147483647"), ("min({b}, {b} + 1/97)", "1/3"), ("sqrt({b} + 2)", "sqrt(2)"),
        ("sqrt({b}) * {b} + sqrt({b})", "2"), ("abs({b} - sqrt({b}))", "5"), ("{b} % (1/{i}7)", "9"),
    ])  # fmt: skip
    lines, one = [f"b0 = {start}"], g.same()
    for i in range(1, n):
        lines.append(f"b{i} = " + step.format(b=f"b{i - 1}", a=one(i), c=one(i + 1), i=i))
    end = f"b{n - 1}"
    if start.startswith("attend"):
        result = end
    else:
        result = f"attend({end if start[0] == 's' and 'sqrt' not in start else f'sliding({end})'})"
    return g.pattern(" ".join(lines) + f" return {result}")


def arithmetic(g: Growth, n: int) -> str:
    """A long or deep expression over positions."""
    text = g.rng.choice(["q", "k", "(q - k)"])
    for i in range(min(n, 90)):
        text = g.rng.choice([
            f"({text} + {i}) // {g.prime()}", f"({text} * {g.number()})", f"({text}) % {g.prime()}", f"abs({text} - k)",
            f"min({text}, q + {i})", f"({text} * {text})" if i < 6 else text, f"({text} - q / {g.prime()})",
        ])  # fmt: skip
    return g.pattern(f"return attend(where({text} {g.rng.choice(['<', '==', '>='])} {g.number()}))")


def bias(g: Growth, n: int) -> str:
    terms = " + ".join(f"x{i}[h] * ((q - k) // {g.prime()} % {g.prime()})" for i in range(min(n, 90)))
    lines = " ".join(f"x{i} = tensor(head)" for i in range(min(n, 90)))
    return g.pattern(f"{lines} return attend(sliding({g.number()}), bias = {terms})")


def entries(g: Growth, n: int) -> str:
    width, stride, unit = g.number(), g.rng.choice([1, 2, 16, g.number()]), g.rng.choice([16, 64, 64 * g.number()])
    count = g.rng.choice([1, 8, 16, 1000, g.number()])
    force = g.rng.choice(["", f", force = first({g.number()}) | last({g.number()})", f", within = {g.atom(n)}"])
    return g.pattern(
        f"x = compress({width}, {stride}, before = {g.rng.choice([0, 1, max(0, width - 1)])}) c = attend(x)"
        f" y = top_k({count}, score = mass(c), unit = {unit}{force}) return gate(c, attend(y))"
    )


def choices(g: Growth, n: int) -> str:
    lines = " ".join(f"y{i} = top_k({i + 1}, score = dot(kv), unit = max(16))" for i in range(min(n, 300)))
    sets = ", ".join(f"attend(y{i})" for i in range(min(n, 300)))
    return g.pattern(f"{lines} return gate({sets})")


def inputs(g: Growth, n: int) -> str:
    word = g.rng.choice(["stream()", "query()", "tensor(token, int)", "compress(8, 4)", "given(unit = 16, rows = 16)"])
    lines = " ".join(f"x{i} = {word}" for i in range(min(n, 900)))
    used = {
        "s": "attend(x{i})", "q": "attend(all, query = x{i})", "t": "attend(where(x{i}[k] > 0))", "c": "attend(x{i})",
        "g": "attend(x{i})",
    }[word[0]]  # fmt: skip
    joint = g.rng.choice(["gate", "merge"])
    return g.pattern(f"{lines} return {joint}({', '.join(used.format(i=i) for i in range(min(n, 900)))})")


def cases(g: Growth, n: int) -> str:
    lines = " ".join(f"return attend(sliding({i + 1})) if length < {g.number()} + {i}" for i in range(min(n, 900)))
    return g.pattern(f"{lines} return attend(all)")


def params(g: Growth, n: int) -> str:
    pairs = ", ".join(f"n{i} = {g.number()}" + (f" // n{i - 1} + n{i - 1}" if i else "") for i in range(n))
    return g.pattern(f"param {pairs} return attend(sliding(n{n - 1} + 1))")


def sizes(g: Growth, n: int) -> str:
    """Declared sizes."""
    heads = f"heads query = {g.number() * g.rng.choice([1, 8])}, kv = {g.rng.choice([1, g.number()])}"
    page = g.rng.choice([16, 64, 16 * g.number()])
    expect = f"expect(length = {g.number()}, batch = {g.number()}, page = {page})"
    atoms = f"{g.atom(1)} | {g.atom(2)}"
    return f"pattern p {{ {heads} dim qk = {g.number()}, v = {g.number()} causal {expect} return attend({atoms}) }}"


def many(g: Growth, n: int) -> str:
    """Patterns in one file."""
    one = g.same()
    return "\n".join(f"pattern p{i} {{ causal return attend({one(i)} | {one(i + 1)}) }}" for i in range(n))


def text(g: Growth, n: int) -> str:
    """Comments, names, brackets, numbers of many characters."""
    return g.rng.choice([
        "#" + "x" * 120 * n + "\n" + g.pattern("return attend(all)"), g.pattern(f"{'x' * n} = 3 return attend(all)"),
        g.pattern("return attend(" + "(" * n + "all" + ")" * n + ")"),
        g.pattern("return attend(" + "~" * n + "sliding(8))"),
        g.pattern(f"return attend(sliding({'9' * n}))"), g.pattern(f"return attend(sliding(0.{'0' * n}1))"),
        g.pattern("return attend(kv" + "[all]" * n + ")"), "pattern p { causal \r\n" * n,
        g.pattern(f"x = tensor({', '.join(['4'] * n)}) return attend(where(x{'[h]' * n} > 0))"),
    ])  # fmt: skip


def lookups(g: Growth, n: int) -> str:
    """Reads of a tensor at reads of it."""
    index = "k"
    for _ in range(min(n, 40)):
        index = f"x[{index} // 2]"
    return g.pattern(f"x = tensor(token, int) return attend(where({index} == x[q]))")


WAYS: tuple[Callable[[Growth, int], str], ...] = (
    union, product, negated, branches, nested, doubling, arithmetic, bias, entries, choices, inputs, cases, params,
    sizes, sizes, many, text, lookups,
)  # fmt: skip


def every(seed: int) -> Iterator[tuple[str, int, str]]:
    """(way, size, source) of every way at every size."""
    for way in dict.fromkeys(WAYS):
        for size in SIZES:
            yield way.__name__, size, way(Growth(seed + size), size)
