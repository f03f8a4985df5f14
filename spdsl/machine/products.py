"""How often the warps of a block compute each product, from Triton's GPU dialect.

A layout spreads the result of a dot over warps. Where it reaches past the edge of the result, it starts again: several
warps hold the same numbers, have multiplied for all of them and compute what follows from them, too. The layouts are
those of `TritonGPUAttrDefs.td`; a matrix in tensor memory is multiplied once, and the layout of its loads counts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

_ALIAS = re.compile(r"^(#\w+) = #ttg\.(\w+)<\{(.*)\}>$", re.MULTILINE)
_FIELD = re.compile(r"(\w+) = (\[[\[\], \d]*\])")
_RESULT = re.compile(r"-> tensor<((?:\d+x)+)\w+, (#\w+)>")
_LEFT = re.compile(r" : (?:!ttg\.memdesc|tensor)<((?:\d+x)+)")
_PRODUCT = re.compile(r" = (?:tt\.dot|tt\.dot_scaled|ttng\.warp_group_dot|ttng\.tmem_load) ")
_LOOP = re.compile(r"(?:= |^)scf\.(?:for|while)\b")

Fields = dict[str, list[list[int]]]
Layouts = dict[str, tuple[str, Fields]]
"""By name, what a layout is and its fields."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product in a loop."""

    rows: int
    columns: int
    reach: tuple[int, int]
    """Rows and columns that the warps of a block take at once."""
    times: int
    """How often each of its numbers is computed: 1, or more where the warps reach past its edge."""
    depth: int = 0
    """How many products are added for each number; 0 where it is only read, from tensor memory."""


def products(ttgir: str) -> tuple[Product, ...]:
    """The distinct products in the loops of a kernel, in their order; none for text that is no Triton GPU dialect."""
    layouts = layouts_of(ttgir)
    found = (product_of(line, layouts) for _, line in in_loops(ttgir))
    return tuple(dict.fromkeys(one for one in found if one is not None))


def layouts_of(ttgir: str) -> Layouts:
    """The layouts that the text names."""
    return {name: (kind, _fields(text)) for name, kind, text in _ALIAS.findall(ttgir)}


def product_of(line: str, layouts: Layouts) -> Product | None:
    """The product that a line computes."""
    result = _RESULT.search(line) if _PRODUCT.search(line) else None
    if result is None or result[2] not in layouts:
        return None
    left = _LEFT.search(line)
    depth = _sizes(left[1])[-1] if left and " * " in line else 0
    return _product(_sizes(result[1]), *layouts[result[2]], depth)


def in_loops(ttgir: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """The lines inside loops, each with the numbers of the loops around it, outermost first.

    Inside are the lines that are indented deeper than the one that begins a loop.
    """
    loops: list[tuple[int, int]] = []
    number = 0
    for line in ttgir.splitlines():
        text = line.lstrip()
        indent = len(line) - len(text)
        while loops and text and indent <= loops[-1][0] and not text.startswith("^"):
            loops.pop()
        if loops:
            yield tuple(loop for _, loop in loops), text
        if _LOOP.search(text):
            loops.append((indent, number))
            number += 1


def _product(shape: tuple[int, ...], kind: str, fields: Fields, depth: int) -> Product:
    """Of the last two axes; a batch in front of them is not spread."""
    if kind == "linear":
        reach, times = _of_bases(fields, len(shape))
    else:
        reach, times = _tile(kind, fields, len(shape)), 1
        for size, covered in zip(shape, reach, strict=True):
            times *= max(1, covered // size)
    return Product(shape[-2], shape[-1], (reach[-2], reach[-1]), times, depth)


def _tile(kind: str, fields: Fields, rank: int) -> list[int]:
    """What all warps take together along each axis."""
    parts = ("sizePerThread", "threadsPerWarp") if kind == "blocked" else ("instrShape", "tilesPerWarp")
    reach = [1] * rank
    for name in (*parts, "warpsPerCTA"):
        sizes: list[int] = fields.get(name, [])  # type: ignore[assignment]
        if name == "instrShape":  # rows, columns and, of the newer layouts, the length of the sums
            sizes = sizes[:2] if rank == 2 else sizes[:3] if len(sizes) > 3 else [1, *sizes[-2:]]
        reach = [a * b for a, b in zip(reach, sizes or [1] * rank, strict=True)]
    return reach


def _of_bases(fields: Fields, rank: int) -> tuple[list[int], int]:
    """A linear layout: a bit of a lane's or warp's number that moves nowhere doubles what is held."""
    moves = [basis for name in ("lane", "warp") for basis in fields.get(name, [])]
    every = [*moves, *fields.get("register", [])]
    reach = [1 << sum(basis[axis] > 0 for basis in every) for axis in range(rank)]
    return reach, 1 << sum(not any(basis) for basis in moves)


def _sizes(shape: str) -> tuple[int, ...]:
    """`64x128x` -> 64, 128"""
    return tuple(int(size) for size in shape.split("x")[:-1])


def _fields(text: str) -> Fields:
    return {name: ast.literal_eval(value) for name, value in _FIELD.findall(text)}
