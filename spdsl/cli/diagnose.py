"""`spdsl diagnose`"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from spdsl.cli.drawing import drawing
from spdsl.cli.inputs import Failed, diagnostics_end_it, parameters, read_source
from spdsl.cli.options import Definitions, Read, parameter_option, pattern_option, source_file

if TYPE_CHECKING:
    from spdsl.diagnosis import Diagnosis

_EPILOG = """Exit codes: 0 all is told, 1 the source has errors, 2 the command cannot be carried out.

\b
Example: spdsl diagnose patterns/streaming_llm.spat --data qkv.safetensors"""
_TENSORS = click.Path(dir_okay=False, path_type=Path)


def _numbers(text: str) -> tuple[int, ...]:
    """Numbers of layers. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"`{text}` is not of the form 0,1,12")
    return tuple(map(int, parts))


@click.command(short_help="Tells what a pattern leaves out of real attention.", epilog=_EPILOG)
@source_file
@click.option("--data", type=_TENSORS, required=True, metavar="FILE", help="Safetensors: q, k, v, or layers.0.q, ...")
@click.option("--weights", type=_TENSORS, metavar="FILE", help="Safetensors: what the pattern learns, by argument.")
@pattern_option
@parameter_option
@click.option(
    "--phase", type=click.Choice(["train", "prefill", "decode"]), help="By default prefill, if the pattern covers it."
)
@click.option("--layers", type=Read("layers", _numbers), metavar="0,1,..", help="By default all of the data.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what no file gives.")
@click.option("--by", type=click.Choice(["head", "layer"]), help="Rows of the table; by default heads of one layer.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="PNG", help="A heat map.")
def diagnose(
    file: str,
    data: Path,
    weights: Path | None,
    pattern: str | None,
    definitions: Definitions,
    phase: str | None,
    layers: tuple[int, ...] | None,
    seed: int,
    by: str | None,
    form: str,
    output: Path | None,
) -> None:
    """Compares what a pattern reads with dense attention of the same queries, keys and values: mass kept, important
    keys that are missed, error of the output, head by head. `-` as FILE is standard input.
    """
    if output is not None and output.suffix.lower() != ".png":
        raise Failed(f"{output}: the heat map is a PNG, name it .png")
    with diagnostics_end_it():
        source = read_source(file)
        from spdsl.diagnosis.diagnose import Options, diagnosis_of

        try:
            with _bar() as progress:
                options = Options(pattern, phase, layers, seed, progress)
                found = diagnosis_of(source, data, weights, parameters(definitions), options)
        except OSError as error:
            raise Failed(f"cannot read {error.filename or data}: {error.strerror or error}") from None
        except (ValueError, TypeError) as error:
            raise Failed(str(error)) from None
    if form == "json":
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print(found, by)
    if output is not None:
        _save(found, output, form == "json")


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, of rows."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _print(found: Diagnosis, by: str | None) -> None:
    from rich.console import Console
    from rich.text import Text

    from spdsl.diagnosis.heat import heat
    from spdsl.diagnosis.table import tables

    console = Console(highlight=False)
    heading = Text(found.pattern, "bold")
    heading.append("".join(f"  {name} = {value}" for name, value in found.params.items()), "not bold")
    console.print(heading)
    by_layer = by == "layer" or (by is None and len(found.layers) > 1)
    for table in tables(found, by_layer):
        console.print(table)
    heat(console, found)
    for note in found.notes:
        console.print(Text(note, "italic"))


def _save(found: Diagnosis, path: Path, quiet: bool) -> None:
    with drawing(path, quiet):
        from spdsl.diagnosis.plot import save

        save(found, path)
