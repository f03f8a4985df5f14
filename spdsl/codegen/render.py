"""render: the context as the text of one module, formatted."""

from __future__ import annotations

import hashlib
import re
import subprocess
import textwrap
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ruff.__main__ import find_ruff_bin  # type: ignore[import-untyped]

from spdsl.codegen.argument_lines import argument_lines
from spdsl.codegen.module_text import ModuleText
from spdsl.codegen.prune import prune
from spdsl.codegen.softmax_text import SoftmaxText
from spdsl.codegen.spelled import FUNCTIONS, spelled
from spdsl.codegen.spelling import camel
from spdsl.diagnostics import Source
from spdsl.resources import folder
from spdsl.runtime.version import RUNTIME
from spdsl.version import __version__

LINE = 120
PUBLIC = FUNCTIONS | {"Cache", "example_inputs", "tune", "tuning", "use_tables", "__getattr__"}


@dataclass(frozen=True, slots=True)
class GeneratedModule:
    """A module as text. `digest`: SHA-256 of its source, exact parameters and this compiler."""

    name: str
    text: str
    digest: str


def render(module: ModuleText, source: Source, pattern_text: str) -> GeneratedModule:
    """The text of a module; the same input gives the same text."""
    source_digest = hashlib.sha256(source.text.encode()).hexdigest()
    params = {name: _number(value) for name, value in module.pattern.params}
    exact = {name: str(value) for name, value in module.pattern.params}
    key = repr((__version__, module.pattern.name, pattern_text, exact))
    digest = hashlib.sha256(key.encode()).hexdigest()
    environment = _environment()
    file = re.sub(r"[^\w.\- ]", "_", source.path.replace("\\", "/").rsplit("/", 1)[-1])
    shared = {"m": module, "file": file, "argument_lines": argument_lines(module)}

    def part(name: str, s: SoftmaxText | None = None, **context: object) -> str:
        pieces = {"s": s, **_pieces(s)} if s is not None else {}
        return environment.get_template(name).render(**shared, **pieces, **context).strip("\n")

    text = environment.get_template("module.py.jinja").render(
        **shared, render=part, version=__version__, runtime=RUNTIME, needs="spdsl",
        source_digest=source_digest, digest=digest, params=params, phases=tuple(module.phases),
        title=_title(module), pattern_text=textwrap.indent(_harmless(pattern_text), "    "),
    )  # fmt: skip
    return GeneratedModule(module.pattern.name, formatted(spelled(prune(text, PUBLIC), module)), digest)


@cache
def _environment() -> Environment:
    """Templates come from our own folder only; what they print are numbers and checked names, never user text.

    One for the process: parsing the templates takes longer than all else. Nothing in it changes after it is made, and
    Jinja guards its cache of templates with a lock, so threads may share it.
    """
    environment = Environment(  # noqa: S701 (prints Python, not HTML)
        loader=FileSystemLoader(folder("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        cache_size=-1,
    )
    environment.filters["camel"] = camel
    return environment


def _pieces(s: SoftmaxText) -> dict[str, object]:
    """Pieces of text that several templates of a softmax share."""
    return {
        "cells": s.cells,
        "corners": f"rt.entry_corners(q, layout, {s.cells})" if s.cells else "rt.corners(q, layout)",
        "t": ", t" if s.reads else "",
        "reads_class": s.reads_class,
        "sink_parameter": f"{s.sink}: Tensor, " if s.sink else "",
        "scale": f"tl.constexpr({s.scale})" if s.scale else "rt.scale_of(q, layout)",
        "softcap": s.softcap or None,
    }


def _title(module: ModuleText) -> str:
    comment = " ".join(_harmless(module.pattern.comment).split())
    return textwrap.fill(comment, LINE - 4) or f"Attention as the pattern {module.pattern.name} says."


def _harmless(text: str) -> str:
    """User text inside a docstring: nothing in it can end the string or escape a character."""
    return text.replace("\\", "/").replace('"""', "'''").strip().rstrip('"')


def _number(value: object) -> int | float:
    number = float(value)  # type: ignore[arg-type]
    return int(number) if number.is_integer() else number


def formatted(text: str) -> str:
    """The text without unused imports, as `ruff format` leaves it.

    RuntimeError if it is no Python: a template's mistake.
    """
    own = 'lint.isort.known-first-party = ["spdsl"]'  # wherever the command runs, not only beside a folder spdsl
    fixed = _ruff(text, "check", "--select", "F401,I", "--config", own, "--fix", "--exit-zero", "--quiet")
    return _ruff(fixed, "format", "--config", "format.skip-magic-trailing-comma=true")


def _ruff(text: str, *command: str) -> str:
    line = ["--isolated", "--line-length", str(LINE), "--target-version", "py311", "-"]
    done = subprocess.run([find_ruff_bin(), *command, *line], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the templates printed no valid Python:\n{done.stderr}")
    return done.stdout
