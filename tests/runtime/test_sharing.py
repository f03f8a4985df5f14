"""Who writes to a page that others have gets one of its own, with what is in it; all else is shared."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from spdsl.runtime.cache.ring import ring_of
from spdsl.runtime.cache.sharing import references, with_own_pages

PAGE = 16


def parted(
    table: list[list[int]], lengths: list[int], pages: int, owned: list[int] | None = None
) -> tuple[Tensor, ...]:
    mine = torch.ones(pages, dtype=torch.bool)
    if owned is not None:
        mine = torch.zeros(pages, dtype=torch.bool).index_fill_(0, torch.tensor(owned), True)
    return with_own_pages(torch.tensor(table, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), PAGE, mine)


def test_two_of_one() -> None:
    """Full pages are shared; the one that is partly filled is copied, empty ones are exchanged."""
    table, source, target, lengths = parted([[0, 1, 2], [0, 1, 2]], [20, 20], 6)
    assert table.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert (source.tolist(), target.tolist(), lengths.tolist()) == ([-1, 1], [-1, 3], [20, 20])


def test_at_the_end_of_a_page_nothing_is_copied() -> None:
    table, source, target, _ = parted([[0, 1], [0, 1]], [16, 16], 4)
    assert table.tolist() == [[0, 1], [0, 2]]
    assert source.tolist() == target.tolist() == [-1, -1]


def test_who_took_tokens_back_leaves_the_page_to_those_that_read_it() -> None:
    """The first sequence is the first to name the page, but for the second one it is full."""
    table, source, target, _ = parted([[0, 1], [0, 1]], [9, 32], 4)
    assert table.tolist() == [[2, 3], [0, 1]]
    assert (source.tolist(), target.tolist()) == ([0, -1], [2, -1])


def test_without_a_page_left_the_sequence_ends_before_it() -> None:
    table, source, target, lengths = parted([[0, 1], [0, 1]], [20, 20], 2)
    assert table.tolist() == [[0, 1], [0, -1]]
    assert (source.tolist(), target.tolist(), lengths.tolist()) == ([-1, -1], [-1, -1], [20, 16])


def test_pages_of_nobody_are_left_alone() -> None:
    """Page 2 is in the storage, but was not handed out."""
    table, *_ = parted([[0, 1], [0, 1]], [3, 3], 6, owned=[0, 1, 4, 5])
    assert table.tolist() == [[0, 1], [4, 5]]


def test_random_tables() -> None:
    """Open pages are named once; what a sequence reads is where it was, or copied."""
    random = Random(0)
    for _ in range(300):
        rows, width, pages = random.randint(1, 5), random.randint(1, 4), random.randint(4, 24)
        held = [random.sample(range(pages), min(pages, width)) + [-1] * (width - pages) for _ in range(3)]
        table = [random.choice(held) for _ in range(rows)]
        lengths = [random.randint(0, PAGE * sum(page >= 0 for page in row)) for row in table]
        new, source, target, kept = parted(table, lengths, pages)
        counts = references(new, pages)
        for row in range(rows):
            full = int(kept[row]) // PAGE
            assert new[row, :full].tolist() == table[row][:full]
            for page in new[row, full:].tolist():
                assert page < 0 or counts[page] == 1
            if target[row] >= 0:
                assert (int(new[row, full]), table[row][full]) == (int(target[row]), int(source[row]))
            elif kept[row] % PAGE:
                assert int(new[row, full]) == table[row][full]
        written = [page for page in target.tolist() if page >= 0]
        assert not {*written} & {page for row in table for page in row if counts[page] and page not in written}


def test_a_ring() -> None:
    ring = ring_of(4, 20, 12, PAGE)
    assert (ring.first, ring.turning) == (1, 3)
    assert ring.table(2, 6, "cpu").tolist() == [[0, 1, 2, 3, 1, 2], [4, 5, 6, 7, 5, 6]]
    for window in range(1, 70):
        for spare in (1, 7, 16, 40):
            turning = ring_of(0, window, spare, PAGE).turning
            for length in range(200):  # from the first key of the first new query to the last new token
                pages = range(max(0, length - window + 1) // PAGE, (length + spare - 1) // PAGE + 1)
                assert len(pages) <= turning
