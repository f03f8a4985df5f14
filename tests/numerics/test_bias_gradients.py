"""Gradients of what a bias reads: slopes, scalars, tables by distance or bucket, rows, keys, pairs; in every visit."""

from __future__ import annotations

import pytest

from tests.numerics.cases import Shape, checked
from tests.numerics.conftest import Engine

READS = {
    "slopes": "causal s = tensor(head) return attend(all, bias = -s[h] * (q - k))",
    "scalar": "a = tensor() return attend(all, bias = a * min(abs(q - k), 9))",
    "buckets": "causal b = tensor(24, int) t = tensor(head, 40) return attend(all, bias = t[h][b[min(q - k, 23)]])",
    "distances": "causal t = tensor(33) return attend(all, bias = t[min(q - k, 32)])",
    "two axes": "t = tensor(6, kv_head, 7) return attend(all, bias = t[q // 9][h][(q + k) % 7])",
    "keys": "causal c = tensor(token) return attend(all, bias = 2 * c[k])",
    "rows and keys": "causal c = tensor(head, token) return attend(all, bias = c[h][q] - c[h][k])",
    "pairs": "p = tensor(token, token) return attend(all, bias = p[q][k])",
    "pairs of heads": "p = tensor(head, token, token) return attend(all, softcap = 2, bias = p[h][q][k] / 2)",
    "products": "causal s = tensor(head) t = tensor(16) "
    "return attend(all, bias = s[h] * t[(q - k) // 4] + t[3] * s[h // 2])",
}


@pytest.mark.parametrize("name", READS)
def test_reads(engine: Engine, name: str) -> None:
    _checked(READS[name], engine)


def _checked(body: str, engine: Engine) -> None:
    """Every result and gradient, and no gradient of a tensor that is 0 for want of one."""
    found = checked(body, Shape(50, 50, batch=2, heads=4, kv_heads=2), module=engine(body))
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
    "keys outermost": f"causal {SLOPES} c = top_k(2, score = dot(compress(16)), share = head, unit = 16) "
    f"return attend(c, {BIAS})",
    "chosen and near": f"causal {SLOPES} {CHOSEN} return attend(c | sliding(9), {BIAS})",
}  # fmt: skip


@pytest.mark.parametrize("name", VISITS)
def test_visits(engine: Engine, name: str) -> None:
    _checked(VISITS[name], engine)
