"""A diagnosis beside dense attention that is computed at once, in plain torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import spdsl
from spdsl.diagnosis import Diagnosis, call

PATTERNS = Path(__file__).parents[2] / "patterns"
HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 90, 8
CRITICAL = 0.9


def data(
    heads: int = HEADS, kv_heads: int = KV_HEADS, tokens: int = TOKENS, dim: int = DIM, v: int = DIM
) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "q": 3 * torch.randn(1, heads, tokens, dim, dtype=torch.float64),
        "k": torch.randn(1, kv_heads, tokens, dim, dtype=torch.float64),
        "v": torch.randn(1, kv_heads, tokens, v, dtype=torch.float64),
    }  # fmt: skip


def masses(given: dict[str, Tensor]) -> Tensor:
    """Of causal attention: [heads, N, M]."""
    q, k = given["q"][0], given["k"][0]
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    return torch.softmax(logits.masked_fill(later, -torch.inf), -1)


def share_missed(mass: Tensor, read: Tensor) -> float:
    """By its definition, row by row."""
    shares = []
    for row, own in zip(mass, read, strict=True):
        order = sorted(range(len(row)), key=lambda key: (-row[key].item(), key))
        taken, critical = 0.0, []
        for key in order:
            if taken >= CRITICAL - 1e-12:
                break
            critical.append(key)
            taken += row[key].item()
        shares.append(sum(not own[key] for key in critical) / len(critical))
    return sum(shares) / len(shares)


def shared(read: Tensor, step: int) -> float:
    """The mean share of a row's keys that the row `step` before has."""
    later, earlier = read[step:], read[:-step]
    return ((later & earlier).sum(1).double() / later.sum(1)).mean().item()


