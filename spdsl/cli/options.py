"""The options that commands share, and what their values are."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from spdsl.cli import numbers
from spdsl.targets import USUAL, Target, find, names

Value = TypeVar("Value")
Definitions = tuple[tuple[str, Fraction], ...]

if TYPE_CHECKING:

    class _ParamType(click.ParamType[Value], Generic[Value]):
        pass
else:

    class _ParamType(click.ParamType, Generic[Value]):  # no generic class before click 8.4
        pass


class Read(_ParamType[Value]):
    """What `read` makes of a text; its ValueError becomes a message that names the option."""

    def __init__(self, name: str, read: Callable[[str], Value]) -> None:
        self.name, self.read = name, read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Value:
        if not isinstance(value, str):  # a default, or converted already
            converted: Value = value
            return converted
        try:
            return self.read(value)
        except ValueError as reason:
            self.fail(str(reason), param, ctx)


def definition(text: str) -> tuple[str, Fraction]:
    """`name=value` of -D. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise ValueError(f"`{text}` is not of the form name=value")
    return name.strip(), numbers.number(value)


def warning_code(text: str) -> str:
    """The code of a warning. Raises ValueError."""
    from spdsl.catalogue import entries
    from spdsl.diagnostics import did_you_mean

    code = text.upper()
    warnings = [known for known in entries() if known.startswith("W")]
    if code in warnings:
        return code
    if code in entries():
        raise ValueError(f"{text} is an error; only warnings can be allowed")
    near = did_you_mean(code, warnings)
    raise ValueError(f"{text} is no code of a warning{f'; {near.text}' if near else ''}")


LENGTH: Read[int] = Read("tokens", numbers.tokens)
LENGTHS: Read[tuple[int, ...]] = Read("tokens", numbers.lengths)
GPU: Read[Target] = Read("gpu", find)
KNOWN = ", ".join(names())
_SOURCE = click.Path(exists=True, dir_okay=False, allow_dash=True)

source_file = click.argument("file", type=_SOURCE)
source_files = click.argument("files", type=_SOURCE, nargs=-1, required=True, metavar="FILE...")
pattern_option = click.option("-p", "--pattern", metavar="NAME", help="Only this pattern.")
parameter_option = click.option(
    "-D", "--define", "definitions", type=Read("name=value", definition), multiple=True,
    help="Overrides a `param` of the patterns that have it, as window=3k.",
)  # fmt: skip
allow_option = click.option(
    "--allow", "allowed", type=Read("code", warning_code), multiple=True, metavar="CODE",
    help="A warning that is not told, such as W501.",
)  # fmt: skip
output_folder = click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("."), show_default=True,
    metavar="DIR", help="Folder of the modules.",
)  # fmt: skip


def target_option(meaning: str, usual: bool = False) -> Callable[[Any], Any]:
    """--target, once for each GPU. `usual`: one is taken where none is named."""
    default = f"  [default: {USUAL}]" if usual else ""
    return click.option(
        "--target", "targets", type=GPU, multiple=True, metavar="NAME", help=f"{meaning}: {KNOWN}.{default}"
    )


def size_option(name: str, meaning: str, usual: int) -> Callable[[Any], Any]:
    """A size of the calls that a pattern may leave open. `usual` is taken then."""
    return click.option(
        f"--{name}", type=click.IntRange(1), metavar="N",
        help=f"{meaning}, where the pattern does not say.  [default: {usual}]",
    )  # fmt: skip
