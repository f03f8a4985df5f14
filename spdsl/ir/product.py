"""What the compiler knows of a product, the number that a query and a key give: one record for each.

The library has a record of the same name with the functions that compute it; the oracle has its formula.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Product:
    """`attended`: kernels of branches and of divergences multiply so; else it is a score's, its logits or their lse.

    `asked`: whether the query enters it; else all heads and rows have the numbers of their entries.
    `step`: of how many queries, and as many keys, one number is made. More than 1: a score of cells of both.
    """

    name: str
    attended: bool = False
    asked: bool = True
    step: int = 1


DOT = Product("dot", attended=True)
