"""Counting on behalf of the command line: it ends, and what cannot be counted is said in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spdsl.cli.inputs import Failed

_MOST_STEPS = 20_000_000  # some minutes


@contextmanager
def counting(name: str) -> Iterator[None]:
    """Within, the pattern of that name is counted. Raises Failed."""
    from spdsl.budget import TooMuch, at_most
    from spdsl.passes.visible import DependsOnData

    try:
        with at_most(_MOST_STEPS):
            yield
    except TooMuch:
        raise Failed(f"{name}: its sets repeat too seldom to be counted; try shorter lengths") from None
    except DependsOnData:
        raise Failed(f"{name}: only the values of tensors tell which result answers") from None
    except ValueError as error:
        raise Failed(str(error)) from None
