"""row_tests: tests over positions of queries as tests over the rows that a kernel has.

A row of a query of cells stands at the number of its cell. It sees what the last query of the cell sees; in a cell that
the call holds in part that is the last query of the call, behind which there is no key.

>>> from spdsl.ir.symbols import K
>>> of_row(8 * K + 7 <= Q, 16)
8*k + 7 <= 16*q + 15
"""

from __future__ import annotations

from dataclasses import replace

from spdsl.ir.pattern import Softmax
from spdsl.ir.symbols import Boolean, Q


def of_rows(softmax: Softmax) -> Softmax:
    """The softmax with tests over the numbers of its rows."""
    if softmax.rows == 1:
        return softmax
    terms = tuple(replace(term, test=of_row(term.test, softmax.rows)) for term in softmax.terms)
    return replace(softmax, terms=terms)


def of_row(test: Boolean, rows: int) -> Boolean:
    """A test where `q` counts rows of so many queries each."""
    return test if rows == 1 else test.xreplace({Q: rows * Q + rows - 1})
