"""`spdsl cost`"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdsl.cli.counting import counting
from spdsl.cli.formulas import print_formulas, varied_by
from spdsl.cli.inputs import (
    Definitions,
    Failed,
    diagnostics_end_it,
    parameter_option,
    parameters,
    pattern_names,
    pattern_option,
    read_source,
    source_file,
)

if TYPE_CHECKING:
    from spdsl.cost.estimate import Curve
    from spdsl.cost.kernels import Options
    from spdsl.cost.phases import Stage
    from spdsl.ir.plan import Plan
    from spdsl.passes.count import Shape
    from spdsl.targets import Target

_STAGES = ["forward", "backward", "prefill", "decode"]
_WIDTH = 160  # columns where the output is no terminal
_MOST = 1 << 22

if TYPE_CHECKING:
    _ParamType = click.ParamType[tuple[int, int]]
else:
    _ParamType = click.ParamType


class _Lengths(_ParamType):
    """`64k`, or `4k..1M`: k and M are 1024 and 1024 * 1024."""

    name = "length"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        first, _, last = str(value).partition("..")
        found = [self._number(text, param, ctx) for text in (first, last or first)]
        if not 1 <= found[0] <= found[1] <= _MOST:
            self.fail(f"`{value}`: lengths rise, from 1 to 4M", param, ctx)
        return found[0], found[1]

    def _number(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        scale = {"k": 1024, "m": 1024 * 1024}.get(text.strip()[-1:].lower(), 1)
        digits = text.strip().rstrip("kKmM")
        if not digits.isdecimal():
            self.fail(f"`{text}` is no length: write 4096, 4k or 1M", param, ctx)
        return int(digits) * scale


@click.command()
@source_file
@pattern_option
@parameter_option
@click.option("--target", "targets", multiple=True, metavar="NAME", help="A GPU such as h200; h100 by default.")
@click.option("--length", type=_Lengths(), default="4k..1M", show_default=True, help="Tokens, or a range of them.")
@click.option("--phase", "phases", multiple=True, type=click.Choice(_STAGES), help="Only this phase.")
@click.option("--batch", type=click.IntRange(1), help="Sequences.")
@click.option("--heads", type=click.IntRange(1), help="Query heads, where the pattern leaves them open.")
@click.option("--kv-heads", type=click.IntRange(1), help="Key heads, where the pattern leaves them open.")
@click.option("--dim", type=click.IntRange(1), help="Head dim, where the pattern leaves it open.")
@click.option("--density", type=click.FloatRange(0, 1), default=1.0, help="Share of pairs where tensors decide.")
@click.option("--overlap", type=click.FloatRange(0, 1), default=0.0, help="How alike neighbours choose: 0 to 1.")
@click.option("--kernels", "in_detail", is_flag=True, help="Also the kernels of the longest call.")
@click.option("--formulas", is_flag=True, help="The counts of each kernel as formulas of the length instead.")
@click.option("--of", "varied", metavar="NAME", help="With --formulas: also of this parameter of the pattern.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", help="How it is printed.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="A .png to draw the times into.")
@click.option("--measure", is_flag=True, help="On a GPU: measured times beside these.")
def cost(
    file: str,
    pattern: str | None,
    definitions: Definitions,
    targets: tuple[str, ...],
    length: tuple[int, int],
    phases: tuple[str, ...],
    batch: int | None,
    heads: int | None,
    kv_heads: int | None,
    dim: int | None,
    density: float,
    overlap: float,
    in_detail: bool,
    formulas: bool,
    varied: str | None,
    form: str,
    plot: Path | None,
    measure: bool,
) -> None:
    """What the patterns of FILE cost on a GPU beside dense attention, and from which length they are faster."""
    with diagnostics_end_it():
        source = read_source(file)
        names = pattern_names(source, pattern)
        from spdsl.compiler import plan_of

        plans = [plan_of(source, name, parameters(definitions)) for name in names]
    if varied is not None and not formulas:
        raise click.UsageError("--of names what --formulas is about: give both")
    if plot is not None and (len(plans) > 1 or len(targets) > 1):
        raise click.UsageError("--plot draws one pattern on one GPU: name them with -p and --target")
    from spdsl.cost.kernels import Options

    found = _targets(targets)
    options = Options(density, overlap)
    documents = []
    for plan in plans:
        shape = _shape(plan, batch, heads, kv_heads, dim)
        stages = _stages(plan, phases)
        if formulas:
            of = None if varied is None else varied_by(source, plan, parameters(definitions), varied)
            print_formulas(plan, stages, shape, found[0], options, of)
            continue
        curves = _curves(plan, stages, length, shape, found, options)
        if form == "json":
            documents.append(_document(plan, curves))
        else:
            _print(plan, curves, in_detail)
        if plot is not None:
            _plot(plan, curves, plot)
        if measure:
            _measure(file, plan, parameters(definitions), curves, form)
    if form == "json" and documents:
        click.echo(json.dumps(documents, indent=1))


def _targets(names: Sequence[str]) -> list[Target]:
    from spdsl.targets import USUAL, find

    try:
        return [find(name) for name in names or (USUAL,)]
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _stages(plan: Plan, wanted: Sequence[str]) -> list[Stage]:
    from spdsl.cost.phases import stages

    known = stages(plan)
    missing = [name for name in wanted if name not in {one.value for one in known}]
    if missing:
        raise click.UsageError(f"{plan.pattern.name} has no {missing[0]}")
    return [one for one in known if not wanted or one.value in wanted]


def _shape(plan: Plan, batch: int | None, heads: int | None, kv_heads: int | None, dim: int | None) -> Shape:
    from spdsl.passes.count import Shape, shape_of

    usual = Shape()
    own = heads or usual.heads
    open_kv = kv_heads or (min(own, usual.kv_heads) if own % usual.kv_heads == 0 else own)
    given = Shape(batch or plan.pattern.expected.batch, own, open_kv, dim or usual.qk, dim or usual.v, usual.size)
    shape = shape_of(plan.pattern, given)
    if shape.heads % shape.kv_heads:
        raise click.UsageError(f"{shape.heads} query heads are no multiple of {shape.kv_heads} key heads")
    return shape


def _curves(
    plan: Plan,
    stages: Sequence[Stage],
    length: tuple[int, int],
    shape: Shape,
    targets: Sequence[Target],
    options: Options,
) -> list[Curve]:
    from spdsl.cost.estimate import curve, doubling

    with counting(plan.pattern.name):
        lengths = doubling(*length)
        return [curve(plan, stage, lengths, shape, target, options) for target in targets for stage in stages]


def _print(plan: Plan, curves: Sequence[Curve], in_detail: bool) -> None:
    from rich.console import Console

    from spdsl.cost.report import crossing, detail, notes, table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=_WIDTH, highlight=False)
    console.print(plan.pattern.name, style="bold")
    for found in curves:
        console.print(table(found))
        if in_detail:
            console.print(detail(found.points[-1], found.target, found.shape.size))
    for found in curves:
        console.print(f"{found.target.name}, {crossing(found)}")
    for line in dict.fromkeys(line for found in curves for line in notes(found.target)):
        console.print(line)


def _document(plan: Plan, curves: Sequence[Curve]) -> dict[str, Any]:
    from spdsl.cost.report import document

    return document(plan.pattern.name, curves)


def _plot(plan: Plan, curves: Sequence[Curve], path: Path) -> None:
    try:
        from spdsl.cost.plot import save
    except ImportError:
        raise Failed("--plot needs matplotlib: pip install 'spdsl[pictures]'") from None
    try:
        save(plan.pattern.name, curves, path)
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror or error}") from None


def _measure(file: str, plan: Plan, params: dict[str, Fraction], curves: Sequence[Curve], form: str) -> None:
    from spdsl.api import load
    from spdsl.runtime.measure import NoGpu, measured

    name = plan.pattern.name
    try:
        click.echo(
            measured(lambda: load(file, name, **{key: float(value) for key, value in params.items()}), curves, form)
        )
    except NoGpu as error:
        raise Failed(str(error)) from None
