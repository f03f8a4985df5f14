"""The static suite: the reader on a small listing, bounds by hand, a kernel compiled, results that are kept."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from benchmarks.static import bounds, code, compile, masked, others, ours, suite, table
from benchmarks.static.bounds import Cost
from benchmarks.static.code import Code, LoopCode
from benchmarks.static.demand import Demand
from benchmarks.static.peers.capture import captured
from benchmarks.static.rows import Row, as_dict, from_data
from spdsl import targets
from spdsl.cost.pair_products import of_algorithm, of_tiles
from spdsl.ir.schedule import Kind
from spdsl.resources import folder
from tests.machine.test_loop_work import TEXT

H200 = targets.find("h200")
NESTED = Path(__file__).parent / "machine" / "sass" / "nested.sass"
LOOP = LoopCode(
    tile=(64, 64), instructions=500, around=0, matrix=16, multiplied=2 * 4096 * 320, wanted=4096 * 320, loaded=40960,
    exponentials=34, copies=20, barriers=2, fences=2, spills=0,
)  # fmt: skip
CODE = Code(4, 2, 230, 100_000, 2, "shared", 0, 0, {"wgmma": 16}, {"cp.async": 40}, 2, (LOOP,))
ASKED = Demand("unit forward", 320, useful=1000, alike=1000, apart=4000, moved=4800, masked=0.25, turns=0)
ROW = Row(
    "ours", "nsa", "fine_forward", (64, 4), (192, 128), "bf16", digest="d1", per_pair=320, code=CODE, demand=ASKED
)


def test_the_reader() -> None:
    """Of the listing of `tests/machine/test_sass.py` with 8 warps: two loops, by hand."""
    found = code.read(NESTED.read_text(encoding="utf-8"), TEXT, 100, 1024, 8, 3, H200)
    assert (found.spills_in_loops, found.spills_outside) == (1, 2)
    assert (found.matrix, found.copies) == ({"mma": 2, "wgmma": 3}, {"cp.async": 1, "tma": 1})
    assert (found.blocks, found.limit, found.times) == (2, "registers", 2)
    first, second = found.loops
    # Two instructions of 64 x 64 x 16 by each group of four warps; 16 x 8 x 16 and 16 x 8 x 8 by each warp.
    assert first.multiplied == 2 * (2 * 64 * 64 * 16)
    assert second.multiplied == 8 * (16 * 8 * 16 + 16 * 8 * 8)
    assert (first.instructions, first.matrix, first.exponentials, first.copies) == (13, 2, 1, 1)
    assert (first.barriers, first.fences, first.spills) == (1, 2, 1)
    assert (second.instructions, second.matrix, second.spills) == (3, 2, 0)
    # 21 instructions of the outer loop, 13 and 3 of which are in the two.
    assert (first.around, second.around) == (5, 5)


def test_loops_of_the_program() -> None:
    """The text has one loop, of 64 x 64 x 128, twice, and 64 x 128 x 64: one of two times that is it, unrolled."""
    group = "        /*{:04x}*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;"
    lines = [group.format(16 * i) for i in range(12)]  # 12 x 64 x 128 x 16 of each of two groups
    text = "\n".join([*lines, "        /*00c0*/              @!P0 BRA 0x0 ;", "        /*00d0*/ EXIT ;"])
    (loop,) = code.read(text, TEXT, 100, 1024, 8, 3, H200).loops
    assert loop.multiplied == 2 * (2 * 64 * 64 * 128 + 64 * 128 * 64)
    assert loop.wanted == 2 * (64 * 64 * 128 + 64 * 128 * 64)
    assert loop.loaded == 2 * (4 + 64 * 128 * 2 + 64 * 64 * 2)


def test_cost_of_a_pair() -> None:
    """4,096 pairs in an iteration of 4 warps; each product twice."""
    assert bounds.cost(LOOP, 4, 320) == Cost(640, 2000 / 4096, 34 * 128 / 4096, 10)
    around = replace(LOOP, around=1000)
    assert bounds.cost(around, 4, 320, turns=4).slots == (500 + 250) * 4 / 4096
    slow = replace(LOOP, instructions=900)
    both = bounds.cost_of(replace(CODE, loops=(slow, LOOP)), 320, masked=0.25)
    assert both is not None
    assert both.slots == pytest.approx((0.75 * 500 + 0.25 * 900) * 4 / 4096)
    assert bounds.cost_of(replace(CODE, loops=()), 320) is None


def test_bounds() -> None:
    """A million pairs: 132 SMs with 4 schedulers, 1.755 GHz; 989.5 TFLOP/s; 3.9e12 exponentials; 7.5 and 4.8 TB/s."""
    found = bounds.bounds(Cost(640, 0.5, 1.0, 10), 1e6, 48e6, H200)
    assert found["tensor"] == pytest.approx(1.28e9 / 989.5e12)
    assert found["issue"] == pytest.approx(0.5e6 / (132 * 4 * 1.755e9))
    assert found["exp2"] == pytest.approx(1e6 / 3.9e12)
    assert found["L2"] == pytest.approx(1e7 / 7.5e12)
    assert found["HBM"] == pytest.approx(1e-5)
    assert bounds.binding(found) == "HBM"
    assert bounds.serial(found) == pytest.approx(found["tensor"] + found["issue"] + found["exp2"] + 1e-5)


def test_agreement() -> None:
    """A tile of four queries multiplies 1, 1.6, 2.5 and 4 times its useful pairs; gathered rows waste none."""
    assert [ROW.waste(agreement) for agreement in (1.0, 0.8, 0.5, 0.0)] == pytest.approx([1.0, 1.6, 2.5, 4.0])
    assert replace(ROW, gathers=True).waste(0.0) == 1.0
    found = ROW.bounds(0.5, H200)
    assert found is not None
    assert found["L2"] == pytest.approx(2.5 * 1000 * 10 / 7.5e12)
    assert ROW.least(H200) == pytest.approx(4800 / 4.8e12)


@pytest.mark.parametrize(
    "kind, tile, algorithm",
    [(Kind.FORWARD, 320, 320), (Kind.UNIT_DQ, 512, 512), (Kind.PAIR_DKDV, 640, 320), (Kind.SELECT, 192, 192)],
)
def test_products_of_a_pair(kind: Kind, tile: int, algorithm: int) -> None:
    """qk 192, v 128: two products forward, three for dQ, four for dK and dV, two of them once more; one for a score."""
    assert (of_tiles(kind, 192, 128), of_algorithm(kind, 192, 128)) == (tile, algorithm)


def test_masked_blocks() -> None:
    """Against every pair of a tile and a block, looked at one by one: a window of 100."""

    def visits(first: int, last: int, length: int) -> list[tuple[int, int, int, int]]:
        return [(first - 99, last + 1, last - 99, first + 1)]

    visited = partial = 0
    for tile in range(0, 500, 32):
        queries = range(tile, min(tile + 32, 500))
        for block in range(0, 500, 16):
            pairs = [0 <= q - k < 100 for q in queries for k in range(block, min(block + 16, 500))]
            visited, partial = visited + any(pairs), partial + (any(pairs) and not all(pairs))
    assert 0 < partial < visited
    assert masked.masked_share(visits, 500, 500, 32, 16) == partial / visited


def test_masked_blocks_of_two_ranges() -> None:
    """A block is that of the first range that takes it: four keys of the first one are not all of it."""
    assert masked.masked_share(lambda first, last, length: [(0, 4, 0, 4), (0, 64, 0, 64)], 8, 64, 8, 16) == 1 / 4


def test_rows_are_kept_as_they_are() -> None:
    for row in (ROW, replace(ROW, code=None, demand=None, error="no room", also=("moba",), kept=True)):
        assert from_data(json.loads(json.dumps(as_dict(row)))) == row


def test_the_table() -> None:
    """Every line has the cells of its head; what a row says is in it."""
    text = table.markdown([ROW, *others.beside([ROW], others.recorded("mdy666"))], suite.versions(), H200)
    grids = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(grids) == 5
    assert all(line.count(" | ") == grid[0].count(" | ") for grid in grids for line in (grid[0], *grid[2:]))
    machine, useful, limits, far, _ = grids
    assert "unit forward: nsa fine_forward | 192/128 | ours | 64x64 | 4, 2 | 230 | 0 | 98 | 2 (shared)" in machine[2]
    assert machine[2].endswith("| 2x | 20 cp.async | 2, 2 | 500 | 0.49 | 10.0 |")
    assert "_fwd_kernel | 192/128 | mdy666 (recorded) | 16x64" in machine[3]
    assert useful[2].endswith("| 1.00 / 1.60 / 2.50 / 4.00 | 0.49 / 0.78 / 1.22 / 1.95 | 10.0 / 16.0 / 25.0 / 40.0 |")
    assert len(limits) == len(far) == 3


# ---- with the compilers


def forward_alone(name: str, text: str, target: targets.Target, every: bool = False) -> list[ours.Kernel]:
    return [one for one in KERNELS(name, text, target, every) if one.launch.name in ("attend_forward", "row_delta")]


KERNELS = ours.kernels


@pytest.mark.crosscompile
def test_a_run_and_a_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two patterns, two kernels of each, one of them the same; then nothing is compiled, nor even recorded."""
    texts = {name: (folder("patterns") / f"{name}.spat").read_text() for name in ("causal", "sliding_window")}
    monkeypatch.setattr(suite, "sources", lambda: texts)
    monkeypatch.setattr(suite, "kernels", forward_alone)
    monkeypatch.setattr(others, "PEERS", ("mdy666",))
    options = argparse.Namespace(out=tmp_path / "static.json", all=False, peers=[])
    assert suite.run(options) == 0
    first = options.out.read_bytes()
    rows = {(row["of"], row["pattern"], row["kernel"]): from_data(row) for row in json.loads(first)["rows"]}
    assert len([key for key in rows if key[0] == "ours"]) == 3
    assert rows["ours", "causal", "row_delta"].also == ("sliding_window",)
    check_the_forward(rows["ours", "causal", "attend_forward"])
    assert any(of == "mdy666" for of, _, _ in rows)

    def never(*args: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compile, "code_of", never)
    monkeypatch.setattr(suite.kept, "everything", lambda: "a change that leaves the kernels as they are")
    assert suite.run(options) == 0
    monkeypatch.setattr(suite, "kernels", never)
    assert suite.run(options) == 0
    again = json.loads(options.out.read_bytes())
    assert [row for row in again["rows"] if row["of"] == "ours"] == [
        row for row in json.loads(first)["rows"] if row["of"] == "ours"
    ]


