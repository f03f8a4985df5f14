"""spelled: the text of a module with a spelling for every name of the pattern."""

from __future__ import annotations

import re
from itertools import accumulate

from spdsl.codegen.module_text import ModuleText
from spdsl.codegen.scopes import Public, chosen_names, scopes
from spdsl.codegen.shadowing import without_shadowing
from spdsl.codegen.spelling import Spelling
from spdsl.codegen.syntax_tree import parsed

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
    text = without_shadowing(given, tree, spelling, public)
    tree = tree if text == given else parsed(text)
    names = chosen_names(scopes(tree, spelling, public), spelling)
    made = frozenset(module.computed) - public.names  # fields of `Inputs` that nobody asks for by name
    starts = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
    outside = [range(starts[node.lineno - 1], starts[node.end_lineno or 0]) for node in tree.body if public.holds(node)]

    def spell(token: re.Match[str]) -> str:
        if token["prose"]:
            return spelling.written(
                re.sub(r"\w+", lambda word: spelling.spelled(word[0], names) if word[0] in made else word[0], token[0])
            )
        kept = token["name"] in public.names and (token["field"] or any(token.start() in part for part in outside))
        return spelling.written(token[0]) if kept else spelling.spelled(token[0], names)

    return _TOKEN.sub(lambda token: spell(token) if spelling.found.search(token[0]) else token[0], text)


def _with_operators(text: str, spelling: Spelling) -> str:
    """With names for operators: those of the pattern, but where two would be registered under one."""
    operators = dict.fromkeys(_OPERATOR.findall(text))
    taken = {*_OF_LIBRARY, *(name for base in operators if not spelling.marks(base) for name in _registered(base))}
    bases: dict[str, str] = {}
    for mark in filter(spelling.marks, operators):
        base, again = spelling.written(mark), 0
        while not taken.isdisjoint(_registered(base)):
            again += 1
            base = f"{spelling.written(mark)}_{again}"
        taken.update(_registered(base))
        bases[mark] = base
    return _OPERATOR.sub(lambda operator: f'MODULE, "{bases.get(operator[1], operator[1])}"', text)


def _registered(base: str) -> set[str]:
    return {f"{base}_{what}" for what in ("forward", "backward", "choose")}
