"""The float64 meaning of patterns against numbers worked out by hand and independent formulas."""

from __future__ import annotations

from math import exp, inf, log

import pytest
import torch
from torch import Tensor

from spdsl.diagnostics import Report, Source
from spdsl.ir.pattern import Pattern
from spdsl.oracle.dense import attention, results, sizes_of, visible
from spdsl.passes.lower import lower
from spdsl.syntax.parse import parse


def pattern(body: str) -> Pattern:
    report = Report(Source(f"pattern p {{ {body} }}"))
    lowered = lower(parse(report.source, report).patterns[0], report)
    report.check()
    assert lowered is not None
    return lowered


def qkv(rows: int, keys: int | None = None, heads: int = 1, kv_heads: int = 1, dim: int = 4) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(rows)
    sizes = {"q": (heads, rows), "k": (kv_heads, keys or rows), "v": (kv_heads, keys or rows)}
    return {name: torch.randn(1, *size, dim, generator=make, dtype=torch.float64) for name, size in sizes.items()}


def seen(body: str, inputs: dict[str, Tensor], **offsets: int) -> Tensor:
    """The mask of the first term, [Hq, N, M]."""
    found = pattern(body)
    return visible(found, found.softmaxes()[0].terms[0], inputs, sizes_of(found, inputs, **offsets))[0]


def rows_of(mask: Tensor) -> list[str]:
    return ["".join(".#"[int(one)] for one in row) for row in mask]


def torch_attention(inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
    group = inputs["q"].shape[1] // inputs["k"].shape[1]
    k, v = (inputs[name].repeat_interleave(group, 1) for name in "kv")
    return torch.nn.functional.scaled_dot_product_attention(inputs["q"], k, v, attn_mask=mask)


def test_causal_three_by_three_by_hand() -> None:
    inputs = {
        "q": torch.tensor([1.0, 1.0, 2.0]).view(1, 1, 3, 1),
        "k": torch.tensor([0.0, log(3.0), log(2.0)]).view(1, 1, 3, 1),
        "v": torch.tensor([1.0, 5.0, 10.0]).view(1, 1, 3, 1),
    }
    out, lse = attention(pattern("causal return attend(all)"), inputs)
    # Weights: 1 | 1, 3 | 1, 9, 4.
    assert out.flatten().tolist() == pytest.approx([1, 16 / 4, (1 + 45 + 40) / 14], abs=1e-6)
    assert lse.flatten().tolist() == pytest.approx([0, log(4), log(14)], abs=1e-6)
    assert out.dtype == lse.dtype == torch.float64


@pytest.mark.parametrize(
    "body, picture",
    [
        ("causal return attend(sliding(2))", ["#...", "##..", ".##.", "..##"]),
        ("causal return attend(sliding(1) | sink(1))", ["#...", "##..", "#.#.", "#..#"]),
        ("return attend(where(q // 3 == k // 3))", ["###.", "###.", "###.", "...#"]),
        ("causal return attend(all - sliding(2))", ["....", "....", "#...", "##.."]),
        ("return attend(where(2 * k < length) & where(h == 0))", ["##..", "##..", "##..", "##.."]),
        ("return attend(where(q / 3 < k / 2))", [".###", ".###", "..##", "...#"]),
        ("return attend(where((q + k) % 3 == 0))", ["#..#", "..#.", ".#..", "#..#"]),
    ],
)
def test_sets_as_pictures(body: str, picture: list[str]) -> None:
    assert rows_of(seen(body, qkv(4))[0]) == picture


def test_steps_are_exact_where_floats_are_not() -> None:
    mask = seen("return attend(where(q // 49 == k // 49))", qkv(100))[0]
    assert torch.equal(mask, torch.arange(100)[:, None] // 49 == torch.arange(100) // 49)


def test_fewer_queries_stand_at_the_end_and_offsets_place_parts() -> None:
    assert rows_of(seen("causal return attend(all)", qkv(2, 4))[0]) == ["###.", "####"]
    assert rows_of(seen("causal return attend(all)", qkv(4, 2))[0]) == ["..", "..", "#.", "##"]
    assert rows_of(seen("causal return attend(sliding(3))", qkv(2, 4), q_offset=5, k_offset=2)[0]) == [".###", "..##"]


def test_empty_rows() -> None:
    inputs = {name: x.requires_grad_() for name, x in qkv(4, 2).items()}
    out, lse = attention(pattern("causal return attend(all)"), inputs)
    assert out[0, 0, :2].eq(0).all()
    assert lse[0, 0, :2].tolist() == [-inf, -inf]
    (out.sum() + lse[..., 2:].sum()).backward()
    assert inputs["q"].grad is not None
    assert inputs["q"].grad[0, 0, :2].eq(0).all()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.ne(0).any() for x in inputs.values())


def test_sink_logit_is_in_the_denominator_only() -> None:
    inputs = {**qkv(3, heads=2), "s": torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)}
    plain_out, plain_lse = attention(pattern("causal return attend(sliding(2))"), inputs)
    out, lse = attention(pattern("causal s = tensor(head) return attend(sliding(2), sink_logit = s)"), inputs)
    sink = inputs["s"].view(1, 2, 1)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sink.expand_as(plain_lse)))
    torch.testing.assert_close(out, plain_out * torch.exp(plain_lse - lse).unsqueeze(-1))
    lse.sum().backward()
    assert inputs["s"].grad is not None
    torch.testing.assert_close(inputs["s"].grad, torch.exp(sink - lse).sum((0, 2)).detach())


