"""Entries of compressed streams: numbers worked out by hand, visibility, empty rows, gradients."""

from __future__ import annotations

from math import erf, exp, inf, sqrt

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Compress, Grid, Query, Stream, Values
from spdsl.oracle.compress import cells, compressed, entries
from spdsl.oracle.dense import attention, environment, sizes_of, visible
from tests.oracle import built


def tokens(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


def made(
    by: str, x: Tensor, z: Tensor | None = None, width: int = 2, stride: int = 1, before: int = 0, **roles: Tensor
) -> list[float]:
    stream = Stream("e", grid=Grid(width, stride, before), compress=Compress("kv", by, "z" if z is not None else None))
    found = compressed(stream, "v", x, z, {f"e_v_{role}": weight.double() for role, weight in roles.items()})
    return found.flatten().tolist()


@pytest.mark.parametrize(
    "width, stride, tokens, count",
    [
        (32, 16, 31, 0), (32, 16, 32, 1), (32, 16, 47, 1), (32, 16, 48, 2),
        (4, 4, 17, 4), (2, 3, 5, 2), (1, 1, 5, 5), (3, 1, 0, 0),
    ],
)  # fmt: skip
def test_only_whole_cells_become_entries(width: int, stride: int, tokens: int, count: int) -> None:
    assert entries(Grid(width, stride), tokens) == count
    found = cells(Grid(width, stride), tokens)
    assert [own for own, _ in found] == [slice(i * stride, i * stride + width) for i in range(count)]
    assert {(places.start, places.stop) for _, places in found} <= {(0, width)}


@pytest.mark.parametrize(
    "grid, tokens, wanted",
    [
        (Grid(4, 2, before=2), 7, [(0, 2), (0, 4), (2, 6)]),
        (Grid(4, 2, before=1), 7, [(0, 3), (1, 5), (3, 7)]),
        (Grid(4, 4, before=3), 1, [(0, 1)]),
        (Grid(4, 4, before=3), 0, []),
        (Grid(4, 2, before=2), 1, []),
        (Grid(4, 2, partial=True), 7, [(0, 4), (2, 6), (4, 7)]),
        (Grid(4, 2, partial=True), 6, [(0, 4), (2, 6)]),
        (Grid(4, 2, partial=True), 1, [(0, 1)]),
        (Grid(4, 2, before=2, partial=True), 1, [(0, 1)]),
        (Grid(4, 2, partial=True), 0, []),
    ],
)  # fmt: skip
def test_cells_hold_what_is_there(grid: Grid, tokens: int, wanted: list[tuple[int, int]]) -> None:
    found = cells(grid, tokens)
    assert [(own.start, own.stop) for own, _ in found] == wanted
    for i, (own, places) in enumerate(found):
        assert own.start - places.start == i * grid.stride - grid.before
        assert places.stop - places.start == own.stop - own.start


def test_mean_and_extremes() -> None:
    assert made("mean", tokens(1, 5, 3, 9)) == [3, 4, 6]
    assert made("max", tokens(1, 5, 3, 9)) == [5, 5, 9]
    assert made("min", tokens(1, 5, 3, 9)) == [1, 3, 3]
    assert made("mean", tokens(1, 5, 3, 9, 7), stride=2) == [3, 6]


def test_weighted_adds_the_position_first() -> None:
    weight, position = torch.tensor([[2.0, 10.0]]), torch.tensor([[[1.0], [-1.0]]])
    # 2 * (x0 + 1) + 10 * (x1 - 1)
    assert made("weighted", tokens(1, 5, 3), weight=weight, position=position) == [44, 32]


def test_mlp_is_down_of_gelu_of_up() -> None:
    up, down = torch.tensor([[[[1.0, 0.0]], [[2.0, 1.0]]]]), torch.tensor([[[3.0], [-1.0]]])
    position = torch.tensor([[[0.5], [0.0]]])

    def gelu(x: float) -> float:
        return x * (1 + erf(x / sqrt(2))) / 2

    # Hidden: (x0 + 0.5) + 2 * x1 and x1.
    found = made("mlp", tokens(1, -1, 0.25), up=up, down=down, position=position)
    assert found == pytest.approx([3 * gelu(-0.5) - gelu(-1), 3 * gelu(0) - gelu(0.25)])


def test_softmax_weighs_each_column_by_the_logits_stream() -> None:
    assert made("softmax", tokens(1, 5), tokens(0, 1)) == pytest.approx([(1 + 5 * exp(1)) / (1 + exp(1))])
    x = torch.tensor([[1.0, 10.0], [5.0, 20.0]]).view(1, 1, 2, 2)
    z = torch.tensor([[0.0, 2.0], [1.0, 2.0]]).view(1, 1, 2, 2)
    assert made("softmax", x, z) == pytest.approx([(1 + 5 * exp(1)) / (1 + exp(1)), 15])
    with pytest.raises(ValueError, match="do not fit"):
        made("softmax", x, tokens(0, 1))


def test_tokens_before_the_sequence_take_no_part() -> None:
    x, z = tokens(4, 8, 6), tokens(0, 1, 3)
    assert made("mean", x, width=2, before=1) == [4, 6, 7]
    assert made("max", -x, width=2, before=1) == [-4, -4, -6]
    assert made("softmax", x, z, width=2, before=1)[0] == 4
    weight, position = torch.tensor([[2.0, 10.0]]), torch.tensor([[[1.0], [-1.0]]])
    # 10 * (x0 - 1), then 2 * (x0 + 1) + 10 * (x1 - 1)
    assert made("weighted", x, width=2, before=1, weight=weight, position=position)[:2] == [30, 80]
    up, down = torch.tensor([[[[1.0]], [[2.0]]]]), torch.ones(1, 1, 1)
    assert made("mlp", x, width=2, before=1, up=up, down=down, position=position)[0] == pytest.approx(6, abs=1e-7)


def test_blocks_of_compressed_sparse_attention() -> None:
    """Equations 11 and 12 of arXiv 2606.19348 with one lane: rows of the own block and of the one before it share a
    softmax per channel; before the first block Z is -inf and C is 0."""
    m, blocks, dim = 3, 4, 2
    c, z = (torch.randn(1, 1, m * blocks, dim, dtype=torch.float64) for _ in range(2))
    stream = Stream("e", grid=Grid(2 * m, m, before=m), compress=Compress("kv", "softmax", "z"))
    found = compressed(stream, "k", c, z, {})
    shape = (1, 1, m, dim)
    c_before, z_before = torch.cat([c.new_zeros(shape), c], 2), torch.cat([z.new_full(shape, -inf), z], 2)
    for i in range(blocks):
        own, previous = slice(m * i, m * (i + 1)), slice(m * i, m * (i + 1))  # the second one in the shifted rows
        s = torch.softmax(torch.cat([z[:, :, own], z_before[:, :, previous]], 2), 2)
        wanted = (s[:, :, :m] * c[:, :, own]).sum(2) + (s[:, :, m:] * c_before[:, :, previous]).sum(2)
        torch.testing.assert_close(found[:, :, i], wanted)
    assert found.shape[2] == blocks


def test_softmax_takes_values_of_the_logits_stream_or_its_keys() -> None:
    derived = built.entries(2, 2, "softmax", logits="z")
    for value, name in ((Values.OWN, "v_z"), (Values.NONE, "k_z")):
        found = built.pattern((Query("q"), Stream("kv"), Stream("z", value=value), derived), built.coarse(2, 2))
        inputs = built.numbers(found, 4)
        out, _ = attention(found, inputs)
        share = torch.softmax(inputs[name][0, 0, :2], 0)
        torch.testing.assert_close(out[0, 0, 2], (share * inputs["v"][0, 0, :2]).sum(0))


def test_keys_and_values_have_their_own_weights_per_head() -> None:
    found = built.pattern(
        (Query("q"), Stream("kv"), built.entries(2, 2, "weighted"), *built.weights(2, "weighted")), built.coarse(2, 2)
    )
    inputs = built.numbers(found, 4, heads=4, kv_heads=2)
    assert inputs["entries_k_weight"].shape == (2, 2)
    k, v = (
        torch.stack(
            [
                inputs[f"entries_{side}_weight"][head]
                @ (inputs[side][0, head, 2 * i : 2 * i + 2] + inputs[f"entries_{side}_position"][head])
                for i in (0, 1)
            ]
        )
        for head, side in ((1, "k"), (1, "v"))
    )
    out, lse = attention(found, inputs)
    logits = k @ inputs["q"][0, 2, 3] / 2  # query head 2 reads kv head 1
    torch.testing.assert_close(out[0, 2, 3], torch.softmax(logits, 0) @ v)
    torch.testing.assert_close(lse[0, 2, 3], torch.logsumexp(logits, 0))


def test_values_are_the_first_columns_of_compressed_keys() -> None:
    derived = built.entries(2, 1, "mean", value=Values.KEY, v=3)
    found = built.pattern((Query("q"), Stream("kv", value=Values.KEY, v=3), derived), built.coarse(2, 1))
    inputs = built.numbers(found, 2)
    out, _ = attention(found, inputs)
    torch.testing.assert_close(out[0, 0, 1], inputs["k"][0, 0].mean(0)[:3])


def test_an_entry_is_visible_once_it_is_closed() -> None:
    found = built.pattern((Query("q"), Stream("kv"), built.entries(3, 2, "mean")), built.coarse(3, 2))
    inputs = built.numbers(found, 8)
    term, sizes = found.softmaxes()[0].terms[0], sizes_of(found, inputs)
    mask = visible(found, term, inputs, sizes)[0, 0]
    assert mask.sum(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [max(0, (q + 1 - 3) // 2 + 1) for q in range(8)] == mask.sum(1).tolist()
    # The last three queries alone, behind all keys.
    later = {**inputs, "q": inputs["q"][:, :, -3:]}
    assert torch.equal(visible(found, term, later, sizes_of(found, later))[0, 0], mask[-3:])
    for x, y in zip(attention(found, later), attention(found, inputs), strict=True):
        torch.testing.assert_close(x, y[:, :, -3:])
    assert environment(found, inputs, sizes, "entries").symbols["k"].flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_no_closed_entry_gives_zero_and_no_gradient(rows: int) -> None:
    found = built.pattern(
        (Query("q"), Stream("kv"), built.entries(4, 2, "mlp"), *built.weights(4, "mlp")), built.coarse(4, 2)
    )
    inputs = {name: x.requires_grad_() for name, x in built.numbers(found, rows).items()}
    out, lse = attention(found, inputs)
    assert out[:, :, :3].eq(0).all()
    assert lse[:, :, :3].eq(-inf).all()
    assert lse[:, :, 3:].isfinite().all()
    out.sum().backward()
    for name, x in inputs.items():
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        assert grad.isfinite().all(), name
        assert bool(grad.ne(0).any()) == (rows > 3), name
    assert inputs["q"].grad is not None
    assert inputs["q"].grad[:, :, :3].eq(0).all()


@pytest.mark.parametrize("by", ["mean", "max", "min", "weighted", "mlp"])
def test_gradients_are_those_of_finite_differences(by: str) -> None:
    found = built.pattern(
        (Query("q"), Stream("kv"), built.entries(3, 2, by), *built.weights(3, by)), built.coarse(3, 2)
    )
    inputs = {name: x.requires_grad_() for name, x in built.numbers(found, 6, dim=2).items()}

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(found, dict(zip(inputs, values, strict=True)))
        return out, lse[:, :, 2:]

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_parts_of_a_sequence_are_refused() -> None:
    found = built.pattern((Query("q"), Stream("kv"), built.entries(2, 2, "mean")), built.coarse(2, 2))
    with pytest.raises(ValueError, match="from position 0 on"):
        attention(found, built.numbers(found, 4), q_offset=4, k_offset=4)
