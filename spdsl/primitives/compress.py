"""entries = compress(width, stride, before, partial, of, by): an entry for each cell of `width` tokens, every `stride`.

Entry i is made of the sequence's tokens in [i * stride - before, i * stride - before + width). Cells that begin before
the sequence are made of what is there, as the first block of Compressed Sparse Attention (arXiv 2606.19348, eq. 12);
cells that are not whole at its end have no entry, or with `partial = keep` the first of them has. K and V are
compressed apart, each with weights of its own. `mlp` and `weighted` add a learned position within the cell to each
token first (Native Sparse Attention, arXiv 2502.11089, 3.3.1).
"""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.diagnostics import Applicability
from spdsl.ir.pattern import Compress, Grid, Query, Stream, Values, Weight
from spdsl.primitives.pools import POOLS
from spdsl.primitives.query_cells import of_queries
from spdsl.primitives.word import Cells, Kind, Parameter, Scope, Word


def compress(
    scope: Scope, width: int, stride: int | None, before: int, partial: str, of: Stream | Query | None, by: Cells
) -> Stream | Query | None:
    source = of or scope.main_stream()
    if isinstance(source, Query):
        return of_queries(scope, source, width, stride, before, partial, by)
    if source.compress is not None:
        scope.refuse("E105", "entries made of entries are not built yet", "compress a stream of tokens")
        return None
    if before >= width:
        scope.refuse(
            "E203",
            f"a cell of {width} tokens that begins {before} before its place does not reach it",
            scope.instead("before", before, width - 1, Applicability.MAYBE),
        )
        return None
    step = stride or width
    if step > width:
        scope.refuse(
            "E203",
            f"a cell of {width} tokens every {step} leaves tokens out",
            scope.instead("stride", step, width, Applicability.MAYBE),
        )
        return None
    if by.logits is not None and not _one_logit_each(scope, source, scope.stream(by.logits)):
        return None
    grid = Grid(width, step, before, partial == "keep" and width > 1)
    made = Stream(
        scope.name, source.heads, source.qk, source.v, source.value,
        grid=grid, compress=Compress(source.name, by.by, by.logits), span=scope.span,
    )  # fmt: skip
    scope.add(made)
    for weight in weights(made):
        scope.add(weight)
    return made


def _one_logit_each(scope: Scope, source: Stream, logits: Stream) -> bool:
    """Whether the keys of `logits` can have one logit for each number of the source."""
    if logits.compress is not None:
        scope.refuse("E105", "logits made of entries are not built yet", "use a stream of tokens")
        return False
    heads, own = logits.heads or scope.kv_heads, source.heads or scope.kv_heads
    if heads != own or logits.qk != source.qk:
        hint = f"declare `{logits.name}` with the `heads` and `qk` of `{source.name}`"
        scope.refuse("E201", f"`{logits.name}` has another shape than `{source.name}`", hint)
        return False
    return True


def weights(entries: Stream) -> Iterator[Weight]:
    """What is learned, for K and then for V; axes [heads, width, dim, ...] as in the pool."""
    assert entries.compress is not None
    for side, dim in (("k", "qk"), ("v", "v")) if entries.value is Values.OWN else (("k", "qk"),):
        sizes: dict[str, str | int] = {"width": entries.grid.width, "dim": dim}
        for role, axes in POOLS[entries.compress.by].weights:
            shape = tuple(sizes.get(axis, axis) for axis in axes)
            yield Weight(f"{entries.name}_{side}_{role}", entries.name, shape, entries.span)


_BY = tuple(name for name, pool in POOLS.items() if not pool.weighs and pool.named)

WORD = Word(
    "compress",
    Kind.STREAM,
    (
        Parameter("width", Kind.SIZE, least=1),
        Parameter("stride", Kind.SIZE, default=None, least=1),
        Parameter("before", Kind.SIZE, default=0, least=0),
        Parameter("partial", Kind.CHOICE, default="drop", words=("drop", "keep")),
        Parameter("of", Kind.VECTORS, default=None),
        Parameter("by", Kind.CELLS, default=Cells("mean"), words=_BY),
    ),
    compress,
    "entries made of cells of `width` tokens, one every `stride` tokens",
    "pattern p { causal return attend(compress(8, 4, before = 4, by = weighted)) }",
)