@pytest.mark.crosscompile
def test_the_digest_has_the_configuration() -> None:
    text = (folder("patterns") / "causal.spat").read_text()
    (one,) = (kernel for kernel in KERNELS("causal", text, H200) if kernel.launch.name == "attend_forward")
    assert replace(one, pattern="other").digest == one.digest
    other = tuple((name, 4 if name == "num_warps" else value) for name, value in one.launch.options)
    assert replace(one, launch=replace(one.launch, options=other)).digest != one.digest


def check_the_forward(row: Row) -> None:
    """Its tile is that of the cost model, each product once, keys and values loaded once; masks cost instructions."""
    assert row.code is not None
    assert row.demand is not None
    assert row.per_pair == 128 + 128
    assert row.demand.useful == 8 * 65_536 * 65_537 // 2
    plain, masks = sorted(row.code.loops, key=lambda loop: loop.instructions)
    for loop in (plain, masks):
        assert loop.tile == (128, 64)
        assert loop.multiplied == loop.wanted == 128 * 64 * row.per_pair
        assert loop.loaded == 64 * 2 * (128 + 128)
        assert loop.exponentials * row.code.warps * 32 >= 128 * 64
    assert masks.instructions > plain.instructions > 200
    assert row.code.registers <= 255
    assert 0.2 < row.cost.slots < 0.6  # type: ignore[union-attr]
    assert row.code.spills_in_loops == row.code.spills_outside == 0


