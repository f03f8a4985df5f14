"""`spdsl calibrate`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdsl.cli.drawing import drawing
from spdsl.cli.inputs import Failed, diagnostics_end_it, parameters, read_source
from spdsl.cli.options import LENGTHS, Definitions, Read, parameter_option, pattern_option, source_file

if TYPE_CHECKING:
    from spdsl.calibration import Calibration, Curve
    from spdsl.calibration.counted import Part
    from spdsl.calibration.margins import Rule

_EPILOG = """Exit codes: 0 the scales are told, 1 the source has errors, 2 the command cannot be carried out.

\b
Example: spdsl calibrate patterns/blasst.spat --data qkv.safetensors --sparsity 0.5,0.7"""


def shares(text: str) -> tuple[float, ...]:
    """Numbers between 0 and 1. Raises ValueError."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"`{text}` is not of the form 0.5,0.7") from None
    if not all(0 < share < 1 for share in found):
        raise ValueError(f"`{text}`: expected numbers between 0 and 1")
    return found


@click.command(short_help="Finds the levels of a threshold skip on real queries and keys.", epilog=_EPILOG)
@source_file
@click.option(
    "--data", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE",
    help="Safetensors: q and k, or layers.0.q, ...",
)  # fmt: skip
@click.option("--sparsity", "wanted", type=Read("shares", shares), required=True, metavar="0.5,..", help="Wanted.")
@pattern_option
@parameter_option
@click.option("--phase", type=click.Choice(["prefill", "decode"]), default="prefill", show_default=True)
@click.option(
    "--length", "lengths", type=LENGTHS, metavar="TOKENS",
    help="First tokens of the data, as 1k..8k.  [default: all, half, a quarter]",
)  # fmt: skip
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="PNG", help="The curves.")
def calibrate(
    file: str,
    data: Path,
    wanted: tuple[float, ...],
    pattern: str | None,
    definitions: Definitions,
    phase: str,
    lengths: tuple[int, ...] | None,
    form: str,
    output: Path | None,
) -> None:
    """Fits level x length = a exp(b sparsity) for `skip = below(level, ..)`: what to divide by the length so that the
    wanted share of tiles is left out. Prefill and decode are fitted apart.
    """
    if output is not None and output.suffix.lower() != ".png":
        raise Failed(f"{output}: the picture is a PNG, name it .png")
    with diagnostics_end_it():
        source = read_source(file)
        from spdsl import compiler
        from spdsl.calibration.counted import rule_of
        from spdsl.calibration.fit import calibrated

        meant = compiler.pattern_of(source, pattern, parameters(definitions))
        try:
            rule = rule_of(meant, phase)
            curves = _curves(rule, phase, _parts(rule, phase, data, lengths))
            found = calibrated(curves, wanted)
        except OSError as error:
            raise Failed(f"cannot read {error.filename or data}: {error.strerror or error}") from None
        except ValueError as error:
            raise Failed(str(error)) from None
    told = _told(found, curves, wanted, meant.name, phase)
    if form == "json":
        click.echo(json.dumps(told, indent=2))
    else:
        _print(told)
    if output is not None:
        _save(found, curves, output, f"{meant.name}, {phase}", form == "json")


def _parts(rule: Rule, phase: str, data: Path, lengths: tuple[int, ...] | None) -> list[Part]:
    from spdsl.calibration.counted import lengths_of, part
    from spdsl.diagnosis.arguments import vector
    from spdsl.diagnosis.data import File, Layer, layers_of, listed

    file, parts = File(data), []
    for number in layers_of(file):
        layer = Layer(file, number)
        for name in ("q", "k"):
            if name not in layer:
                raise ValueError(f"{name}: the data holds none, it holds {listed(file)}")
        q, k = vector("q", layer["q"]), vector("k", layer["k"])
        parts += [part(phase, q, k, length) for length in lengths_of(rule, q, k, lengths)]
    return parts


def _curves(rule: Rule, phase: str, parts: list[Part]) -> list[Curve]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from spdsl.calibration.counted import curves

    console, found = Console(stderr=True), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("layers x lengths", total=len(parts))
        for done, curve in curves(rule, phase, parts):
            bar.update(task, completed=done)
            found += [] if curve is None else [curve]
    return found


def _told(found: Calibration, curves: list[Curve], wanted: tuple[float, ...], name: str, phase: str) -> dict[str, Any]:
    scales = [
        {"sparsity": share, "scale": found.scale(share), "reached": found.reached(curves, share)} for share in wanted
    ]
    return {
        "pattern": name, "phase": phase, "log_a": found.log_a, "b": found.b, "error": found.error,
        "most": {curve.length: curve.most for curve in curves}, "scales": scales,
    }  # fmt: skip


def _print(told: dict[str, Any]) -> None:
    from rich.console import Console

    from spdsl.tables import Column, Fitted

    table = Fitted(
        f"{told['pattern']}, {told['phase']}: level = scale / length",
        [Column("sparsity"), Column("scale"), *(Column(f"at {length:,}") for length in told["most"])],
    )
    for row in told["scales"]:
        reached = (f"{100 * share:.1f}%" for share in row["reached"].values())
        table.add_row(f"{row['sparsity']:g}", f"{row['scale']:.6g}", *reached)
    console = Console(highlight=False)
    console.print(table)
    most = ", ".join(f"{100 * share:.1f}% at {length:,}" for length, share in told["most"].items())
    console.print(f"log(level x length) = {told['log_a']:.4g} + {told['b']:.4g} sparsity", soft_wrap=True)
    console.print(f"root mean square error {100 * told['error']:.1f} points; most that a level leaves out: {most}")


def _save(found: Calibration, curves: list[Curve], path: Path, title: str, quiet: bool) -> None:
    with drawing(path, quiet):
        from spdsl.calibration.plot import save

        save(found, curves, path, title)
