"""`spdsl tune`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.cli.inputs import Failed
from spdsl.cli.options import GPU, KNOWN, LENGTHS, size_option
from spdsl.cli.output import is_ours

if TYPE_CHECKING:
    from spdsl.targets import Target

_EPILOG = """Exit codes: 0 the winners are written, 2 the command cannot be carried out.

\b
Example: spdsl tune build/nsa.py --length 4k..64k --offline --target h200"""


@click.command("tune", short_help="Finds fast configurations of a compiled module.", epilog=_EPILOG)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--length", "lengths", type=LENGTHS, required=True, metavar="TOKENS",
    help="8k, or 8k,64k, or 4k..64k, which is 4k, doubled up to 64k.",
)  # fmt: skip
@click.option(
    "--phase", "phases", multiple=True, type=click.Choice(["train", "prefill", "decode"]), help="By default all."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences.")
@size_option("heads", "Query heads", 8)
@size_option("kv-heads", "Key heads", 2)
@size_option("dim", "Head dim", 64)
@click.option(
    "--page", type=click.IntRange(0), default=64, show_default=True, metavar="N", help="Tokens of a page; 0: none."
)
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--offline", is_flag=True, help="Without a GPU: ranks with the model alone, for --target.")
@click.option("--target", type=GPU, metavar="NAME", help=f"The GPU of --offline: {KNOWN}.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="JSON",
    help="Where to keep them.  [default: FILE with .tuned.json for .py]",
)  # fmt: skip
def tune_module(
    file: Path,
    lengths: tuple[int, ...],
    phases: tuple[str, ...],
    batch: int,
    heads: int | None,
    kv_heads: int | None,
    dim: int | None,
    page: int,
    dtype: str,
    form: str,
    offline: bool,
    target: Target | None,
    output: Path | None,
) -> None:
    """Finds the fastest configurations of a generated FILE for some lengths, and keeps them beside it.

    nsa.py gets nsa.tuned.json, which the module reads by itself.

    FILE is run as `python FILE` would run it. Its inputs are random, in the shapes that the pattern leaves open.
    """
    if offline != (target is not None):
        raise click.UsageError("--offline and --target NAME belong together: the GPU to rank for")
    if not is_ours(file):
        raise Failed(f"{file} was not made by spdsl")
    from rich.console import Console

    from spdsl.machine.tune import Sizes, rank_file, rows, table, tune_file

    store = output or file.with_name(f"{file.stem}.tuned.json")
    sizes = Sizes(batch, heads, kv_heads, dim, page or None, dtype)
    try:
        if target is not None:
            winners = rank_file(file, lengths, phases, sizes, store, target)
        else:
            winners = tune_file(file, lengths, phases, sizes, store)
    except (RuntimeError, ValueError, ImportError) as error:
        raise Failed(str(error)) from None
    if form == "json":
        click.echo(json.dumps(rows(winners), indent=2))
    else:
        Console(highlight=False).print(table(winners))
    click.echo(store.as_posix(), err=form == "json")
