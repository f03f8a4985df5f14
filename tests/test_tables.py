"""No table loses a number, at any width: lines fit, nothing is cut, and what is shown is what JSON says."""

from __future__ import annotations

import io
import json
from collections import namedtuple
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

pytest.importorskip("triton")

from spdsl.cli import main
from spdsl.cost.report import duration, number
from spdsl.machine import counts
from spdsl.machine.crosscompile import Compiled
from spdsl.machine.launches import Workload
from spdsl.machine.machine_code import Code
from spdsl.machine.occupancy import Occupancy
from spdsl.machine.report import report, to_json
from spdsl.machine.tune import rows as tuned_rows
from spdsl.machine.tune import table as tuned_table
from spdsl.passes.count import Number
from spdsl.resources import folder
from spdsl.tables import Column, Fitted, Legend
from tests.cost.plans import plan

WIDTHS = (80, 100, 160)


def printed(table: RenderableType, width: int) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width).print(table)
    return screen.getvalue().splitlines()


def rows(lines: Iterable[str]) -> list[list[str]]:
    """The cells of the rows, without headings; a name that was folded is whole again."""
    found: list[list[str]] = []
    for line in lines:
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and found and not any(cells[1:]):
            found[-1][0] += cells[0]
        elif cells:
            found.append(cells)
    return found


def headings(lines: Iterable[str]) -> list[str]:
    line = next(line for line in lines if line.startswith("┃"))
    return [cell.strip() for cell in line.split("┃")[1:-1]]


def expect_whole(lines: Iterable[str], width: int) -> None:
    for line in lines:
        assert cell_len(line) <= width, line
        assert "…" not in line, line


# ---- any table


def some(legend: bool = True) -> Fitted:
    columns = [Column("name", words=True), Column("a", "first"), Column("b", spare=2), Column("c", "third", spare=1)]
    table = Fitted("title", columns, legend)
    table.add_row("x" * 20, "1" * 20, "2" * 20, Text("3" * 20, "red"))
    return table


def test_the_least_important_column_goes_first() -> None:
    assert [column.heading for column in some().shown(93)] == ["name", "a", "b", "c"]
    assert [column.heading for column in some().shown(92)] == ["name", "a", "c"]
    assert [column.heading for column in some().shown(60)] == ["name", "a"]
    assert [column.heading for column in some().shown(10)] == ["name", "a"], "what is always shown stays"


def test_what_is_left_out_is_told_with_the_legend() -> None:
    text = " ".join(printed(some(), 80))
    assert "a: first; c: third" in text
    assert "no room for: b (" in text
    assert "no room" not in " ".join(printed(some(), 93))
    assert "first" not in " ".join(printed(some(legend=False), 80))
    both = " ".join(printed(Legend([some(False), some(False)]), 80))
    assert both.count("a: first") == both.count("no room for: b (") == 1


def test_columns_become_headings() -> None:
    columns = [Column("kernel", words=True), Column("gpu", words=True, spare=1, apart=True), Column("n")]
    table = Fitted("", columns, legend=False)
    for gpu in ("h200", "h200", "mi300x"):
        table.add_row("k" * 40, gpu, "123,456")
    assert len(headings(printed(table, 80))) == 3
    lines = printed(table, 56)
    assert [line.strip() for line in lines if line and line[0] not in "┏┃┡│└"] == ["h200", "mi300x"]
    assert [len(row) for row in rows(lines)] == [2, 2, 2]
    assert table.left_out(56) == []


def test_a_column_that_says_nothing_is_not_shown() -> None:
    table = Fitted("", [Column("a"), Column("b", spare=1)])
    table.add_row("1", "")
    assert headings(printed(table, 80)) == ["a"]
    assert table.left_out(80) == []


def test_a_long_name_is_folded_and_numbers_stay() -> None:
    table = Fitted("", [Column("name", words=True), Column("n")], legend=False)
    table.add_row("x" * 100, "1,234,567")
    lines = printed(table, 60)
    expect_whole(lines, 60)
    assert sum(line.count("x") for line in lines) == 100
    assert rows(lines)[0][1] == "1,234,567"


# ---- cost


