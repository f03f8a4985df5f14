"""Pictures of masks: what they count, what they print, what they refuse."""

from __future__ import annotations

import builtins
import subprocess
import sys
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from spdsl.cli import main
from spdsl.diagnostics import Report, Source, SpatError
from spdsl.ir.pattern import Pattern
from spdsl.oracle.sketch import sketches
from spdsl.passes.lower import lower
from spdsl.picture import LONGEST, CannotDraw, show
from spdsl.picture.terminal import COLOURS, draw
from spdsl.syntax.parse import parse

WINDOW = "pattern window { param n = 8 causal return attend(sliding(n)) }"
BY_HEAD = """pattern by_head { heads query = 4, kv = 2
  causal broad = tensor(kv_head, bool) return attend(sliding(1) | where(broad[h] == 1)) }"""


def pattern(text: str) -> Pattern:
    report = Report(Source(text))
    lowered = lower(parse(report.source, report).patterns[0], report)
    report.check()
    assert lowered is not None
    return lowered


def test_tiles_of_a_window_are_empty_partial_and_full() -> None:
    ((sketch,), notes) = sketches(pattern("pattern p { causal return attend(sliding(9)) }"), 64)
    assert (sketch.tile, sketch.head, notes) == (4, None, [])
    # Tiles of 4: behind the diagonal one is full, and one cut by the window's end.
    assert sketch.states()[5, :8].tolist() == [0, 0, 0, 1, 2, 1, 0, 0]
    assert sketch.seen == sum(min(9, row + 1) for row in range(64))
    assert sketch.possible == 64 * 65 // 2


@pytest.mark.parametrize("length", [1, 2, 31, 65, 100, 1500])
def test_every_length_counts_every_pair_once(length: int) -> None:
    ((sketch,), _) = sketches(pattern("pattern p { return attend(all) }"), length)
    assert sketch.seen == sketch.possible == length**2
    assert sketch.states().eq(2).all()
    assert sketch.coarser(3).seen == length**2
    assert sketch.coarser(3).states().eq(2).all()
    assert sketch.mask.all()
    assert len(sketch.mask) <= 1024
    assert len(sketch.mask) * sketch.step >= length


