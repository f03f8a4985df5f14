"""Compiling many launches for many targets, and showing the numbers as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from spdsl.machine.build_gates import described
from spdsl.machine.crosscompile import Compiled, compile_launch, failed
from spdsl.machine.launches import Launch
from spdsl.machine.processes import each
from spdsl.machine.reasons import reasons
from spdsl.machine.record import refuse_interpreter
from spdsl.tables import Column, Fitted
from spdsl.targets import Target


def compile_all(
    launches: Iterable[Launch], targets: Iterable[Target], workers: int | None = None, console: Console | None = None
) -> list[Compiled]:
    """Every launch for every target, in that order; with a console a progress bar is drawn on it.

    The work is done in forked processes, by default one for each core, so a compiler that ends its process costs one
    result. Where there is no fork, or with one worker, it is done here.
    """
    refuse_interpreter()
    every = list(targets)
    jobs = [(launch, target) for launch in launches for target in every]

    def lost(index: int) -> Compiled:
        return failed(*jobs[index], "the compiler ended its process")

    done = each(lambda index: compile_launch(*jobs[index]), lost, len(jobs), workers)
    results: dict[int, Compiled] = {}
    with bar(console) as progress:
        task = progress.add_task("compiling", total=len(jobs))
        for index, result in done:
            results[index] = result
            progress.update(task, advance=1, description=f"{result.kernel} for {result.target}", refresh=True)
    return [results[index] for index in range(len(jobs))]


def report(compiled: Iterable[Compiled]) -> Fitted:
    """One row for each kernel and target; what costs speed or does not fit is in colour, and below it is why."""
    table = Fitted("compiled kernels", _columns())
    rows = list(compiled)
    for one in rows:
        table.add_row(*(_failure(one) if one.error is not None else _numbers(one)))
    failed = [one for one in rows if one.error is not None]
    table.notes = [Text(f"{described(one)}: {_reason(one)}", "red") for one in failed] + [*map(Text, reasons(rows))]
    return table


def _columns() -> tuple[Column, ...]:
    return (
        Column("kernel", words=True),
        Column("workload", words=True, spare=5, apart=True),
        Column("target", words=True, spare=5, apart=True),
        Column("warps", "groups of 32 or 64 threads of a block", spare=3),
        Column("stages", "iterations whose loads run ahead", spare=4),
        Column("regs", "registers of a thread"),
        Column("spills", "registers that went to memory, which is slow"),
        Column("shared", "bytes of fast memory that a block takes"),
        Column("blocks/SM", "blocks that run on a multiprocessor at once, and what limits them", spare=2),
        Column("in loops", "tensor-core instructions inside loops, where the products are", words=True),
        Column("times", "how often each of those products is computed, more than once is waste", spare=1),
        Column("async copies", "loads that do not wait", words=True, spare=6),
        Column("load bits", "the widest load", spare=7),
    )


def to_json(compiled: Iterable[Compiled]) -> str:
    """The same numbers and more, as a JSON list with one object for each kernel and target."""
    return json.dumps([_as_dict(one) for one in compiled], indent=2)


def to_json_of_files(compiled: Mapping[str, Iterable[Compiled]]) -> str:
    """A JSON list with one object for each kernel and target of every file, which it names."""
    return json.dumps([{"file": file} | _as_dict(one) for file, rows in compiled.items() for one in rows], indent=2)


def _as_dict(one: Compiled) -> dict[str, object]:
    return asdict(one) | {"computed": one.computed, "reasons": list(reasons([one]))}


def _numbers(one: Compiled) -> list[Text | str]:
    over = not one.fits
    shared = f"{one.shared:,}" + (f" > {one.shared_limit:,}" if one.shared > one.shared_limit else "")
    return [
        *_head(one),
        str(one.registers),
        Text(str(one.spills), style="red" if one.spills else ""),
        Text(shared, style="red" if one.shared > one.shared_limit else ""),
        Text(f"{one.occupancy.blocks} ({one.occupancy.limit})", style="red" if over else ""),
        _kinds(one.code.loop_mma),
        Text(f"{one.computed}x", style="red" if one.computed > 1 else ""),
        _kinds(one.code.async_copies),
        str(one.code.widest_load),
    ]


def _failure(one: Compiled) -> list[Text | str]:
    return [*_head(one), "", "", "", "", Text("error", style="red"), "", "", ""]


def _reason(one: Compiled) -> str:
    return (one.error or "").strip().splitlines()[-1]


def _head(one: Compiled) -> list[Text | str]:
    return [one.kernel, str(one.workload or ""), one.target, str(one.num_warps), str(one.num_stages)]


def _kinds(counts: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts) or "none"


def bar(console: Console | None) -> Progress:
    """What runs, how many of how many, and for how long; nothing without a console."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No refreshing thread: processes are forked while the bar is up.
    return Progress(*columns, console=console, disable=console is None, transient=True, auto_refresh=False)
