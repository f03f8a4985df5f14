"""diagnose: what a pattern leaves out of the attention of real queries, keys and values, head by head.

`data` reads the tensors, `arguments` makes a call of them, `piece` is that call for a few rows, `measure` adds up what
the rows say, `record` holds the numbers; `table`, `heat` and `plot` show them.
"""

from __future__ import annotations

from spdsl.diagnosis.diagnose import diagnose
from spdsl.diagnosis.record import Diagnosis

__all__ = ["Diagnosis", "diagnose"]
