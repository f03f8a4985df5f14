"""Strides so large that an index within a tile, times the stride, passes 2^31, in files that are mostly holes."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.interpret

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

import spdsl  # noqa: E402
from spdsl.runtime.launch.gating import gate_backward, gate_forward  # noqa: E402
from spdsl.runtime.launch.launch import delta_of  # noqa: E402
from spdsl.runtime.launch.merging import merge_by_kernel  # noqa: E402
from spdsl.runtime.tiles.kernel import jit  # noqa: E402
from spdsl.runtime.tiles.positions import member_of  # noqa: E402
from spdsl.runtime.tiles.tiles import load_part, store_part  # noqa: E402

TOKEN = 150_000_000  # elements from a token to the next: 16 of them pass 2^31
TOKENS = 17  # two tiles


class Apart:
    """Copies of tensors whose tokens lie TOKEN elements apart, side by side."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.places = memory, count(64, 1 << 20)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, H, N, ..] or [B, N]"""
        axis = 2 if x.dim() > 2 else 1
        strides = list(torch.empty([1 if i == axis else size for i, size in enumerate(x.shape)]).stride())
        strides[axis] = TOKEN
        return self.memory.as_strided(x.shape, strides, next(self.places)).copy_(x)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    path = tmp_path_factory.mktemp("offsets") / "memory"
    return Apart(torch.from_file(str(path), shared=True, size=TOKENS * TOKEN, dtype=torch.float16))


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).half()


def attended(module: Any, given: list[Tensor], dout: Tensor, dlse: Tensor) -> list[Tensor]:
    own = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
    out, lse = module.attention(*own, return_lse=True)
    learned = [x for x in own if x.requires_grad]
    return [out, lse, *torch.autograd.grad([out, lse], learned, [dout, dlse])]


@pytest.mark.parametrize(
    "body",
    [
        "causal return attend(sliding(9))",
        "causal entries = compress(8, 4) return attend(entries)",
        "causal entries = compress(8, 4) rank = dot(entries) "
        "chosen = top_k(1, score = rank, share = max(group), unit = max(16), force = last(1)) return attend(chosen)",
        "causal entries = compress(8, 4) rank = dot(entries) "
        "chosen = top_k(1, score = rank, share = head, unit = max(16), force = last(1)) return attend(chosen)",
    ],
    ids=["ranges", "entries", "units", "pairs"],
)
def test_rows_far_apart(body: str, apart: Apart) -> None:
    module = spdsl.load(f"pattern p {{ {body} }}")
    given = [normal(1, 2, TOKENS, 16), normal(1, 1, TOKENS, 16), normal(1, 1, TOKENS, 24)]
    back = [normal(1, 2, TOKENS, 24), normal(1, 2, TOKENS).float()]
    wanted = attended(module, given, *back)
    found = attended(module, [apart(x) for x in given], apart(back[0]), back[1])
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_values_of_tokens_far_apart(apart: Apart) -> None:
    """The values that a test reads: in the list form, in a bias, and for each head."""
    module = spdsl.load(
        "pattern p { causal a = tensor(token) b = tensor(head, token) "
        "return attend(where(a[k] <= a[q]), bias = b[h][k]) }"
    )
    q, k, v = (normal(1, 2, TOKENS, 16) for _ in "qkv")
    a, b = normal(1, TOKENS), normal(1, 2, TOKENS)
    assert torch.equal(module.attention(q, k, v, apart(a), apart(b)), module.attention(q, k, v, a, b))


@pytest.mark.parametrize("page", [16, None])
def test_cached_tokens_far_apart(page: int | None, apart: Apart) -> None:
    """Rows and pages of the stores."""
    module = spdsl.load("pattern p { causal return attend(all) }")
    q, k, v = (normal(2, 1, TOKENS, 16) for _ in "qkv")
    answers = []
    for form in (lambda x: x, apart):
        table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32) if page else None
        cache = module.Cache(2, 32, kv_heads=1, qk_dim=16, v_dim=16, page=page, page_table=table, dtype=torch.float16)
        if form is apart:
            for stores in (cache.k, cache.v):
                slots = stores["kv"][:, :, :TOKENS].zero_()
                stores["kv"] = apart(slots)
        first = module.prefill(q[:, :, :16], k[:, :, :16], v[:, :, :16], cache)
        answers.append([first, module.decode(q[:, :, 16:], k[:, :, 16:], v[:, :, 16:], cache)])
    assert all(torch.equal(x, y) for x, y in zip(*answers, strict=True))


def test_outputs_and_gates_far_apart(apart: Apart) -> None:
    parts, gates = [normal(1, 2, TOKENS, 16) for _ in range(2)], normal(1, 2, TOKENS, 2)
    own = [apart(x) for x in parts]
    assert torch.equal(gate_forward(own, apart(gates)), gate_forward(parts, gates))
    found, wanted = gate_backward(own[0], own, apart(gates)), gate_backward(parts[0], parts, gates)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    lse = normal(1, 2, TOKENS)
    whole = merge_by_kernel([(own[0], apart(lse)), (own[1], apart(lse))])
    assert torch.equal(whole[0], merge_by_kernel([(parts[0], lse), (parts[1], lse)])[0])
    assert torch.equal(delta_of(own[0], own[1], apart(lse)), delta_of(parts[0], parts[1], lse))


@jit
def copy_tile(x, y, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    tile = load_part(x, WIDTH, ROWS, ROWS, 0, WIDTH, WIDTH, True)
    store_part(y, stride, ROWS, tile, ROWS, 0, WIDTH, WIDTH)


@jit
def read_member(units, found, tile, unit, tiles, most):
    tl.store(found, member_of(units, 0, tile, unit, tiles, most))


def test_stored_rows_far_apart(apart: Apart) -> None:
    x, y = normal(16, 16), apart(normal(1, 1, 16, 16) * 0)
    copy_tile[1,](x, y, TOKEN, ROWS=16, WIDTH=16)
    assert torch.equal(y[0, 0], x)


def test_a_map_of_more_than_two_billion_units(tmp_path: Path) -> None:
    tiles, most = 70_000, 40_000
    units = torch.from_file(str(tmp_path / "map"), shared=True, size=tiles * most, dtype=torch.uint8)
    units[(tiles - 1) * most + 7] = 1
    found = torch.zeros(1, dtype=torch.uint8)
    read_member[1,](units, found, tiles - 1, 7, tiles, most)
    assert found.item() == 1