def test_sink_logit_of_an_empty_row_is_its_lse() -> None:
    inputs = {**qkv(3, 1), "s": torch.tensor([0.25])}
    out, lse = attention(pattern("causal s = tensor(head) return attend(all, sink_logit = s)"), inputs)
    assert out[0, 0, :2].eq(0).all()
    assert lse[0, 0, :2].tolist() == [0.25, 0.25]


def test_merge_is_one_softmax_over_the_union() -> None:
    inputs = {name: x.requires_grad_() for name, x in qkv(9, heads=2).items()}
    parts = pattern("causal return merge(attend(sliding(3)), attend(sink(2) - sliding(3)))")
    whole = pattern("causal return attend(sliding(3) | sink(2))")
    found, wanted = attention(parts, inputs), attention(whole, inputs)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum() + lse.sum(), list(inputs.values())) for out, lse in (found, wanted)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_merge_of_empty_rows() -> None:
    inputs = {name: x.requires_grad_() for name, x in qkv(4, 2).items()}
    out, lse = attention(pattern("causal return merge(attend(sliding(1)), attend(all - sliding(1)))"), inputs)
    assert lse[0, 0].isinf().tolist() == [True, True, False, False]
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs.values())


def test_gate_sums_branches_and_returns_each_lse() -> None:
    inputs = {**qkv(5, heads=2), "gates": torch.rand(1, 2, 5, 2, dtype=torch.float64)}
    out, lse = attention(pattern("causal return gate(attend(sliding(2)), attend(sink(1)))"), inputs)
    near, near_lse = attention(pattern("causal return attend(sliding(2))"), inputs)
    far, far_lse = attention(pattern("causal return attend(sink(1))"), inputs)
    torch.testing.assert_close(out, inputs["gates"][..., :1] * near + inputs["gates"][..., 1:] * far)
    torch.testing.assert_close(lse, torch.stack([near_lse, far_lse], -1))


def test_grouped_heads_follow_torch() -> None:
    inputs = qkv(6, heads=6, kv_heads=2)
    mask = seen("causal return attend(sliding(3))", inputs)
    out, _ = attention(pattern("causal return attend(sliding(3))"), inputs)
    torch.testing.assert_close(out, torch_attention(inputs, mask))


def test_kv_head_axis_is_read_by_group() -> None:
    inputs = {**qkv(3, heads=4, kv_heads=2), "broad": torch.tensor([True, False])}
    mask = seen("broad = tensor(kv_head, bool) causal return attend(sliding(1) | where(broad[h] == 1))", inputs)
    assert mask.sum((1, 2)).tolist() == [6, 6, 3, 3]


def test_token_tensor_and_reads_outside_of_it() -> None:
    inputs = {**qkv(4), "doc": torch.tensor([[0, 0, 1, 1]])}
    body = "doc = tensor(token, int) return attend(where(doc[q] == doc[k - 1]))"
    # doc[-1] reads 0.
    assert rows_of(seen(body, inputs)[0]) == ["###.", "###.", "...#", "...#"]


def test_bias_and_softcap_and_scale() -> None:
    inputs = {**qkv(4, heads=2), "slope": torch.tensor([0.5, 0.25], dtype=torch.float64)}
    body = "slope = tensor(head) causal return attend(all, scale = 2, softcap = 1.5, bias = -slope[h] * (q - k))"
    _, lse = attention(pattern(body), inputs)
    q, k = inputs["q"][0, 1, 1], inputs["k"][0, 0]
    logits = [1.5 * torch.tanh(2 * (q @ k[j]) / 1.5) - 0.25 * (1 - j) for j in (0, 1)]
    assert lse[0, 1, 1].item() == pytest.approx(log(sum(exp(x) for x in logits)))


def test_two_streams_in_one_softmax_and_another_query() -> None:
    inputs = {**qkv(5), **{f"{name}_far": x for name, x in qkv(5).items()}, "ask": qkv(5)["q"]}
    joint = pattern("causal far = stream() ask = query() return attend(kv[sliding(2)] | far[all - sliding(2)], ask)")
    out, lse = attention(joint, inputs)
    wanted = attention(pattern("causal return attend(all)"), inputs)
    torch.testing.assert_close(out, wanted[0])
    torch.testing.assert_close(lse, wanted[1])


