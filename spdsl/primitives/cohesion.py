"""cohesion(cells, by): how alike the tokens of each cell are, a score of entries that no query enters.

`mean`: the mean cosine of all pairs of tokens, each with itself too (SpargeAttn, arXiv 2502.18137); `min`: the least
cosine of the mean of a cell with its tokens (ShadowKV, arXiv 2410.21465). A vector of length 0 has the cosine 0.
"""

from __future__ import annotations

import sympy

from spdsl.ir.pattern import Compress, Logits, Stream
from spdsl.ir.product import Product
from spdsl.primitives.dot import scored
from spdsl.primitives.word import Kind, Parameter, Scope, Word

WAYS = ("mean", "min")


def cohesion(scope: Scope, cells: Stream, by: str) -> Logits | None:
    if cells.compress is None:
        scope.refuse("E201", f"`{cells.name}` has tokens, and one is like itself", "name a stream of cells: `compress`")
        return None
    if by == "min" and cells.compress.by != "mean":
        scope.refuse("E105", f"the cosines of entries by `{cells.compress.by}` are not built yet", "use `by = mean`")
        return None
    made = Stream(
        f"{cells.name}_cohesion" + "_min" * (by == "min"), cells.heads, cells.qk, cells.v, cells.value,
        grid=cells.grid, compress=Compress(cells.compress.source, f"cohesion_{by}"), span=scope.span,
    )  # fmt: skip
    if made not in scope.inputs:
        if any(known.name == made.name for known in scope.inputs):
            scope.refuse("E104", f"`{made.name}` is what the numbers of `cohesion` are called here", "use another name")
            return None
        scope.add(made)
    return scored(scope, made, None, sympy.S.One, Product("cohesion", asked=False))


WORD = Word(
    "cohesion",
    Kind.SCORE,
    (Parameter("cells", Kind.STREAM), Parameter("by", Kind.CHOICE, default="mean", words=WAYS)),
    cohesion,
    "how alike the tokens of a cell are as a score",
    "pattern p { causal odd = threshold(-0.6, score = -cohesion(compress(16)), share = group, force = last(1), "
    "most = 8) return attend(odd) }",
    unnamed="ranking",
)