def out(mass: Tensor, given: dict[str, Tensor]) -> Tensor:
    values = given["v"][0]
    return mass @ values.repeat_interleave(mass.shape[0] // values.shape[0], 0)


def check(found: Diagnosis, given: dict[str, Tensor], read: Tensor) -> None:
    """All numbers of all heads, where `read` [heads, N, M] are the keys and one softmax reads them."""
    mass = masses(given)
    group = read.view(KV_HEADS, -1, *read.shape[1:]).any(1).repeat_interleave(HEADS // KV_HEADS, 0)
    kept = mass * read
    own, dense = out(kept / kept.sum(-1, keepdim=True), given), out(mass, given)
    causal = read.shape[1] * (read.shape[1] + 1) / 2
    assert [one.head for one in found.whole] == list(range(HEADS))
    for one in found.whole:
        h = one.head
        assert one.kept == pytest.approx(kept[h].sum(-1).mean().item(), abs=1e-12)
        assert one.missed == pytest.approx(share_missed(mass[h], read[h]), abs=1e-12)
        assert one.missed_by_group == pytest.approx(share_missed(mass[h], group[h]), abs=1e-12)
        assert one.error == pytest.approx(((own - dense)[h].norm() / dense[h].norm()).item(), abs=1e-12)
        assert one.sparsity == pytest.approx(1 - read[h].sum().item() / causal, abs=1e-12)
        assert one.union == pytest.approx(group[h].sum().item() / read[h].sum().item(), abs=1e-12)
        assert one.overlap == pytest.approx([shared(read[h], step) for step in (1, 4, 16)], abs=1e-12)


def positions() -> tuple[Tensor, Tensor]:
    return torch.arange(TOKENS)[:, None], torch.arange(TOKENS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows at once, so that sums and overlaps go across pieces."""
    monkeypatch.setattr(call, "_PAIRS", 7 * HEADS * TOKENS)


def test_dense_keeps_everything():
    found = spdsl.diagnose(PATTERNS / "causal.spat", data())
    for one in found.whole:
        assert one.kept == pytest.approx(1, abs=1e-12)
        assert (one.missed, one.missed_by_group, one.sparsity, one.union) == (0, 0, 0, 1)
        assert one.error == pytest.approx(0, abs=1e-12)
    assert found.lost.sum() == 0
    assert found.notes == ()


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
def test_streaming_llm(phase: str):
    q, k = positions()
    read = (k <= q) & ((k < 3) | (q - k < 20))
    found = spdsl.diagnose(PATTERNS / "streaming_llm.spat", data(), phase=phase, sinks=3, window=20)
    check(found, data(), read.expand(HEADS, -1, -1))


def test_heads_that_differ():
    """Group and head differ where heads of a group have other sets."""
    q, k = positions()
    near, strided = (k <= q) & (q - k < 8), (k <= q) & (k % 8 == 7)
    h = torch.arange(HEADS)[:, None, None]
    found = spdsl.diagnose(
        "pattern p { causal return attend(sliding(8) & where(h % 2 == 0) | where(k % 8 == 7 & h % 2 == 1)) }", data()
    )
    own = torch.where(h % 2 == 0, near, strided)
    # A row that reads nothing keeps no mass and has no output: rows before the first strided key.
    rows = own[1].any(-1).logical_not().sum().item()
    assert rows == 7
    assert found.whole[1].kept < found.whole[0].kept
    assert found.whole[1].missed_by_group < found.whole[1].missed
    group = (near | strided).sum() / near.sum()
    assert found.whole[0].union == pytest.approx(group.item())


@pytest.mark.parametrize("phase", ["train", "decode"])
def test_moba(phase: str):
    """Blocks by the mean of their keys, for each head; the own block and two others."""
    given, block = data(), 8
    found = spdsl.diagnose(PATTERNS / "moba.spat", given, phase=phase, block=block, count=3)
    module = spdsl.load(PATTERNS / "moba.spat", block=block, count=3)
    lists = module.choices(**given, phase=phase)["chosen"][0]
    members = torch.zeros(HEADS, TOKENS, -(-TOKENS // block) + 1, dtype=torch.bool)
    members.scatter_(2, torch.where(lists >= 0, lists, -(-TOKENS // block)).long(), True)
    q, k = positions()
    read = members[:, :, k // block] & (k <= q)
    check(found, given, read)
    by_list = {one.head: one for one in found.choices}
    assert len(by_list) == HEADS
    for h, one in by_list.items():
        assert one.units == pytest.approx((lists[h] >= 0).sum(-1).double().mean().item())
        assert one.overlap == pytest.approx([shared(members[h, :, :-1], step) for step in (1, 4, 16)], abs=1e-12)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_threshold_skip(phase: str):
    """What is read are the tiles that the module keeps, whole tiles in each piece."""
    given = data()
    params = {"prefill_scale": 30.0, "decode_scale": 20.0, "rows": 16, "unit": 16, "restart": 32}
    found = spdsl.diagnose(PATTERNS / "blasst.spat", given, phase=phase, **params)
    module = spdsl.load(PATTERNS / "blasst.spat", **params)
    wanted = module.reference(**given, phase=phase)[0]
    dense = out(masses(given), given)
    error = ((wanted - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)).tolist()
    assert [one.error for one in found.whole] == pytest.approx(error, abs=1e-9)
    assert 0 < max(one.sparsity for one in found.whole) < 1
    assert all(0 < one.kept <= 1 for one in found.whole)


def test_branches_of_a_gate():
    """Native Sparse Attention: the whole against the reference of the module, branches by what they read."""
    given = data(64, 4, 60, 192, 128)
    params = {"width": 8, "stride": 4, "block": 16, "count": 3, "window": 12}
    found = spdsl.diagnose(PATTERNS / "nsa.spat", given, **params)
    names = {one.branch for one in found.heads}
    assert names == {None, "coarse", "fine", "near"}
    assert any("gates: random, seed 0" in note for note in found.notes)
    assert any("k_rough: `k` of the data" in note for note in found.notes)
    q, k = torch.arange(60)[:, None], torch.arange(60)
    near = (k <= q) & (q - k < 12)
    mass = masses(given)
    for one in found.heads:
        if one.branch == "near":
            assert one.kept == pytest.approx((mass[one.head] * near).sum(-1).mean().item(), abs=1e-12)
        if one.branch == "coarse":
            assert (one.kept, one.missed, one.union) == (0, 1, None)  # it reads entries and no key
    by_branch = {branch: [one.kept for one in found.heads if one.branch == branch] for branch in names}
    assert all(whole >= part for whole, part in zip(by_branch[None], by_branch["fine"], strict=True))


def test_the_output_is_that_of_the_reference():
    """The error of a gated sum of branches, from `reference` with the arguments that the file gives."""
    given = data(64, 4, 60, 192, 128)
    params = {"width": 8, "stride": 4, "block": 16, "count": 3, "window": 12}
    module = spdsl.load(PATTERNS / "nsa.spat", **params)
    torch.manual_seed(1)
    every = {name: x.double() for name, x in module.example_inputs(1, 60).items()}
    every |= {f"{side}_{stream}": given[side] for side in "kv" for stream in ("rough", "picked", "recent")} | {
        "q": given["q"]
    }
    weights = {name: x for name, x in every.items() if name.startswith("entries_")}
    rest = {name: x for name, x in every.items() if name not in weights}
    found = spdsl.diagnose(PATTERNS / "nsa.spat", rest, weights=weights, phase="train", **params)
    assert found.notes == ()
    wanted = module.reference(**every, **module.choices(**{n: x for n, x in every.items() if n != "gates"}))[0]
    dense = out(masses(given), given)
    error = ((wanted - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)).tolist()
    assert [one.error for one in found.whole] == pytest.approx(error, abs=1e-9)


def test_known_by_hand():
    """Ten keys of equal mass: nine are critical, the first ones, of which a window of four reads three."""
    keys = torch.zeros(1, 1, 10, 4)
    given = {"q": torch.randn(1, 2, 1, 4), "k": keys, "v": torch.randn(1, 1, 10, 4)}
    found = spdsl.diagnose("pattern p { causal return attend(sliding(4)) }", given)
    for one in found.whole:
        assert one.kept == pytest.approx(0.4)
        assert one.missed == pytest.approx(6 / 9)
        assert one.sparsity == pytest.approx(0.6)
        assert one.overlap == (None, None, None)
    assert found.lost.sum().item() == pytest.approx(0.6)
    assert found.lost[9, :6].tolist() == pytest.approx([0.1] * 6)


def test_several_layers_and_their_own_tensors():
    first, second = data(), {name: x.roll(1, 2) for name, x in data().items()}
    given = {f"layers.{i}.{name}": x for i, one in ((2, first), (11, second)) for name, x in one.items()}
    found = spdsl.diagnose(PATTERNS / "streaming_llm.spat", given, sinks=1, window=9)
    assert found.layers == [2, 11]
    alone = spdsl.diagnose(PATTERNS / "streaming_llm.spat", second, sinks=1, window=9)
    assert [one.kept for one in found.whole[HEADS:]] == [one.kept for one in alone.whole]
    only = spdsl.diagnose(PATTERNS / "streaming_llm.spat", given, layers=[11], sinks=1, window=9)
    assert [one.missed for one in only.whole] == [one.missed for one in alone.whole]


def test_a_batch_is_a_mean_of_its_sequences():
    given = data()
    other = {name: x.flip(2) for name, x in given.items()}
    both = {name: torch.cat([x, other[name]]) for name, x in given.items()}
    apart = [spdsl.diagnose(PATTERNS / "moba.spat", one, block=8, count=3) for one in (given, other)]
    found = spdsl.diagnose(PATTERNS / "moba.spat", both, block=8, count=3)
    for one, first, second in zip(found.whole, apart[0].whole, apart[1].whole, strict=True):
        assert one.kept == pytest.approx((first.kept + second.kept) / 2)
        for i in range(3):
            assert one.overlap[i] == pytest.approx((first.overlap[i] + second.overlap[i]) / 2)
    assert torch.allclose(found.lost, (apart[0].lost + apart[1].lost) / 2)


def test_the_last_queries_alone():
    """Chunks: what the last rows of a longer sequence read."""
    given = data()
    late = given | {"q": given["q"][:, :, -20:]}
    found = spdsl.diagnose(PATTERNS / "moba.spat", late, block=8, count=3)
    assert (found.queries, found.keys) == (20, TOKENS)
    whole = masses(given)[:, -20:]
    module = spdsl.load(PATTERNS / "moba.spat", block=8, count=3)
    lists = module.choices(**late)["chosen"][0]
    q, k = torch.arange(TOKENS - 20, TOKENS)[:, None], torch.arange(TOKENS)
    read = (lists.unsqueeze(-1) == k // 8).any(2) & (k <= q)
    for one in found.whole:
        assert one.kept == pytest.approx((whole[one.head] * read[one.head]).sum(-1).mean().item(), abs=1e-12)


EVERY = sorted(path.stem for path in PATTERNS.glob("*.spat"))
SMALL = {
    "big_bird": {"block": 16}, "block_sparse": {"block": 16}, "dilated": {"window": 8, "step": 2},
    "infllm_v2": {}, "longformer": {"window": 8}, "moba": {"block": 16, "count": 2},
    "msa_minimax": {"block": 16, "count": 2}, "seer_attention": {"block": 16}, "sliding_window": {"window": 9},
    "nsa": {"width": 8, "stride": 4, "block": 16, "count": 3, "window": 12}, "sparse_transformer": {"stride": 8},
    "streaming_llm": {"window": 9}, "sink_attention": {"window": 9},
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_every_pattern(name: str):
    """Numbers are shares, and the output that they are about is that of `reference`."""
    sizes = {"nsa": (64, 4, 48, 192, 128), "infllm_v2": (32, 2, 48, 128, 128), "msa_minimax": (64, 4, 48, 128, 128)}
    given = data(*sizes.get(name, (4, 2, 48, 8, 8)))
    found = spdsl.diagnose(PATTERNS / f"{name}.spat", given, **SMALL.get(name, {}))
    assert found.pattern == name
    for one in found.heads:
        assert -1e-12 <= one.kept <= 1 + 1e-12
        assert 0 <= one.missed_by_group <= one.missed <= 1
        assert 0 <= one.sparsity <= 1
        assert all(share is None or 0 <= share <= 1 for share in one.overlap)
        assert one.union is None or one.union >= 1
    lost = found.lost.sum(1)[:48].mean().item()
    assert lost == pytest.approx(1 - sum(one.kept for one in found.whole) / len(found.whole), abs=1e-9)