@triton.jit
def doubled(x, y, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, 2 * tl.load(x + place, mask=place < n), mask=place < n)


@triton.jit
def unwanted(x):
    tl.store(x, 0)


tuned = triton.autotune([triton.Config({"BLOCK": block}, num_warps=2) for block in (64, 128)], key=["n"])(doubled)


@pytest.mark.crosscompile
def test_launchers_of_others() -> None:
    """Their kernels are compiled for the target and not run, autotuned ones in the configuration that is named."""
    x, y = torch.ones(1024), torch.zeros(1024)
    with captured(H200, {"BLOCK": 128}, {"doubled"}) as found:
        assert torch.cuda.get_device_capability() == (9, 0)
        unwanted[(1,)](x)
        doubled[(8,)](x, y, 1024, BLOCK=64, num_warps=4)
        tuned[(8,)](x, y, 1024)
    assert [made.metadata.num_warps for made in found] == [4, 2]
    assert [f"tensor<{block}x" in made.asm["ttgir"] for block, made in zip((64, 128), found, strict=True)] == [True] * 2
    assert all(made.metadata.target.arch == 90 for made in found)
    assert not y.any()
    assert not torch.cuda.is_available()


def test_peers_are_found_by_a_file(tmp_path: Path) -> None:
    """In a folder that is given, or in one below it."""
    (tmp_path / "theirs" / "flash_nsa" / "ops").mkdir(parents=True)
    (tmp_path / "theirs" / "flash_nsa" / "ops" / "select_attn.py").touch()
    for given in (tmp_path, tmp_path / "theirs"):
        assert others.find("flash_nsa/ops/select_attn.py", [given]) == tmp_path / "theirs"
    assert others.find("flash_nsa/ops/select_attn.py", []) is None
    assert others.find("torch/_inductor/kernel/flex/templates/flex_attention.py.jinja", []) is not None