def cost(width: int, name: str, *rest: str) -> str:
    path = str(folder("patterns") / f"{name}.spat")
    done = CliRunner().invoke(main, ["cost", path, *rest], env={"COLUMNS": str(width)})
    assert done.exit_code == 0, done.output
    return done.stdout


def of_json(heading: str, point: dict[str, Any]) -> str:
    """The cell under a heading, from the JSON of its point."""
    most, least = ("", "") if point["exact"] else ("<= ", ">= ")
    counts_of = {"FLOPs": "flops", "FLOPs run": "machine", "bytes": "moved"}
    if heading in counts_of:
        return number(Number(point[counts_of[heading]]))
    return {
        "tokens": f"{point['length']:,}",
        "time": most + duration(point["seconds"]),
        "dense": duration(point["dense_seconds"]),
        "speedup": f"{least}{point['speedup']:.2f}x",
        "choosing": f"{point['selection']:.0%}" if point["selection"] else "",
        "kernels": str(point["launches"]),
        "torch ops": str(point["torch"] or ""),
    }[heading]


@pytest.mark.parametrize("name, lengths", [("sliding_window", "4k,64k,1M"), ("nsa", "4k,64k"), ("moba", "1M")])
def test_costs_fit_and_are_those_of_the_json(name: str, lengths: str) -> None:
    phases = ("--phase", "forward", "--phase", "decode", "--length", lengths)
    (document,) = json.loads(cost(80, name, *phases, "--format", "json"))
    for width in WIDTHS:
        lines = cost(width, name, *phases).splitlines()
        expect_whole(lines, width)
        starts = [at for at, line in enumerate(lines) if line.startswith("┏")]
        for start, curve in zip(starts, document["curves"], strict=True):
            shown = headings(lines[start:])
            assert {"tokens", "time", "dense", "speedup"} <= set(shown)
            for cells, point in zip(rows(lines[start:]), curve["points"], strict=False):
                wanted = [of_json(heading, point) for heading in shown]
                # a bound of one count has its sign in the text alone: JSON says it of the point
                plain = [
                    cell.removeprefix("<= ") if "FLOPs" in h or h == "bytes" else cell
                    for h, cell in zip(shown, cells, strict=True)
                ]
                assert plain == wanted
    assert {"FLOPs run", "kernels", "torch ops"} <= set(headings(lines)), "all columns where there is room"


@pytest.mark.parametrize("name", ["nsa", "infllm_v2"])
def test_kernels_of_a_call_fit(name: str) -> None:
    rest = ("--kernels", "--phase", "backward", "--phase", "decode", "--length", "64k")
    (document,) = json.loads(cost(80, name, *rest, "--format", "json"))
    kernels = [one["name"] for curve in document["curves"] for one in curve["points"][-1]["kernels"]]
    for width in WIDTHS:
        lines = cost(width, name, *rest).splitlines()
        expect_whole(lines, width)
        found = [cells[0] for cells in rows(lines) if not cells[0].replace(",", "").isdigit()]
        assert found == kernels


def test_the_words_of_the_costs_are_explained() -> None:
    text = cost(80, "nsa", "--phase", "forward", "--target", "h200", "--length", "8k")
    assert not {"of the machine", "faster", "torch", "selection"} & set(headings(text.splitlines()))
    assert "no source for" not in text
    plain = " ".join(text.split())
    for words in (
        "time: of one call of one layer, estimated",
        "dense: time of the best dense attention on that GPU",
        "speedup: dense / time, below 1x dense attention is faster",
        "<= and >=: the data decide",
        "for want of published speeds on h200 those on h100 are taken: forward, backward,",
    ):
        assert words in plain, words


def test_a_pipe_takes_80_columns_or_what_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    path = str(folder("patterns") / "sliding_window.spat")
    arguments = ["cost", path, "--length", "4k", "--phase", "forward"]
    expect_whole(CliRunner().invoke(main, arguments).stdout.splitlines(), 80)


# ---- the report


CODE = Code(255, 0, 0, 0, (("wgmma", 160),), (("wgmma", 160),), (("cp.async", 148),), 128)
FITS = Compiled(
    "attend_forward", "h200", 8, 3, (), code=CODE, fits=True, shared=232_448, shared_limit=232_448,
    occupancy=Occupancy(12, "registers", 8), multiplies=True, workload=Workload("prefill", "bf16", 192, 128),
)  # fmt: skip


