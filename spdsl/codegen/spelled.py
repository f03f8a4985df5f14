"""spelled: the text of a module with a spelling for every name of the pattern."""

from __future__ import annotations

import re
from itertools import accumulate

from spdsl.codegen.handed import handed
from spdsl.codegen.module_text import ModuleText
from spdsl.codegen.parsed import parsed
from spdsl.codegen.scopes import Public, chosen_names, scopes
from spdsl.codegen.spelling import Spelling

FUNCTIONS = frozenset(
    {"attention", "choices", "reference", "prefill", "decode", "attend_paged", "paged_states", "update_states"}
)
# A string or comment; or a name, with what it is a field of: `inputs`, read or replaced.
_TOKEN = re.compile(
    r'(?P<prose>"""[\s\S]*?"""|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*)'
    r"|(?P<field>\binputs\.(?:_replace\()?)?(?P<name>\b[^\W\d]\w*)"
)
_OPERATOR = re.compile(r'\bMODULE, "(\w+)"')
_OF_LIBRARY = frozenset({"gate_backward", "compress_backward"})  # operators that it names itself


def spelled(text: str, module: ModuleText) -> str:
    """The text of templates, which print marks for names.

    Strings and comments have the pattern's own names, and so have public arguments and the fields of `Inputs`.
    """
    spelling, public = module.spelling, Public(module.public, FUNCTIONS)
    given = _with_operators(text, spelling)
    tree = parsed(given)
    text = handed(given, tree, spelling, public)
    tree = tree if text == given else parsed(text)
    names = chosen_names(scopes(tree, spelling, public), spelling)
    made = frozenset(module.computed) - public.names  # fields of `Inputs` that nobody asks for by name
    starts = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
    outside = [range(starts[node.lineno - 1], starts[node.end_lineno or 0]) for node in tree.body if public.holds(node)]

    def spell(found: re.Match[str]) -> str:
        if found["prose"]:
            return spelling.written(
                re.sub(r"\w+", lambda word: spelling.spelled(word[0], names) if word[0] in made else word[0], found[0])
            )
        kept = found["name"] in public.names and (found["field"] or any(found.start() in part for part in outside))
        return spelling.written(found[0]) if kept else spelling.spelled(found[0], names)

    return _TOKEN.sub(lambda found: spell(found) if spelling.found.search(found[0]) else found[0], text)


def _with_operators(text: str, spelling: Spelling) -> str:
    """With names for operators: those of the pattern, but where two would be registered under one."""
    found = dict.fromkeys(_OPERATOR.findall(text))
    taken = {*_OF_LIBRARY, *(name for base in found if not spelling.marks(base) for name in _registered(base))}
    bases: dict[str, str] = {}
    for mark in filter(spelling.marks, found):
        base, again = spelling.written(mark), 0
        while not taken.isdisjoint(_registered(base)):
            again += 1
            base = f"{spelling.written(mark)}_{again}"
        taken.update(_registered(base))
        bases[mark] = base
    return _OPERATOR.sub(lambda operator: f'MODULE, "{bases.get(operator[1], operator[1])}"', text)


def _registered(base: str) -> set[str]:
    return {f"{base}_{what}" for what in ("forward", "backward", "choose")}