def test_a_small_thing_survives_the_smaller_picture() -> None:
    ((sketch,), _) = sketches(pattern("pattern p { return attend(where(k == 1001)) }"), 4096)
    assert sketch.step == 4
    assert sketch.mask.nonzero()[:, 1].unique().tolist() == [1001 // 4]


def test_heads_that_differ_are_drawn_and_no_others() -> None:
    found, notes = sketches(pattern(BY_HEAD), 32)
    assert [sketch.head for sketch in found] == [0, 2]
    assert found[0].seen == 32
    assert found[1].seen == 32 * 33 // 2
    assert notes == ["example values, broad: 0 and 1 in turns"]


def test_every_softmax_and_stream_has_its_picture() -> None:
    near = "attend(kv[sliding(2)] | far[all - sliding(2)])"
    text = f"pattern p {{ causal far = stream() return gate(attend(sink(2)), {near}) }}"
    names = [sketch.name for sketch in sketches(pattern(text), 16)[0]]
    assert len(names) == len(set(names)) == 3
    assert sum("stream far" in name for name in names) == 1


@pytest.mark.parametrize(
    "declared, test, note",
    [
        ("note = tensor(token, int)", "note[q] == note[k]", "note: four documents of unequal length"),
        ("pair = tensor(query, token, bool)", "pair[q][k]", "pair: four documents of unequal length"),
        ("pair = tensor(query, token, int)", "pair[q][k] == 0", "pair: four documents of unequal length"),
        ("note = tensor(token, bool)", "note[k] == 1", "note: four marked tokens"),
        ("note = tensor(token)", "note[k] < 0.5", "note: a rise from 0 to 1"),
        ("note = tensor(int)", "q - k < note", "note: 25"),
        ("note = tensor(head, token, bool)", "note[h][k] == 1", "note: four marked tokens"),
        ("note = tensor(head, 3, int)", "note[h][k % 3] == 1", "note: 0 and 1 in turns"),
    ],
)
def test_example_values_are_told_and_show_something(declared: str, test: str, note: str) -> None:
    found, notes = sketches(pattern(f"pattern p {{ {declared} return attend(where({test})) }}"), 100)
    assert notes == [f"example values, {note}"]
    assert 0 < found[0].seen < found[0].possible


def test_given_and_random_sets() -> None:
    found, notes = sketches(pattern("pattern p { causal g = given(rows = 8, unit = 8) return attend(g) }"), 64)
    assert notes == ["example values, g: 3 random units of 8 keys per tile of 8 queries"]
    assert all(0 < sketch.seen for sketch in found)
    found, notes = sketches(pattern("pattern p { return attend(random(2, unit = 8, rows = 8)) }"), 64)
    assert notes == []
    assert [sketch.seen for sketch in found] == [64 * 16] * 2
    assert not torch.equal(found[0].mask, found[1].mask)


SELECTED = """pattern selected {
  causal
  param by = 16
  far = stream()
  cells = compress(16, 8)
  chosen = top_k(4, score = softmax(dot(cells)), share = group, unit = by, force = first(1) | last(2))
  return gate(attend(cells), attend(far[chosen])) if train
  return attend(far[chosen]) if length < 64
  return attend(far[chosen] | far[sliding(4)])
}"""


def test_a_selected_set_is_forced_units_and_an_example() -> None:
    found, notes = sketches(pattern(SELECTED), 128)
    fine = next(sketch for sketch in found if sketch.name.startswith("attend_2, "))
    assert fine.example is not None
    assert fine.head == 0
    q, k = torch.arange(128)[:, None], torch.arange(128)[None]
    forced = (k <= q) & ((k < 16) | (k // 16 >= q // 16 - 1))
    assert torch.equal(fine.mask & ~fine.example, forced)
    assert torch.equal(fine.mask | forced, fine.mask)
    units = fine.mask.view(128, 8, 16).any(2)
    assert units.sum(1).tolist() == [min(4, row // 16 + 1) for row in range(128)]
    assert units[::16].repeat_interleave(16, 0).equal(units)  # neighbours have the same example
    assert notes == [
        "example values, chosen: forced units of 16 keys, and random ones where scores would choose; 4 at most",
        "an entry of `cells` stands for 16 tokens, drawn at the first 8 of them",
    ]


def test_panels_say_which_result_they_belong_to_and_what_is_a_score() -> None:
    names = [sketch.name for sketch in sketches(pattern(SELECTED), 64)[0]]
    assert names == [
        "attend, stream cells, if train",
        "score ranking, stream cells",
        "attend_2, stream far, if train",
        "attend_3, stream far, if prefill or decode and length < 64",
        "attend_4, stream far, if prefill or decode",
    ]


def test_entries_are_drawn_at_their_tokens_and_counted_once() -> None:
    found, _ = sketches(pattern(SELECTED), 100)
    coarse = found[0]
    assert coarse.example is None
    entries = [max(0, (row - 15) // 8 + 1) for row in range(100)]
    assert coarse.mask.sum(1).tolist() == [8 * count for count in entries]
    assert coarse.seen == sum(entries)
    assert f"{sum(entries):,} pairs with an entry, for 5,050 causal pairs" in printed(SELECTED, 100)


@pytest.mark.parametrize("before, drawn", [(0, 0), (8, 0), (11, 3), (15, 7)])
def test_cells_that_begin_early_are_drawn_at_their_place_if_they_reach_it(before: int, drawn: int) -> None:
    """`drawn` tokens before it, so that no column is one that the cell has not."""
    text = f"pattern p {{ causal return attend(compress(16, 8, before = {before}, partial = keep)) if train }}"
    ((sketch,), notes) = sketches(pattern(text), 61)
    assert notes == [f"an entry of `compress` stands for 16 tokens, drawn at {'' if before else 'the first '}8 of them"]
    places = range(-before, 61, 8)
    cells = [set(range(place, place + 16)) & set(range(61)) for place in places]
    cells = cells[: next(i for i, cell in enumerate(cells) if 60 in cell) + 1]
    for row in range(61):
        seen = [i for i, cell in enumerate(cells) if max(cell) <= row]
        columns = {column for i in seen for column in range(8 * i - drawn, 8 * i - drawn + 8)} & set(range(61))
        assert set(sketch.mask[row].nonzero()[:, 0].tolist()) == columns
    assert sketch.seen == sum(max(cell) <= row for cell in cells for row in range(61))


def test_drawing_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sketches(pattern(WINDOW), 16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sketches", range(1, 8))
def test_panels_do_not_share_a_place(sketches: int) -> None:
    pytest.importorskip("matplotlib")
    from spdsl.picture.plot import _places

    places = [place for pair in _places(sketches) for place in pair]
    assert len(set(places)) == len(places) == 2 * sketches
    assert {column for _, column in places} == set(range(2 if sketches < 3 else 3))


def test_several_branches_are_columns_of_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = "pattern p { causal return gate(attend(sink(2)), attend(sliding(4)), attend(compress(4))) }"
    show(Source(text), None, {}, 32, str(tmp_path / "p.png"))
    data = (tmp_path / "p.png").read_bytes()
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width > height


def printed(text: str, length: int, **options: Any) -> str:
    out = StringIO()
    draw(pattern(text), length, Console(file=out, width=100, highlight=False, **options))
    return out.getvalue()


def test_the_terminal_picture_without_colours() -> None:
    lines = printed(WINDOW, 64).splitlines()
    assert lines[0] == "window  n = 8  64 queries and keys"
    assert lines[1:4] == ["▒▒" + " ·" * 15, "██▒▒" + " ·" * 14, "▒▒██▒▒" + " ·" * 13]
    assert lines[17] == "· empty 82%   ▒▒ partial 12%   ██ full 6%   tiles of 4 x 4"
    assert lines[18] == "sparsity 76.7%: 484 of 2,080 causal pairs are visible"


def test_the_terminal_picture_in_half_blocks_of_three_colours() -> None:
    text = printed(WINDOW, 64, force_terminal=True, color_system="truecolor")
    assert text.count("▀") == 32 * 16  # 16 x 16 tiles, twice as large each way, two rows in a line
    for colour in COLOURS:
        rgb = ";".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
        assert f"38;2;{rgb}" in text


def test_wide_masks_fit_the_terminal() -> None:
    lines = printed(WINDOW, 2048, force_terminal=True, color_system="truecolor").splitlines()
    assert max(line.count("▀") for line in lines) <= 64
    out = StringIO()
    draw(pattern(WINDOW), 2048, Console(file=out, width=40, highlight=False))
    assert "tiles of 128 x 128" in out.getvalue()


def test_the_command_writes_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.spat").write_text(BY_HEAD)
    target = tmp_path / "new" / "mask.png"
    arguments = ["show", str(tmp_path / "a.spat"), "--length", "96", "-o", str(target)]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (0, f"{target.as_posix()}\n")
    first = target.read_bytes()
    assert first.startswith(b"\x89PNG")
    width, height = (int.from_bytes(first[at : at + 4], "big") for at in (16, 20))
    assert width < height  # two heads, one above the other
    CliRunner().invoke(main, arguments)
    assert target.read_bytes() == first


def test_parameters_are_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    show(Source(WINDOW), None, {"n": Fraction(3)}, 16)
    assert "n = 3" in capsys.readouterr().out


def test_a_length_out_of_range_is_refused() -> None:
    with pytest.raises(CannotDraw, match=f"1 to {LONGEST} keys, not {LONGEST + 1}"):
        show(Source(WINDOW), None, {}, LONGEST + 1)


def test_names_and_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = Source(WINDOW + WINDOW.replace("window", "other"))
    with pytest.raises(CannotDraw, match="choose one with -p"):
        show(source, None, {}, 16, str(tmp_path / "a.png"))
    with pytest.raises(CannotDraw, match="no pattern `wrong`; it holds window, other"):
        show(source, "wrong", {}, 16)
    with pytest.raises(CannotDraw, match="is a PNG"):
        show(source, "other", {}, 16, str(tmp_path / "a.gif"))
    with pytest.raises(SpatError, match="E501"):
        show(source, "other", {"m": Fraction(1)}, 16)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refused(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "spdsl.picture.plot", raising=False)
    monkeypatch.setattr(builtins, "__import__", refused)
    with pytest.raises(CannotDraw, match=r"pip install 'spdsl\[pictures\]'"):
        show(Source(WINDOW), None, {}, 16, str(tmp_path / "a.png"))


def test_importing_it_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, spdsl.picture; print([x for x in ('torch', 'matplotlib') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