@pytest.mark.parametrize("kernel", ["attend_forward", "compressed_keys_of_the_index_units_dkdv"])
@pytest.mark.parametrize("targets", [["h200"], ["h200", "mi300x", "rtx4090"]])
def test_the_report_fits(kernel: str, targets: list[str]) -> None:
    every = [replace(FITS, kernel=kernel, target=target) for target in targets]
    data = json.loads(to_json(every))
    for width in WIDTHS:
        lines = printed(report(every), width)
        expect_whole(lines, width)
        shown = headings(lines)
        assert {"kernel", "regs", "spills", "shared", "in loops"} <= set(shown)
        assert [word for word in ("prefill bf16 192/128", *targets) if word not in " ".join(lines)] == []
        for cells, one in zip(rows(lines), data, strict=True):
            wanted = {
                "kernel": kernel, "workload": "prefill bf16 192/128", "target": one["target"],
                "warps": str(one["num_warps"]), "stages": str(one["num_stages"]), "regs": str(one["code"]["registers"]),
                "spills": str(one["code"]["spills"]), "shared": f"{one['shared']:,}", "load bits": "128",
                "blocks/SM": f"{one['occupancy']['blocks']} (registers)", "in loops": "160 wgmma",
                "async copies": "148 cp.async", "times": f"{one['computed']}x",
            }  # fmt: skip
            assert dict(zip(shown, cells, strict=True)) == {heading: wanted[heading] for heading in shown}
    assert len(headings(printed(report(every), 200))) == 13


def test_what_does_not_compile_is_told_whole() -> None:
    error = "CompileError: " + "tile 512 x 512 needs 1,048,576 bytes; " * 3
    lines = printed(report([FITS, replace(FITS, error=error, kernel="too_large")]), 80)
    expect_whole(lines, 80)
    assert error.strip().replace(" ", "") in "".join(lines).replace(" ", "")
    over = replace(FITS, shared=1_048_576, fits=False)
    assert "1,048,576 > 232,448" in " ".join(" ".join(row) for row in rows(printed(report([over]), 80)))


@pytest.mark.parametrize("name", ["causal", "nsa", "infllm_v2"])
def test_counted_tables_fit(name: str) -> None:
    for width in WIDTHS:
        steps, forward = (printed(table, width) for table in counts.tables(plan(name)))
        expect_whole([*steps, *forward], width)
        words = " ".join(" ".join(row) for row in rows([*steps, *forward]))
        for table in counts.tables(plan(name)):
            for column in table.shown(width):
                for cell in column.cells:
                    assert all(part in words for part in cell.plain.split()), cell.plain


Bucket = namedtuple("Bucket", "function kernel queries keys most_n")
Winner = namedtuple("Winner", "config milliseconds default tried gpu")
FOUND = {
    Bucket("coarse_kernel", "units_decode", 1048576, 1048576, 64): Winner((128, 128, 8, 2), 123.456, 234.567, 10, ""),
    Bucket("near_kernel", "dkdv", 4096, 4096, None): Winner((64, 64, 8, 1), None, None, 5, "ranked for h200"),
}  # fmt: skip


def test_the_table_of_the_tuner_fits() -> None:
    for width in WIDTHS:
        lines = printed(tuned_table(FOUND), width)
        expect_whole(lines, width)
        shown = headings(lines)
        assert {"kernel", "queries", "keys", "configuration"} <= set(shown)
        first = dict(zip(shown, rows(lines)[0], strict=True))
        wanted = {
            "kernel": "coarse units_decode", "queries": "1048576", "keys": "1048576", "page, unit": "64",
            "default ms": "234.567", "tuned ms": "123.456", "gain": "+90%", "tried": "10",
            "configuration": "128 x 128, 8 warps, 2 stages",
        }  # fmt: skip
        assert first == {heading: wanted[heading] for heading in shown}
    assert json.loads(json.dumps(tuned_rows(FOUND)))[0]["config"] == [128, 128, 8, 2]
