"""results: the tensors of what a function of a module returns."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def tensors(result: object) -> Iterator[Tensor]:
    """Of a result, or of several, in order; None where there is nothing."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from tensors(part)
