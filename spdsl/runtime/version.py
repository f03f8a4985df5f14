"""The version of the library that generated modules are made for."""

from __future__ import annotations

RUNTIME = 4  # one more with every change of a name, an argument or a meaning that modules rely on
