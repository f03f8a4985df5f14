"""`spdsl show`"""

from __future__ import annotations

import click

from spdsl.cli.inputs import (
    Definitions,
    diagnostics_end_it,
    parameter_option,
    parameters,
    pattern_option,
    read_source,
    source_file,
)


@click.command()
@source_file
@pattern_option
@parameter_option
@click.option("--length", type=click.IntRange(1, 2**20), required=True, help="Number of keys, and of queries.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="A .png to write instead of the terminal.")
def show(file: str, pattern: str | None, definitions: Definitions, length: int, output: str | None) -> None:
    """Draws which keys each query sees."""
    with diagnostics_end_it():
        source = read_source(file)
        from spdsl.picture import show as draw

        draw(source, pattern, parameters(definitions), length, output)
