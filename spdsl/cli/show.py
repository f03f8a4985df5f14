"""`spdsl show`"""

from __future__ import annotations

import click

from spdsl.cli.inputs import diagnostics_end_it, parameters, read_source
from spdsl.cli.options import LENGTH, Definitions, parameter_option, pattern_option, source_file

_EPILOG = """Exit codes: 0 all is drawn, 1 the source has errors, 2 the command cannot be carried out.

\b
Example: spdsl show patterns/streaming_llm.spat --length 2k -o mask.png"""


@click.command(short_help="Draws which keys each query sees.", epilog=_EPILOG)
@source_file
@pattern_option
@parameter_option
@click.option(
    "--length", type=LENGTH, metavar="TOKENS",
    help="Keys, and queries, such as 2k. By default that of `expect` up to 8k, "
    "else the shortest of 256, 512, ..., 8k at which half of the pairs are hidden.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="A .png to write instead of the terminal.")
def show(file: str, pattern: str | None, definitions: Definitions, length: int | None, output: str | None) -> None:
    """Draws which keys each query sees. `-` as FILE is standard input."""
    with diagnostics_end_it():
        source = read_source(file)
        from spdsl.picture import show as draw

        draw(source, pattern, parameters(definitions), length, output)
