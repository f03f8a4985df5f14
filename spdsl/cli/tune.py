"""`spdsl tune`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdsl.cli.inputs import Failed, Length
from spdsl.cli.output import is_ours

if TYPE_CHECKING:
    from spdsl.targets import Target

    _LengthsType = click.ParamType[list[int]]
else:
    _LengthsType = click.ParamType  # no generic class before click 8.4


_FILE_WIDTH = 140  # columns of a table that does not go to a terminal: no cell wraps


class Lengths(_LengthsType):
    """`4k..64k`: 4k, doubled as long as it is not above 64k; or one length."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        first, _, last = str(value).partition("..")
        low, high = (Length().convert(x, param, ctx) for x in (first, last or first))
        if low > high:
            self.fail(f"`{value}` ends before it begins", param, ctx)
        return [low << step for step in range(32) if low << step <= high]


@click.command("tune")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--length", "lengths", type=Lengths(), required=True, metavar="A..B", help="Tokens, such as 4k..64k.")
@click.option(
    "--phase", "phases", multiple=True, type=click.Choice(["train", "prefill", "decode"]), help="By default all."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--heads", type=click.IntRange(1), help="Query heads, where the pattern leaves them open.")
@click.option("--kv-heads", type=click.IntRange(1), help="Key heads, likewise.")
@click.option("--dim", type=click.IntRange(1), help="Head dim, likewise.")
@click.option("--page", type=click.IntRange(0), default=64, show_default=True, help="Tokens of a page; 0: none.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--offline", is_flag=True, help="Without a GPU: ranks with the model alone, for --target.")
@click.option("--target", "target_name", metavar="NAME", help="The GPU of --offline, such as h200.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Another file than that.")
def tune_module(
    file: Path,
    lengths: list[int],
    phases: tuple[str, ...],
    batch: int,
    heads: int | None,
    kv_heads: int | None,
    dim: int | None,
    page: int,
    dtype: str,
    offline: bool,
    target_name: str | None,
    output: Path | None,
) -> None:
    """Finds the fastest configurations of a generated FILE for some lengths, and keeps them beside it.

    nsa.py gets nsa.tuned.json, which the module reads by itself.

    FILE is run as `python FILE` would run it. Its inputs are random, in the shapes that the pattern leaves open.
    """
    if offline != (target_name is not None):
        raise click.UsageError("--offline and --target NAME belong together: the GPU to rank for")
    if not is_ours(file):
        raise Failed(f"{file} was not made by spdsl")
    from rich.console import Console

    from spdsl.runtime.tune import Sizes, rank_file, table, tune_file

    store = output or file.with_name(f"{file.stem}.tuned.json")
    sizes = Sizes(batch, heads, kv_heads, dim, page or None, dtype)
    try:
        if target_name is not None:
            found = rank_file(file, lengths, phases, sizes, store, _target(target_name))
        else:
            found = tune_file(file, lengths, phases, sizes, store)
    except (RuntimeError, ValueError, ImportError) as error:
        raise Failed(str(error)) from None
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(table(found))
    click.echo(store.as_posix())


def _target(name: str) -> Target:
    from spdsl.targets import find

    try:
        return find(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
