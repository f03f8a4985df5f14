"""Which names a source may bind. Bindings become arguments of Python functions, patterns become files."""

from __future__ import annotations

import keyword
import sys
from typing import Literal

from spdsl.limits import NAME_LENGTH

Role = Literal["binding", "pattern"]

# The arguments that every module has, the positions inside `where`, and a word that is not built yet.
_TAKEN = frozenset({"q", "k", "v", "h", "tokens"})
# What the module named like the pattern imports, or its example calls.
_TAKEN_BY_MODULES = _TAKEN | {"out", "cache", "self", "tl", "triton", "torch"}

# Written out: `keyword.softkwlist` differs between releases of Python, and the language must not.
_SOFT_KEYWORDS = frozenset({"match", "case", "type", "_"})

_PORTS = "0123456789"
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"com{n}" for n in _PORTS), *(f"lpt{n}" for n in _PORTS)})


def refusal(name: str, role: Role) -> str | None:
    """Why `name` cannot be bound in this role, as the end of a sentence, or None if it can."""
    if len(name) > NAME_LENGTH:
        return f"a name has at most {NAME_LENGTH} characters, this one has {len(name)}"
    if keyword.iskeyword(name) or name in _SOFT_KEYWORDS:
        return "it is a keyword of Python, and names become arguments of a Python function"
    if name.startswith("__") or name.endswith("__"):
        return "names with two underscores at either end are Python's own"
    if name in (_TAKEN if role == "binding" else _TAKEN_BY_MODULES):
        return "the generated module uses it itself"
    return _file_refusal(name) if role == "pattern" else None


def _file_refusal(name: str) -> str | None:
    if name.lower() in _DEVICES:
        return f"the pattern becomes the file `{name}.py`, and Windows reserves that name for a device"
    if name in sys.stdlib_module_names:
        return f"the pattern becomes the file `{name}.py`, which would hide the module `{name}` of Python"
    return None
