"""One change at a time in a generated module's text; the checks of this folder must see each of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from spdsl.oracle import dense
from tests.library import broken
from tests.numerics.cases import Found, Shape, assert_same, cached, checked, generated, inputs_of, nan_cache, separate
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, printed
from tests.numerics.test_cached import check_rows

Check = Callable[[str, ModuleType], None]


def train(name: str, module: ModuleType) -> None:
    checked(name, Shape(), module=module)


def short(name: str, module: ModuleType) -> None:
    checked(name, Shape(35, 50), module=module)


def many(name: str, module: ModuleType) -> None:
    checked(name, Shape(400, 400), module=module)


def grouped(name: str, module: ModuleType) -> None:
    checked(name, Shape(20, 20, heads=4, kv_heads=2, qk=24, v=16), module=module)


def packed(name: str, module: ModuleType) -> None:
    pattern, ends = pattern_of(name), [0, 19, 19, 37]
    inputs = inputs_of(pattern, Shape(37, 37))
    found = generated(module, pattern, inputs, {"cu_seqlens": torch.tensor(ends)})
    assert_same(found, separate(pattern, inputs, list(pairwise(ends))))


def apart(name: str, module: ModuleType) -> None:
    """Two packed sequences, of which only the second sees more than its window."""
    pattern, ends = pattern_of(name), [0, 40, 80]
    inputs = inputs_of(pattern, Shape(80, 80))
    inputs["m"] = (torch.arange(80) < 40).long()[None, :, None].expand_as(inputs["m"])
    found = generated(module, pattern, inputs, {"cu_seqlens": torch.tensor(ends)})
    assert_same(found, separate(pattern, inputs, list(pairwise(ends))))


def padded(name: str, module: ModuleType) -> None:
    pattern = pattern_of(name)
    inputs = inputs_of(pattern, Shape(20, 20))
    ((out, lse),) = generated(module, pattern, inputs, {"lengths": torch.tensor([13])}, backward=False).parts
    wanted = dense.results(pattern, {key: x[:, :, 7:] for key, x in inputs.items()})
    assert_same(Found([(out[:, :, 7:], lse[:, :, 7:])]), Found(wanted))


def decoded(name: str, module: ModuleType) -> None:
    shape, pattern = Shape(40, 40, batch=1, heads=3), pattern_of(name)
    inputs = inputs_of(pattern, shape)
    found = cached(module, pattern, inputs, [30, 8], 2, nan_cache(module, shape, 300, 32))
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")))


def documents(name: str, module: ModuleType) -> None:
    """Documents of 7 tokens."""
    shape, pattern = Shape(40, 40), pattern_of(name)
    inputs = inputs_of(pattern, shape)
    inputs["doc"] = torch.arange(40).expand_as(inputs["doc"]) // 7
    found = cached(module, pattern, inputs, [30, 8], 2, nan_cache(module, shape, 300, 32))
    assert_same(Found(found), Found(dense.results(pattern, inputs, "prefill")))


def last(name: str, module: ModuleType) -> None:
    """The one decoded row, for patterns whose earlier rows depend on the chunk."""
    shape, pattern = Shape(40, 40), pattern_of(name)
    inputs = inputs_of(pattern, shape)
    ((out, lse),) = cached(module, pattern, inputs, [39], 1, nan_cache(module, shape, 300, 16))
    ((wanted, wanted_lse),) = dense.results(pattern, inputs, "decode")
    assert_same(Found([(out[:, :, -1:], lse[:, :, -1:])]), Found([(wanted[:, :, -1:], wanted_lse[:, :, -1:])]))


def rows(name: str, module: ModuleType) -> None:
    check_rows(name, module, 16)


class Bug(NamedTuple):
    title: str
    pattern: str
    check: Check
    old: str
    new: str


PAIRS = "causal m = tensor(query, token, int) return attend(sliding(3) | where(m[q][k] < 1))"

KERNELS = [
    Bug("window one too wide", "streaming_llm", train, "q - k < 34", "q - k <= 34"),
    Bug("keys past the end count", "everything", train, "block.position < keys.origin + keys.count",
        "block.position >= 0"),
    Bug("overlapping ranges twice", "streaming_llm", train, "cursor, keys.count", "0, keys.count"),
    Bug("overlapping ranges of rows twice", "streaming_llm", train, "cursor, rows.count", "0, rows.count"),
    Bug("no shift", "causal", train, " - shift[:, None]", ""),
    Bug("no decay of the sum", "causal", train, "total * decay", "total"),
    Bug("no decay of the output", "causal", train, "acc0 * decay[:, None]", "acc0"),
    Bug("head of another group", "causal", grouped, "h // source.GROUP", "h % source.GROUP"),
    Bug("one head of the group in dK", "causal", grouped, "kv_head * C.GROUP + C.GROUP)", "kv_head * C.GROUP + 1)"),
    Bug("sign of delta", "causal", train, "dp - grads.delta", "dp + grads.delta"),
    Bug("sign of dlse", "causal", train, "total -= load_row_values", "total += load_row_values"),
    Bug("no scale on dK", "causal", train, "dk0 * C.SCALE", "dk0"),
    Bug("no scale on dQ", "causal", train, "dq0 * C.SCALE", "dq0"),
    Bug("lse in powers of 2", "causal", train, "(m + tl.log2(total)) * rt.LN2", "m + tl.log2(total)"),
    Bug("lse not back in powers of 2", "causal", train, "lse * LOG2E)", "lse)"),
    Bug("division by 0", "empty_rows", train, "tl.where(total == 0.0, 1.0, total)", "total"),
    Bug("empty row minus itself", "hole", train, 'tl.where(m_new == float("-inf"), 0.0, m_new)', "m_new"),
    Bug("empty row in backward", "empty_rows", train, 'float("inf"), lse * LOG2E', "lse * LOG2E, lse * LOG2E"),
    Bug("rows at the front", "causal", short, "origin = k_count - q_count", "origin = 0"),
    Bug("partial blocks taken for full", "streaming_llm", train, "tl.cdiv(tl.maximum(full_first, 0), BLOCK)",
        "tl.maximum(full_first, 0) // BLOCK"),
    Bug("last block taken for full", "everything", train,
        "tl.minimum(full_end, count), 0) // BLOCK", "tl.minimum(full_end, count), 0) // BLOCK + 1"),
    Bug("columns of the guard", "causal", grouped,
        "mask=there[:, None] & (column < DIM), other=0.0", "mask=there[:, None], other=0.0"),
    Bug("one sink for all heads", "sink_attention", train, "tl.load(sink + h)", "tl.load(sink)"),
    Bug("no slope of the cap", "softcap", train, " * slope", ""),
    Bug("all rows of a list block", "token_both", train, "full = visited & must & tiles.whole_keys", "full = visited"),
    Bug("heads not told apart", "by_head", train, "h % 2", "h // 2"),
    Bug("start of a sequence", "causal", packed, "start = tl.load(spans + 2 * s)", "start = tl.load(spans)"),
    Bug("padding at the right", "causal", padded,
        "torch.stack([size - counts, counts], 1)", "torch.stack([0 * counts, counts], 1)"),
    Bug("first page only", "causal", decoded, "pages + start // C.PAGE", "pages + start // C.PAGE * 0"),
    Bug("no place in the page", "causal", decoded, "start = start % C.PAGE", "start = start * 0"),
    Bug("slots of half a page", "document", decoded, "(home >= 0), position % PAGE", "(home >= 0), position % 8"),
    Bug("new tokens one place early", "causal", decoded, "(call.spans + 2 * s + 1) + token",
        "(call.spans + 2 * s + 1) + token - 1"),
    Bug("lengths before the stores", "causal", decoded,
        "launch_rows(streams, self._token_rows(tokens), call, page)\n"
        "        launch_lengths(self.dropped, call, page)",
        "launch_lengths(self.dropped, call, page)\n        launch_rows(streams, [], call, page)"),
    Bug("all values of tokens in one place", "document", documents, "store.data + position[:, None] * store.token",
        "store.data + position[:, None] * 0"),
    Bug("values of one head for all", "causal w = tensor(token, head) return attend(all, bias = w[k][h])", decoded,
        "column = start + tl.arange(0, values.COLUMNS)[None, :]", "column = 0 * tl.arange(0, values.COLUMNS)[None, :]"),
    Bug("bounds of a query head for a head of keys",
        "causal m = tensor(kv_head, token, int) return attend(where(m[h][k] == m[h][q]))", grouped,
        "tiles, h // t.m_group", "tiles, h"),
    Bug("a split too short", "causal", decoded,
        "visited * (split + 1) // C.SPLITS", "visited * (split + 1) // C.SPLITS - split"),
    Bug("tail of the last page", "everything", last, "block.position < keys.origin + keys.count",
        "block.position >= 0"),
    Bug("no sink in the merge of splits", "sink_attention", decoded, "if part.sink is not None:", "if False:"),
    Bug("splits of one weight", "causal", decoded, "weight = tl.exp2(own - origin)", "weight = tl.exp2(own - own)"),
    Bug("a result that does not answer at this length", "by_length", rows, "if length < 20:  #", "if length >= 0:  #"),
    Bug("a result that stops answering too early", "by_length", rows, "if length >= 20:  #", "if length >= 8:  #"),
    Bug("cached ranges twice", "streaming_llm", decoded, "first, first, cursor,", "first, first, 0,"),
    Bug("rows of a packed call as those of its first sequence", PAIRS, packed,
        "return row - origin, origin + count", "return 0 * row - origin, origin + count"),
    Bug("position in a chunk taken for its row", PAIRS, decoded,
        "return row - origin, origin + count", "return row, origin + count"),
    Bug("tiles of the first sequence for all", PAIRS, apart, "(start + rows - keys).view", "(rows - keys).view"),
    Bug("tiles by positions in a chunk", PAIRS, decoded, "(start + rows - keys).view", "(start + 0 * keys).view"),
    Bug("tiles by the greatest number alone", PAIRS, train, "found.amin((3, 5)), found", "found.amax((3, 5)), found"),
]  # fmt: skip
CPU = [
    Bug("overlapping ranges twice", "streaming_llm", train, "first = max(first, cursor)", "first = first"),
    Bug("partial keys taken for full", "causal return attend(sliding(300))", many,
        "full_first = min(max(full_first, first), end)", "full_first = first"),
    Bug("no bias", "token_bias", train, "added = added + part.bias", "added = added + 0 * part.bias"),
    Bug("slots of half a page", "document", decoded, "position % self.page, room", "position % 8, room"),
    Bug("lse of an empty row", "empty_rows", train,
        "lse = lse.masked_fill(x.added.amax(-1, keepdim=True) == -torch.inf, -torch.inf)", "pass"),
    Bug("sink without its share", "sink_attention", train,
        "return out * share_of(lse, total).unsqueeze(-1), total", "return out, total"),
    Bug("sign of dlse", "causal", train,
        "(dout * out).sum(-1, keepdim=True) - dlse", "(dout * out).sum(-1, keepdim=True) + dlse"),
    Bug("keys of one tile", "causal", short, "q_origin = keys - rows", "q_origin = 0 * rows"),
    Bug("rows of a packed call as those of its first sequence", PAIRS, packed,
        "row_shift=corner.rows.start - corner", "row_shift=-corner"),
    Bug("position in a chunk taken for its row", PAIRS, decoded,
        "row_shift=corner.rows.start - corner.q_origin", "row_shift=corner.rows.start"),
    Bug("tiles by the greatest number alone", PAIRS, many, "found.amin((3, 5)), found", "found.amax((3, 5)), found"),
    Bug("sign of the sink's gradient", "sink_attention", train, "return -(share_of(sink", "return (share_of(sink"),
]  # fmt: skip


# `train` of a whole module is test_patterns.py.
UNBROKEN = sorted({(bug.pattern, bug.check.__name__) for bug in [*KERNELS, *CPU] if bug.check is not train})


def _broken(bug: Bug, folder: Path) -> ModuleType:
    return broken(printed(bug.pattern), bug.old, bug.new, folder)


@pytest.mark.parametrize("bug", KERNELS, ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_in_the_kernels_is_seen(kernels: Engine, bug: Bug, tmp_path: Path) -> None:
    module = kernels(_broken(bug, tmp_path))
    with pytest.raises(AssertionError):
        bug.check(bug.pattern, module)


@pytest.mark.parametrize("bug", CPU, ids=lambda bug: bug.title.replace(" ", "_"))
def test_a_bug_on_the_cpu_path_is_seen(cpu: Engine, bug: Bug, tmp_path: Path) -> None:
    module = cpu(_broken(bug, tmp_path))
    with pytest.raises(AssertionError):
        bug.check(bug.pattern, module)


@pytest.mark.parametrize("name, check", UNBROKEN)
def test_the_same_checks_pass_without_a_bug(engine: Engine, name: str, check: str) -> None:
    if check == "many" and engine.name == "interpreted":
        pytest.skip("400 rows are for the CPU path")
    globals()[check](name, engine(name))