def test_values_are_the_first_columns_of_the_keys() -> None:
    inputs = qkv(3)
    out, _ = attention(pattern("causal kv = stream(value = key, v = 2) return attend(all)"), inputs)
    wanted, _ = attention(pattern("causal return attend(all)"), {**inputs, "v": inputs["k"][..., :2]})
    torch.testing.assert_close(out, wanted)


def test_given_lists_may_repeat_and_come_in_any_order() -> None:
    inputs = {**qkv(4, heads=2), "near": torch.tensor([[[[1, 0, 1, -1]], [[-1, -1, 2, 9]]]]).view(1, 1, 2, 4)}
    mask = seen("near = given(rows = 2, unit = 2) return attend(near)", inputs)
    assert rows_of(mask[1]) == ["####", "####", "....", "...."]
    inputs = {**qkv(3, 4), "near": torch.tensor([0, -1, 1, 1]).view(1, 1, 2, 2)}
    # Positions 1 to 3: the lists begin with row tile 0 of two rows.
    assert rows_of(seen("near = given(rows = 2, unit = 2) return attend(near)", inputs)[0]) == ["##..", "..##", "..##"]


def test_a_wrong_number_of_row_tiles_is_refused() -> None:
    inputs = {**qkv(4), "near": torch.zeros(1, 1, 3, 1, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"near: expected .* 2 row tiles"):
        seen("near = given(rows = 2, unit = 2) return attend(near)", inputs)


def test_random_draws_visible_units_and_does_not_depend_on_the_call() -> None:
    body = "causal r = random(2, unit = 4, rows = 8, seed = 3) return attend(r)"
    inputs = qkv(64, heads=4, kv_heads=2)
    whole = seen(body, inputs)
    units = whole.unflatten(2, (16, 4)).any(3)[:, 7::8]  # the last row of each tile sees its units whole
    assert units.sum(2).eq(2).all()
    assert not torch.equal(whole[0], whole[1])
    part = {name: x[:, :, :52] for name, x in inputs.items()}
    assert torch.equal(seen(body, {**part, "q": part["q"][:, :, -9:]}), whole[:, 43:52, :52])
    shared = seen(body.replace("seed = 3", "share = group"), inputs)
    assert torch.equal(shared[0], shared[1])
    assert not torch.equal(shared[1], shared[2])


def test_the_hash_of_random_in_plain_integers() -> None:
    def mixed(x: int) -> int:
        x = (x + 0x1E3779B97F4A7C15) % 2**63
        x = (x ^ (x >> 30)) * 0x3F58476D1CE4E5B9 % 2**63
        x = (x ^ (x >> 27)) * 0x14D049BB133111EB % 2**63
        x ^= x >> 31
        return x - x % 2

    mask = seen("r = random(3, unit = 2, rows = 4, seed = 5) return attend(r)", qkv(16, heads=2))
    for head in range(2):
        for tile in range(4):
            ranks = sorted(range(8), key=lambda unit: mixed(mixed(mixed(5 + head) + tile) + unit))
            wanted = {2 * unit + i for unit in ranks[:3] for i in (0, 1)}
            assert set(mask[head, 4 * tile].nonzero().flatten().tolist()) == wanted


def test_cases_by_phase_and_by_row_of_the_batch() -> None:
    found = pattern(
        "causal broad = tensor(bool)\n return attend(sink(1)) if decode\n return attend(all) if broad == 1\n"
        "return attend(sliding(1))"
    )
    inputs = {name: x.repeat(2, 1, 1, 1) for name, x in qkv(3).items()}
    inputs["broad"] = torch.tensor([True, False])
    out, _ = attention(found, inputs)
    torch.testing.assert_close(out[1], inputs["v"][1])
    torch.testing.assert_close(out[:1], attention(pattern("causal return attend(all)"), qkv(3))[0])
    out, _ = attention(found, inputs, "decode")
    torch.testing.assert_close(out, inputs["v"][:, :, :1].expand_as(out))


def test_a_phase_without_a_result_is_an_error_and_extras_are_results() -> None:
    found = pattern("causal return attend(all), attend(sink(1)) if train")
    first, second = results(found, qkv(3))
    assert not torch.equal(first[0], second[0])
    with pytest.raises(ValueError, match="no result covers"):
        attention(found, qkv(3), "decode")


def test_gradients_are_those_of_finite_differences() -> None:
    found = pattern("causal s = tensor(head) return attend(sliding(2) | sink(1), softcap = 2, sink_logit = s)")
    inputs = [x.requires_grad_() for x in (*qkv(4, heads=2).values(), torch.zeros(2, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda q, k, v, s: attention(found, {"q": q, "k": k, "v": v, "s": s}), inputs)
