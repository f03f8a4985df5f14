"""head_dims: head dims that the kernels pad, and head dims that the tables do not know.

A head dim is computed in at most two powers of two of at least 16; columns past it are loaded as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

from spdsl.checks.view import View, warning
from spdsl.diagnostics import Applicability, Diagnostic, Hint
from spdsl.ir.pattern import Stream
from spdsl.passes.source_numbers import Written, argument, declared
from spdsl.runtime.tuning.configs import SMALL, TABLES, split_dim, tables_for


def padded(view: View) -> Iterator[Diagnostic]:
    """Head dims with columns of zeros."""
    for name, dim, written in _declared(view):
        parts = [part for part in split_dim(dim) if part]
        whole = sum(parts)
        if whole == dim:
            continue
        below = max((n for n in range(16, dim) if sum(split_dim(n)) == n), default=None)
        near = [whole] if below is None else [whole, below]
        yield warning(
            "W506",
            f"a head dim of {dim} is computed as {' + '.join(map(str, parts))} = {whole}: "
            f"{1 - dim / whole:.1%} of the columns are zeros",
            written.place,
            f"`{name}` is padded",
            hints=tuple(written.hint(f"{n} has no padding", dim, n, Applicability.MAYBE) for n in near),
        )


def untuned(view: View) -> Iterator[Diagnostic]:
    """Head dims beyond the tables of configurations."""
    sizes = tables_for(view.architecture, TABLES)["forward"]
    most = max(dim for dim, size in sizes if size == view.shape.size)
    rows = max(config.block_m for config in sizes.values())
    for name, dim, written in _declared(view):
        if dim > most:
            yield warning(
                "W507",
                f"no configuration is known for a head dim of {dim}: its kernels run in tiles of "
                f"{SMALL.block_m} x {SMALL.block_n}",
                written.place,
                f"`{name}` is above {most}",
                f"each key is loaded once for {SMALL.block_m} queries, in the largest tile of the tables for {rows}",
                hints=(Hint(f"up to {most} the tables have tiles for {view.architecture}"),),
            )


def _declared(view: View) -> Iterator[tuple[str, int, Written]]:
    """Every head dim that the pattern names, once for each place."""
    pattern = view.plan.pattern
    places = [
        ("qk", pattern.qk_dim, declared(view.tree, "dim", "qk")),
        ("v", pattern.v_dim, declared(view.tree, "dim", "v")),
    ]
    for stream in pattern.inputs:
        if isinstance(stream, Stream) and stream.compress is None:
            places += [(name, getattr(stream, name), argument(view.tree, stream.span, name)) for name in ("qk", "v")]
    for name, dim, written in places:
        if dim is not None and written is not None:
            yield name, dim, written
