"""The command `spdsl`: compile, check, explain, show, tune.

Exit codes: 0 all is well, 1 the source has diagnostics, 2 the command cannot be carried out.
What a command needs is imported inside it, so that `explain` and `--help` answer at once.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import click

from spdsl.cli.check import check
from spdsl.cli.compile import compile_file
from spdsl.cli.cost import cost
from spdsl.cli.explain import explain_code
from spdsl.cli.show import show
from spdsl.cli.tune import tune_module


def _print_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    try:
        click.echo(f"spdsl {version('spdsl')}")
    except PackageNotFoundError:
        click.echo("spdsl (not installed: run from a checkout)")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Version.")
def main() -> None:
    """Compiles sparse attention patterns (.spat) into modules with Triton kernels."""


main.add_command(compile_file)
main.add_command(check)
main.add_command(explain_code)
main.add_command(show)
main.add_command(tune_module)
main.add_command(cost)
