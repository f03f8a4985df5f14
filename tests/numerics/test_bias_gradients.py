"""Gradients of what a bias reads: slopes, scalars, tables by distance or bucket, rows, keys, pairs; in every visit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from spdsl.ir.pattern import Tensor
from spdsl.oracle import dense
from tests.numerics.cases import Shape, assert_same, checked, generated, inputs_of, meant, separate
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of

READS = {
    "slopes": "causal s = tensor(head) return attend(all, bias = -s[h] * (q - k))",
    "scalar": "a = tensor() return attend(all, bias = a * min(abs(q - k), 9))",
    "buckets": "causal b = tensor(24, int) t = tensor(head, 40) return attend(all, bias = t[h][b[min(q - k, 23)]])",
    "distances": "causal t = tensor(33) return attend(all, bias = t[min(q - k, 32)])",
    "two axes": "t = tensor(6, kv_head, 7) return attend(all, bias = t[q // 9][h][(q + k) % 7])",
    "keys": "causal c = tensor(token) return attend(all, bias = 2 * c[k])",
    "rows and keys": "causal c = tensor(head, token) return attend(all, bias = c[h][q] - c[h][k])",
    "pairs": "p = tensor(token, token) return attend(all, bias = p[q][k])",
    "pairs of rows": "p = tensor(query, token) s = tensor(head) return attend(all, bias = s[h] * p[q][k])",
    "rows of the call": "p = tensor(query, 5) return attend(all, bias = p[q][h % 5] * k)",
    "pairs of heads": "p = tensor(head, token, token) return attend(all, softcap = 2, bias = p[h][q][k] / 2)",
    "products": "causal s = tensor(head) t = tensor(16) "
    "return attend(all, bias = s[h] * t[(q - k) // 4] + t[3] * s[h // 2])",
}


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.quick) if x == "buckets" else x for x in READS])
def test_reads(engine: Engine, name: str) -> None:
    _checked(READS[name], engine)


def _checked(body: str, engine: Engine, batch: int = 2) -> None:
    """Every result and gradient, and no gradient of a tensor that is 0 for want of one."""
    many = {"heads": 4, "kv_heads": 2} if engine.name == "cpu" or "kv_head" in body else {}
    found = checked(body, Shape(34, 34, batch=batch, **many), module=engine(body))
    assert all(grad.any() for grad in found.grads.values())


SLOPES = "s = tensor(head) t = tensor(12) "
CHOSEN = "c = top_k(2, score = dot(compress(16)), share = max(group), unit = 16)"
BIAS = "bias = s[h] * t[abs(q - k) % 12]"
VISITS = {
    "ranges": f"causal {SLOPES} return attend(sink(4) | sliding(20), {BIAS})",
    "tile map": f"causal {SLOPES} doc = tensor(token, int) return attend(where(doc[k] == doc[q]), {BIAS})",
    "pairs in tiles": "p = tensor(token, token) d = tensor(token, int) "
    "return attend(where(d[k] == d[q]), bias = p[q][k])",
    "keys in tiles": "c = tensor(token) d = tensor(token, int) return attend(where(d[k] <= d[q]), bias = c[k] * c[q])",
    "in both": "causal x = tensor(token) return attend(where(x[k] <= x[q]), bias = x[k] * x[q])",
    "by length": "causal p = tensor(query, token) t = tensor(12) "
    "return attend(sliding(9), bias = p[q][k]) if length < 19 return attend(all, bias = t[(q + k) % 12] + 2 * p[q][k])",
    "sink": f"causal {SLOPES} z = tensor(head) return attend(sliding(20), sink_logit = z, {BIAS})",
    "joint": f"causal {SLOPES} return merge(attend(sliding(9), {BIAS}), attend(sink(4) - sliding(9), bias = s[h] * q))",
    "classes": "causal s = tensor(head) return attend(dilated(12, 3), bias = s[h] * (k - q))",
    "streams": f"causal {SLOPES} far = stream() return attend(kv[sliding(9)] | far[all - sliding(9)], {BIAS})",
    "entries": f"causal {SLOPES} return attend(compress(8, 4), {BIAS})",
    "gate": f"causal {SLOPES} return gate(attend(sliding(16), {BIAS}), attend(sink(4), bias = s[h] * k))",
    "units": f"causal {SLOPES} {CHOSEN} return attend(c, {BIAS})",
    "rows of units": f"causal x = tensor(token) {CHOSEN} return attend(c, bias = x[q] * (q - k))",
    "short units": f"causal {SLOPES} c = top_k(3, score = dot(compress(4)), share = max(group), unit = 4) "
    f"return attend(c, {BIAS})",
    "tables of heads": f"causal t = tensor(kv_head, 20) {CHOSEN} return attend(c, bias = t[h][q - k])",
    "pairs of units": f"p = tensor(query, token) {CHOSEN} return attend(c, bias = p[q][k])",
    "pairs of heads and units": f"p = tensor(head, query, token) {CHOSEN} return attend(c, bias = p[h][q][k])",
    "pairs of short units": "p = tensor(kv_head, token, token) "
    "c = top_k(3, score = dot(compress(4)), share = max(group), unit = 4) return attend(c, bias = p[h][q][k])",
    "tables by row and by key": "a = tensor(7) b = tensor(5) "
    "c = top_k(2, score = dot(compress(16)), share = head, unit = 16) return attend(c, bias = a[q // 5] * b[k % 5])",
    "keys outermost": f"causal {SLOPES} c = top_k(2, score = dot(compress(16)), share = head, unit = 16) "
    f"return attend(c, {BIAS})",
    "chosen and near": f"causal {SLOPES} {CHOSEN} return attend(c | sliding(9), {BIAS})",
}  # fmt: skip


@pytest.mark.parametrize("name", VISITS)
def test_visits(engine: Engine, name: str) -> None:
    _checked(VISITS[name], engine, batch=1 if engine.name == "interpreted" else 2)


EVERY = {
    name: {**READS, **VISITS}[name]
    for name in (
        "slopes",
        "buckets",
        "two axes",
        "rows and keys",
        "tile map",
        "joint",
        "classes",
        "streams",
        "sink",
        "by length",
    )
}


@pytest.mark.parametrize("name", EVERY)
def test_packed_sequences(engine: Engine, name: str) -> None:
    """One is empty and one has a single token; of a tensor without tokens the gradient is that of all of them."""
    if engine.name == "interpreted" and name not in ("buckets", "rows and keys", "joint", "by length"):
        pytest.skip("for the CPU path")
    ends = [0, 19, 19, 20, 37]
    pattern, module = pattern_of(EVERY[name]), engine(EVERY[name])
    inputs = inputs_of(pattern, Shape(37, 37, heads=4, kv_heads=2))
    found = generated(module, pattern, inputs, {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)})
    assert_same(found, separate(pattern, inputs, list(pairwise(ends))))


@pytest.mark.parametrize("name", ["slopes", "buckets", "rows and keys", "tile map"])
def test_left_padding(engine: Engine, name: str) -> None:
    """A batch row has what a call of its own has, and a tensor of all rows the sum of that."""
    if engine.name == "interpreted" and name not in ("buckets", "rows and keys"):
        pytest.skip("for the CPU path")
    lengths, size = [21, 1, 0, 17], 21
    pattern, module = pattern_of(EVERY[name]), engine(EVERY[name])
    inputs = inputs_of(pattern, Shape(size, size, batch=4))
    found = generated(module, pattern, inputs, {"lengths": torch.tensor(lengths)}, lse_gradient=False)
    weights = torch.randn(found.parts[0][0].shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    own = {name: x.clone().requires_grad_(name in found.grads) for name, x in inputs.items()}
    total = torch.zeros((), dtype=torch.float64)
    along = {x.name: x.axes.index("token") + 1 for x in pattern.inputs if isinstance(x, Tensor) and "token" in x.axes}
    for row, length in enumerate(lengths):
        cut = dict.fromkeys(("q", "k", "v"), 2) | along
        part = {
            name: x[row : row + 1].narrow(cut[name], size - length, length) if name in cut else x
            for name, x in own.items()
        }
        ((out, _),) = dense.results(pattern, part)
        total = total + (out * weights[row : row + 1, :, size - length :]).sum()
    wanted = torch.autograd.grad(total, [own[name] for name in found.grads])
    for name, grad in zip(found.grads, wanted, strict=True):
        torch.testing.assert_close(
            found.grads[name], grad, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("rows, keys, offsets", [(17, 40, None), (40, 17, None), (9, 20, (11, 0)), (9, 20, (21, 4))])
@pytest.mark.parametrize("name", ["slopes", "buckets", "rows and keys"])
def test_other_rows_and_keys(engine: Engine, name: str, rows: int, keys: int, offsets: tuple[int, int] | None) -> None:
    checked(EVERY[name], Shape(rows, keys, batch=2, offsets=offsets), module=engine(EVERY[name]))


SHARED = {
    "of all rows": ("p = tensor(token, token) return attend(sliding(30), bias = p[q][k] * 2)", (1, 20, 20)),
    "of each": ("p = tensor(token, token) return attend(sliding(30), bias = p[q][k] * 2)", (3, 20, 20)),
    "heads of all": ("p = tensor(kv_head, token, token) return attend(all, bias = p[h][q][k])", (1, 2, 20, 20)),
    "tables of each": ("causal t = tensor(head, 9) return attend(all, bias = t[h][min(q - k, 8)])", (3, 4, 9)),
    "one number": ("causal a = tensor() return attend(all, bias = a * (k - q))", (1,)),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_tensor_of_all_batch_rows_gets_the_sum_of_theirs(engine: Engine, name: str) -> None:
    body, size = SHARED[name]
    pattern, module = pattern_of(body), engine(body)
    inputs = inputs_of(pattern, Shape(20, 20, batch=3, heads=4, kv_heads=2))
    learned = next(x.name for x in pattern.inputs if isinstance(x, Tensor))
    inputs[learned] = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = generated(module, pattern, inputs)
    assert_same(found, meant(pattern, inputs))
    assert found.grads[learned].shape == size


@pytest.mark.parametrize("name", ["products", "rows and keys", "pairs of heads"])
def test_float32(engine: Engine, name: str) -> None:
    pattern, module = pattern_of(READS[name]), engine(READS[name])
    inputs = inputs_of(pattern, Shape(34, 34, batch=2, heads=2, kv_heads=1))
    found = generated(module, pattern, {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()})
    assert_same(found, meant(pattern, inputs), 2e-4)


TIES = {
    "maximum": "s = tensor(3) return attend(all, bias = max(s[0], s[1]) * k + min(s[1], min(s[2], s[0])) * q)",
    "absolute": "s = tensor(3) return attend(all, bias = abs(s[0] - s[1]) * k + sqrt(abs(s[2]) + 1) * k)",
    "quotients": "s = tensor(3) return attend(all, bias = k / (1 + s[0] * s[0] + abs(s[1])) + s[2] % 3)",
}


@pytest.mark.parametrize("name", TIES)
def test_ties_are_shared_as_torch_does(engine: Engine, name: str) -> None:
    module, pattern = engine(TIES[name]), pattern_of(TIES[name])
    inputs = inputs_of(pattern, Shape(20, 20))
    inputs["s"] = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64) * (name != "absolute")
    s = inputs["s"].clone().requires_grad_()
    out = module.attention(**{**inputs, "s": s})
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (found,) = torch.autograd.grad((out * weights).sum(), s)
    (wanted,) = torch.autograd.grad((module.reference(**{**inputs, "s": s}) * weights).sum(), s)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
