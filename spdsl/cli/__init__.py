"""The command `spdsl`: calibrate, check, compile, cost, diagnose, explain, show, tune.

Exit codes: 0 all is well, 1 the source has diagnostics, 2 the command cannot be carried out.
What a command needs is imported inside it, so that `explain` and `--help` answer at once.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import click

from spdsl.cli.calibrate import calibrate
from spdsl.cli.check import check
from spdsl.cli.compile import compile_file
from spdsl.cli.cost import cost
from spdsl.cli.diagnose import diagnose
from spdsl.cli.explain import explain_code
from spdsl.cli.options import KNOWN
from spdsl.cli.show import show
from spdsl.cli.tune import tune_module
from spdsl.diagnostics import did_you_mean


def _print_version(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    try:
        click.echo(f"spdsl {version('spdsl')}")
    except PackageNotFoundError:
        click.echo("spdsl (not installed: run from a checkout)")
    context.exit()


class _Commands(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A word that is near to a command is told with it."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = did_you_mean(args[0], self.commands)
            if near is None or near.text in error.message:
                raise
            raise click.UsageError(f"{error.message} {near.text[0].upper()}{near.text[1:]}", ctx) from None


_EPILOG = """\b
First steps, from a checkout:
  spdsl show patterns/streaming_llm.spat      # which keys a query sees
  spdsl check patterns/streaming_llm.spat     # what is wrong with it
  spdsl cost patterns/streaming_llm.spat      # how long it takes on a GPU
  spdsl compile patterns/streaming_llm.spat   # the Python module

\b
`spdsl COMMAND --help` tells the options of a command.
GPUs: {known}."""


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    epilog=_EPILOG.format(known=KNOWN),
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Version.")
@click.pass_context
def main(context: click.Context) -> None:
    """Compiles sparse attention patterns (.spat) into modules with Triton kernels."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(compile_file)
main.add_command(check)
main.add_command(explain_code)
main.add_command(show)
main.add_command(tune_module)
main.add_command(cost)
main.add_command(diagnose)
main.add_command(calibrate)
