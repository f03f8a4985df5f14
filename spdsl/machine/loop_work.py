"""What one iteration of an innermost loop multiplies and loads, from Triton's GPU dialect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from spdsl.machine.products import Product, in_loops, layouts_of, product_of

# Loads name pointers (`tensor<64x128x!tt.ptr<bf16>, #blocked>`, `!tt.ptr<i32>`) or a descriptor of a tile.
_LOAD = re.compile(r"(?:^|= )(?:tt\.load|ttg\.async_copy_global_to_local) ")
_POINTERS = re.compile(r"(?:tensor<(?P<shape>(?:\d+x)+))?!tt\.ptr<(?P<type>\w+)")
_TILE_LOAD = re.compile(r"(?:^|= )(?:ttng\.async_tma_(?:copy_global_to_local|gather)|tt\.descriptor_(?:load|gather)) ")
_TILE = re.compile(r"tensordesc<(?:tensor<)?(?P<shape>(?:\d+x)+)(?P<type>\w+)")
_BITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class LoopWork:
    """Of one iteration of one block."""

    products: tuple[Product, ...]
    """Each as often as it stands there."""
    loaded: int
    """Bytes that are loaded from global memory, those that a mask leaves out included."""

    @property
    def multiplied(self) -> int:
        """Multiplications that are wanted."""
        return sum(one.rows * one.columns * one.depth for one in self.products)

    @property
    def executed(self) -> int:
        """Multiplications of the matrix unit: wanted ones as often as warps repeat them."""
        return sum(one.rows * one.columns * one.depth * one.times for one in self.products)


def innermost(ttgir: str) -> tuple[LoopWork, ...]:
    """Of the loops with products in which no loop has some, in their order."""
    layouts = layouts_of(ttgir)
    own: dict[tuple[int, ...], list[str]] = {}
    for around, line in in_loops(ttgir):
        own.setdefault(around, []).append(line)
    made = {
        around: tuple(found for line in lines if (found := product_of(line, layouts)) is not None)
        for around, lines in own.items()
    }
    having = [around for around, found in made.items() if found]
    return tuple(
        LoopWork(made[around], sum(_loaded(own[around])))
        for around in having
        if not any(other != around and other[: len(around)] == around for other in having)
    )


def _loaded(lines: list[str]) -> Iterator[int]:
    for line in lines:
        for load, shape in ((_LOAD, _POINTERS), (_TILE_LOAD, _TILE)):
            found = shape.search(line) if load.search(line) else None
            if found is not None:
                yield _bytes(found["shape"] or "", found["type"])


def _bytes(shape: str, kind: str) -> int:
    numbers = 1
    for size in shape.split("x")[:-1]:
        numbers *= int(size)
    bits = _BITS.search(kind)
    return numbers * max(1, int(bits[0]) // 8) if bits else 0
