"""Tiles that a softmax leaves out while it runs: those of the definition, in every phase, with exact gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Pattern, Phase, Softmax
from spdsl.oracle import dense
from spdsl.oracle.call import Call
from tests.numerics.cases import (
    Inputs,
    Shape,
    assert_same,
    guarded,
    inputs_of,
    meant,
    nan_cache,
    parts_of,
    separate,
)
from tests.numerics.cases import generated as answered
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of
from tests.quick import quick

TILES = "rows = 16, unit = 16"
BODIES = {
    "plain": f"causal return attend(all, skip = below(0.3, {TILES}))",
    "restart": f"causal return attend(all, skip = below(20 / length, {TILES}, restart = 32))",
    "group": f"causal return attend(all, skip = below(0.4, {TILES}, share = group))",
    "level of a head": (
        f"causal x = tensor(head) s = tensor(head) return attend(all, skip = below(x[h], {TILES}), sink_logit = s)"
    ),
    "maps": (
        "causal a = given(rows = 16, unit = 16, share = head) "
        "return attend(a | sliding(9), skip = below(0.3, rows = 16, unit = 32))"
    ),
    "documents": (
        f"causal doc = tensor(token, int) return attend(where(doc[k] == doc[q]), skip = below(0.5, {TILES}))"
    ),
    "ahead, ranges, cap": (
        "return attend(sliding(20, ahead = 3) | sink(20), softcap = 3, bias = (q - k) / 64, "
        "skip = below(0.5, rows = 32, unit = 16))"
    ),
    "value is key": f"causal kv = stream(value = key, v = 16) return attend(all, skip = below(0.4, {TILES}))",
}
BODIES = {name: f"{body} if train" for name, body in BODIES.items()}
ORDERS = ("random", "rising", "falling")
# A step has one query: its heads are the rows that vote.
STEPS = {
    "head": "causal return attend(all, skip = below(0.4, unit = 16, restart = 32)) if decode",
    "group": "causal return attend(sliding(70) | sink(20), skip = below(0.4, unit = 16, share = group)) if decode",
    "level and sink": (
        "causal x = tensor(head) s = tensor(head) "
        "return attend(all, skip = below(x[h] * 30 / length, unit = 32, restart = 64), sink_logit = s) if decode"
    ),
}


def uneven(pattern: Pattern, shape: Shape, order: str = "random") -> Inputs:
    """Inputs whose tiles of keys are of very different sizes, so that some fall far below others."""
    inputs = inputs_of(pattern, shape)
    tiles = -(-shape.keys // 16)
    sizes = torch.rand(tiles, generator=torch.Generator().manual_seed(shape.seed), dtype=torch.float64) ** 2 * 6
    sizes = {"random": sizes, "rising": sizes.sort().values, "falling": sizes.sort(descending=True).values}[order]
    inputs["k"] = inputs["k"] * sizes.repeat_interleave(16)[: shape.keys, None]
    return inputs


def kept_of(pattern: Pattern, inputs: Inputs, **call: int) -> Tensor:
    """The tiles that the first softmax keeps, bool [B, Hq, row tiles, key tiles]."""
    found = Call(pattern, inputs, dense.sizes_of(pattern, inputs, **call))
    return found.kept(pattern.softmaxes()[0])


def drops(kept: Tensor) -> bool:
    """Whether a tile at or below the diagonal is left out."""
    lower = torch.ones(kept.shape[2:], dtype=torch.bool).tril()
    return not bool(kept[..., lower].all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", quick(list(BODIES), ["plain", "maps"]))
def test_results_and_gradients(engine: Engine, name: str, order: str) -> None:
    if engine.name == "interpreted" and order != "random" and name != "plain":
        pytest.skip("the vote is the same")
    pattern = pattern_of(BODIES[name])
    inputs = uneven(pattern, Shape(75, 75, 2, 4, 2), order)
    kept = kept_of(pattern, inputs)
    assert kept.any()
    assert drops(kept) or order != "random"  # keys that grow are kept by right
    found = answered(engine(BODIES[name]), pattern, {key: guarded(x) for key, x in inputs.items()})
    assert_same(found, meant(pattern, inputs))


@pytest.mark.parametrize("offsets", [(5, 0), (40, 16), (61, 32)])
def test_parts_of_a_sequence(engine: Engine, offsets: tuple[int, int]) -> None:
    """Tiles are counted from position 0, wherever the rows of a call begin."""
    pattern, shape = pattern_of(BODIES["restart"]), Shape(37, 61, 1, 2, 1, offsets=offsets)
    inputs = uneven(pattern, shape)
    found = answered(engine(BODIES["restart"]), pattern, {key: guarded(x) for key, x in inputs.items()}, shape.call())
    assert_same(found, meant(pattern, inputs, shape.call()))


def test_keys_begin_with_a_tile(engine: Engine) -> None:
    module, inputs = engine(BODIES["plain"]), uneven(pattern_of(BODIES["plain"]), Shape(20, 20))
    with pytest.raises(ValueError, match="k_offset: expected a multiple of 16"):
        module.attention(**inputs, q_offset=8, k_offset=8)


@pytest.mark.parametrize("name", quick(["plain", "restart", "documents"], ["restart"]))
def test_packed(engine: Engine, name: str) -> None:
    ends = [0, 21, 21, 70, 83]
    pattern = pattern_of(BODIES[name])
    inputs = uneven(pattern, Shape(83, 83, 1, 4, 2))
    packed = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
    found = answered(engine(BODIES[name]), pattern, {key: guarded(x) for key, x in inputs.items()}, packed)
    assert_same(found, separate(pattern, inputs, list(pairwise(ends))))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(engine: Engine, side: str) -> None:
    lengths = [49, 0, 18]
    pattern = pattern_of(BODIES["group"])
    inputs = uneven(pattern, Shape(49, 49, 3, 4, 2))
    out, lse = engine(BODIES["group"]).attention(**inputs, lengths=torch.tensor(lengths), side=side, return_lse=True)
    for row, length in enumerate(lengths):
        real = slice(49 - length, 49) if side == "left" else slice(0, length)
        assert not out[row].abs().sum(dim=(0, 2))[[i not in range(*real.indices(49)) for i in range(49)]].any()
        if length:
            own = {name: x[row : row + 1, :, real] for name, x in inputs.items()}
            ((wanted, wanted_lse),) = dense.results(pattern, own)
            torch.testing.assert_close(out[row : row + 1, :, real], wanted)
            torch.testing.assert_close(lse[row : row + 1, :, real], wanted_lse)


@pytest.mark.parametrize("page", [None, 16, 64])
def test_chunks(engine: Engine, page: int | None) -> None:
    """A tile of rows that a chunk holds in part votes with what it has; pages are smaller and larger than tiles."""
    body = "causal return attend(all, skip = below(0.3, rows = 16, unit = 32)) if prefill"
    module, pattern, shape = engine(body), pattern_of(body), Shape(90, 90, 2, 4, 2)
    inputs = uneven(pattern, shape)
    cache = nan_cache(module, shape, 128, page)
    for first, end in pairwise([0, 37, 64, 65, 90]):
        own = {name: x[:, :, first:end].contiguous() for name, x in inputs.items()}
        (found,) = parts_of(module.prefill(**own, cache=cache, return_lse=True))
        seen = {name: x[:, :, first:end] if name == "q" else x[:, :, :end] for name, x in inputs.items()}
        for x, wanted in zip(found, dense.results(pattern, seen, "prefill")[0], strict=True):
            torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("page", [None, 16, 64])
@pytest.mark.parametrize("name", STEPS)
def test_steps(engine: Engine, name: str, page: int | None) -> None:
    module, pattern, shape = engine(STEPS[name]), pattern_of(STEPS[name]), Shape(150, 150, 2, 4, 2)
    inputs = uneven(pattern, shape)
    cache = nan_cache(module, shape, 192, page)
    vectors = {name: inputs[name] for name in ("q", "k", "v")}
    more = {name: x for name, x in inputs.items() if name not in vectors}
    cache.append(inputs["k"][:, :, :100], inputs["v"][:, :, :100])
    for end in (101, 102, 103):
        own = {name: x[:, :, end - 1 : end].contiguous() for name, x in vectors.items()}
        (found,) = parts_of(module.decode(**own, **more, cache=cache, return_lse=True))
        seen = {name: x[:, :, end - 1 : end] if name == "q" else x[:, :, :end] for name, x in vectors.items()}
        kept = kept_of(pattern, {**seen, **more})
        assert kept.any()
        assert not kept.all()
        for x, wanted in zip(found, dense.results(pattern, {**seen, **more}, "decode")[0], strict=True):
            torch.testing.assert_close(x, wanted)


def test_the_reference_of_a_module(cpu: Engine) -> None:
    """Of whole sequences, and of every row as the last of its own."""
    body = f"{BODIES['plain']}{STEPS['head'].removeprefix('causal')}"
    module, pattern = cpu(body), pattern_of(body)
    inputs = uneven(pattern, Shape(40, 40, 1, 4, 2))
    for phase, rows in (("train", [slice(0, 40)]), ("decode", [slice(i, i + 1) for i in range(40)])):
        found = module.reference(**inputs, phase=phase)
        for row in rows:
            own = {name: x[:, :, row if name == "q" else slice(0, row.stop)] for name, x in inputs.items()}
            torch.testing.assert_close(found[:, :, row], dense.attention(pattern, own, phase)[0])


COUNTED = (
    "causal step = attend(all, skip = below(0.4, unit = 16, restart = 32)) return step, kept(step) if decode "
    "long = attend(all, skip = below(0.3, rows = 16, unit = 16{more})) return long, kept(long)"
)


def counts_of(pattern: Pattern, inputs: Inputs, phase: str = "train", **call: int) -> Tensor:
    found = dense.results(pattern, inputs, phase, **call)[1]
    assert isinstance(found, Tensor)
    return found


def kept_of_case(pattern: Pattern, inputs: Inputs, phase: str) -> Tensor:
    (case,) = pattern.cases_of(Phase(phase))
    assert isinstance(case.branch, Softmax)
    return Call(pattern, inputs, dense.sizes_of(pattern, inputs)).kept(case.branch)


@pytest.mark.parametrize("more", ["", ", share = group"])
def test_counts(engine: Engine, more: str) -> None:
    """How many tiles are kept and seen: of whole sequences, of parts, of packed ones, of chunks and of steps."""
    body = COUNTED.format(more=more)
    module, pattern, shape = engine(body), pattern_of(body), Shape(75, 75, 2, 4, 2)
    inputs = uneven(pattern, shape)
    _, found = module.attention(**inputs)
    wanted = counts_of(pattern, inputs)
    assert torch.equal(found, wanted)
    assert torch.equal(wanted[..., 0], kept_of_case(pattern, inputs, "train").sum(-1).int())
    assert wanted[0, 0, :, 1].tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(module.reference(**inputs)[1], wanted)
    for part in (slice(37, 75), slice(74, 75)):
        own = {**inputs, "q": inputs["q"][:, :, part]}
        assert torch.equal(module.attention(**own)[1], counts_of(pattern, own))

    ends = [0, 21, 21, 75]
    packed = {name: x[:1] for name, x in inputs.items()}
    _, found = module.attention(**packed, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    for s, (first, end) in enumerate(pairwise(ends)):
        own = {name: x[:, :, first:end] for name, x in packed.items()}
        wanted = counts_of(pattern, own)[0] if first < end else torch.zeros(4, 0, 2, dtype=torch.int32)
        assert torch.equal(found[s, :, : wanted.shape[1]], wanted)
        assert not found[s, :, wanted.shape[1] :].any()

    cache = nan_cache(module, shape, 128, 16)
    for phase, first, end in (("prefill", 0, 37), ("prefill", 37, 74), ("decode", 74, 75)):
        own = {name: x[:, :, first:end].contiguous() for name, x in inputs.items()}
        _, found = getattr(module, phase)(**own, cache=cache)
        seen = {name: x[:, :, first:end] if name == "q" else x[:, :, :end] for name, x in inputs.items()}
        wanted = counts_of(pattern, seen, phase)
        assert torch.equal(found[:, :, : wanted.shape[2]], wanted)
        assert not found[:, :, wanted.shape[2] :].any()


def test_counts_of_every_row_as_a_step(cpu: Engine) -> None:
    pattern = pattern_of(COUNTED.format(more=""))
    inputs = uneven(pattern, Shape(40, 40, 1, 4, 2))
    out, found = cpu(COUNTED.format(more="")).reference(**inputs, phase="decode")
    assert out.shape == inputs["q"].shape
    for i in range(40):
        own = {name: x[:, :, i : i + 1] if name == "q" else x[:, :, : i + 1] for name, x in inputs.items()}
        assert torch.equal(found[:, :, i : i + 1], counts_of(pattern, own, "decode"))


@pytest.mark.slow
def test_counts_in_a_graph(cpu: Engine) -> None:
    """A compiled training step, and compiled steps of generation."""
    body = COUNTED.format(more="")
    module, pattern, shape = cpu(body), pattern_of(body), Shape(40, 40, 2, 4, 2)
    inputs = uneven(pattern, shape)
    compiled = torch.compile(lambda **x: module.attention(**x), fullgraph=True, backend="aot_eager")
    vectors = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, counts = compiled(**vectors)
    out.sum().backward()
    again = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    module.attention(**again)[0].sum().backward()
    assert torch.equal(counts, module.attention(**inputs)[1])
    assert all(torch.equal(vectors[name].grad, again[name].grad) for name in inputs)
    caches = [module.Cache(2, 64, kv_heads=2, qk_dim=16, v_dim=16, dtype=torch.float64) for _ in range(2)]
    step = torch.compile(lambda cache, **x: module.decode(**x, cache=cache), fullgraph=True, backend="aot_eager")
    chunk = torch.compile(lambda cache, **x: module.prefill(**x, cache=cache), fullgraph=True, backend="aot_eager")
    for run, plain, rows in ((chunk, module.prefill, slice(0, 33)), (step, module.decode, slice(33, 34))):
        own = {name: x[:, :, rows].contiguous() for name, x in inputs.items()}
        for x, wanted in zip(run(caches[0], **own), plain(**own, cache=caches[1]), strict=True):
            assert torch.equal(x, wanted)


@pytest.mark.parametrize(
    "level, dropped", [("0.0000000000000001", False), ("0", False), ("-1", False), ("1", True), ("5", True)]
)
def test_levels_at_the_ends(cpu: Engine, level: str, dropped: bool) -> None:
    """0 and less keep all; 1 and more drop what does not reach the maximum so far, never all of a row."""
    body = f"causal return attend(all, skip = below({level}, {TILES})) if train"
    pattern = pattern_of(body)
    inputs = uneven(pattern, Shape(75, 75, 1, 2, 1))
    assert drops(kept_of(pattern, inputs)) is dropped
    found, lse = cpu(body).attention(**inputs, return_lse=True)
    torch.testing.assert_close(found, dense.attention(pattern, inputs)[0])
    assert lse.isfinite().all()


def test_nan_keeps_its_tile(engine: Engine) -> None:
    """NaN reaches the rows that see it, and no other one."""
    pattern = pattern_of(BODIES["plain"])
    inputs = uneven(pattern, Shape(64, 64, 1, 1, 1), "falling")
    inputs["k"][:, :, 40] = torch.nan
    out = engine(BODIES["plain"]).attention(**inputs)
    assert out.isnan().any(-1).flatten().tolist() == [q >= 40 for q in range(64)]
