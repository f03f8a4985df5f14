"""Work counted in steps instead of seconds, so that a source ends at the same place on every machine.

Whatever repeats, enumerates or grows says how much it is about to do. A step is about 10 microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class TooMuch(Exception):
    """More work than `at_most` allows."""


class Budget:
    """Steps that are left. What several parts of the work share is given to each of them."""

    def __init__(self, steps: int) -> None:
        self.steps = self.left = steps
        self.place: object = None  # what was worked on last


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextmanager
def at_most(steps: int | Budget) -> Iterator[Budget]:
    """What is done within raises TooMuch after so many steps; it costs the budget around it nothing."""
    own = steps if isinstance(steps, Budget) else Budget(steps)
    before = _budget.set(own)
    try:
        yield own
    finally:
        _budget.reset(before)


def working_on(place: object) -> None:
    """Notes what the next steps are for: what a diagnostic points to if they are too many."""
    budget = _budget.get()
    if budget is not None:
        budget.place = place


def spend(steps: int) -> None:
    """Raises TooMuch if that is more than is left. Without a budget work is free."""
    budget = _budget.get()
    if budget is not None:
        budget.left -= steps
        if budget.left < 0:
            raise TooMuch
