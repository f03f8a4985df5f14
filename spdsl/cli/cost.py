"""`spdsl cost`"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spdsl.cli.counting import counting
from spdsl.cli.formulas import print_formulas, varied_by
from spdsl.cli.inputs import STDIN, Failed, Job, diagnostics_end_it, jobs, read_source
from spdsl.cli.options import (
    LENGTHS,
    Definitions,
    parameter_option,
    pattern_option,
    size_option,
    source_file,
    target_option,
)
from spdsl.targets import USUAL, find

if TYPE_CHECKING:
    from spdsl.cost.estimate import Curve
    from spdsl.cost.kernels import Options
    from spdsl.cost.phases import Stage
    from spdsl.ir.plan import Plan
    from spdsl.passes.count import Shape
    from spdsl.targets import Target

_STAGES = ["forward", "backward", "prefill", "decode"]
_MOST = 1 << 22  # tokens
_EPILOG = """Exit codes: 0 all is well, 1 the source has errors, 2 the command cannot be carried out.

\b
Example: spdsl cost patterns/nsa.spat --target h200 --length 8k,64k --phase decode"""


@click.command(short_help="Estimates times on a GPU beside dense attention.", epilog=_EPILOG)
@source_file
@pattern_option
@parameter_option
@target_option("A GPU, or several, each with --target", usual=True)
@click.option(
    "--length", "lengths", type=LENGTHS, default="4k..1M", show_default=True, metavar="TOKENS",
    help="64k, or 8k,64k, or 4k..1M, which is 4k, doubled up to 1M.",
)  # fmt: skip
@click.option("--phase", "phases", multiple=True, type=click.Choice(_STAGES), help="Only this phase; by default all.")
@click.option("--batch", type=click.IntRange(1), metavar="N", help="Sequences.  [default: that of `expect`, or 1]")
@size_option("heads", "Query heads", 8)
@size_option("kv-heads", "Key heads", 2)
@size_option("dim", "Head dim", 128)
@click.option(
    "--density", type=click.FloatRange(0, 1), default=1.0, show_default=True, metavar="SHARE",
    help="Share of pairs that are there, where tensors decide.",
)  # fmt: skip
@click.option(
    "--overlap", type=click.FloatRange(0, 1), default=0.0, show_default=True, metavar="SHARE",
    help="How alike neighbours choose: 0 nothing in common, 1 all.",
)  # fmt: skip
@click.option("--kernels", "in_detail", is_flag=True, help="Also the kernels of the longest call.")
@click.option("--formulas", is_flag=True, help="The counts of each kernel as formulas of the length instead.")
@click.option("--of", "varied", metavar="NAME", help="With --formulas: also of this parameter of the pattern.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="A .png to draw the times into.")
@click.option("--measure", is_flag=True, help="On a GPU: measured times beside these.")
def cost(
    file: str,
    pattern: str | None,
    definitions: Definitions,
    targets: tuple[Target, ...],
    lengths: tuple[int, ...],
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
    """What the patterns of FILE cost on a GPU beside dense attention, and from which length they are faster.

    `-` as FILE is standard input.
    """
    if lengths[-1] > _MOST:
        raise click.BadParameter(f"{lengths[-1]} tokens: costs are told up to 4M", param_hint="'--length'")
    with diagnostics_end_it():
        work = jobs([read_source(file)], pattern, definitions)
        from spdsl.compiler import plan_of

        plans = [plan_of(task.source, task.name, task.params) for task in work]
    if varied is not None and not formulas:
        raise click.UsageError("--of names what --formulas is about: give both")
    if plot is not None and (len(plans) > 1 or len(targets) > 1):
        raise click.UsageError("--plot draws one pattern on one GPU: name them with -p and --target")
    from spdsl.cost.kernels import Options

    gpus = targets or (find(USUAL),)
    options = Options(density, overlap)
    documents = []
    for task, plan in zip(work, plans, strict=True):
        shape = _shape(plan, batch, heads, kv_heads, dim)
        stages = _stages(plan, phases)
        if formulas:
            of = None if varied is None else varied_by(task.source, plan, task.params, varied)
            print_formulas(plan, stages, shape, gpus[0], options, of)
            continue
        curves = _curves(plan, stages, lengths, shape, gpus, options)
        if form == "json":
            documents.append(_document(plan, curves))
        else:
            _print(plan, curves, in_detail)
        if plot is not None:
            _plot(plan, curves, plot)
        if measure:
            _measure(file, task, curves, form)
    if form == "json" and documents:
        click.echo(json.dumps(documents, indent=1))


def _stages(plan: Plan, wanted: Sequence[str]) -> list[Stage]:
    from spdsl.cost.phases import stages

    known = stages(plan)
    missing = [name for name in wanted if name not in {stage.value for stage in known}]
    if missing:
        raise click.UsageError(f"--phase: {plan.pattern.name} has no {missing[0]}")
    return [stage for stage in known if not wanted or stage.value in wanted]


def _shape(plan: Plan, batch: int | None, heads: int | None, kv_heads: int | None, dim: int | None) -> Shape:
    from spdsl.passes.count import Shape, shape_of

    usual = Shape()
    own = heads or usual.heads
    open_kv = kv_heads or (min(own, usual.kv_heads) if own % usual.kv_heads == 0 else own)
    given = Shape(batch or plan.pattern.expected.batch, own, open_kv, dim or usual.qk, dim or usual.v, usual.size)
    shape = shape_of(plan.pattern, given)
    if shape.heads % shape.kv_heads:
        raise click.UsageError(
            f"--heads, --kv-heads: {shape.heads} query heads are no multiple of {shape.kv_heads} key heads"
        )
    return shape


def _curves(
    plan: Plan,
    stages: Sequence[Stage],
    lengths: Sequence[int],
    shape: Shape,
    targets: Sequence[Target],
    options: Options,
) -> list[Curve]:
    from spdsl.cost.estimate import curve

    with counting(plan.pattern.name):
        return [curve(plan, stage, lengths, shape, target, options) for target in targets for stage in stages]


def _print(plan: Plan, curves: Sequence[Curve], in_detail: bool) -> None:
    from rich.console import Console

    from spdsl.cost.report import bounds, crossing, detail, notes, table
    from spdsl.tables import Legend

    console = Console(highlight=False)
    console.print(plan.pattern.name, style="bold")
    printed = []
    for curve in curves:
        printed.append(table(curve))
        if in_detail:
            printed.append(detail(curve.points[-1], curve.target, curve.shape.size))
    console.print(*printed, Legend(printed), sep="\n")
    if told := bounds(curves):
        console.print(told, style="dim")
    for curve in curves:
        console.print(f"{curve.target.name}, {crossing(curve)}")
    for line in dict.fromkeys(line for curve in curves for line in notes(curve.target)):
        console.print(line, style="dim")


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


def _measure(file: str, job: Job, curves: Sequence[Curve], form: str) -> None:
    from spdsl.api import load
    from spdsl.machine.measure import NoGpu, measured

    text = job.source.text if file == STDIN else file
    params = {key: float(value) for key, value in job.params.items()}
    try:
        click.echo(measured(lambda: load(text, job.name, **params), curves, form))
    except NoGpu as error:
        raise Failed(str(error)) from None
