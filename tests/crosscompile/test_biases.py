"""Kernels of the gradients of biases on Hopper: they fit, spill nothing and multiply each tile once."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.crosscompile

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import spdsl  # noqa: E402
from tests.crosscompile.kernels import kernels  # noqa: E402

CHOSEN = "c = top_k(2, score = dot(compress(16)), share = max(group), unit = 16, force = last(1))"
BODIES = {
    "buckets": "causal b = tensor(64, int) t = tensor(head, 8) return attend(all, bias = t[h][b[min(q - k, 63)]])",
    "distances": "causal t = tensor(head, 257) return attend(sliding(512), bias = t[h][min(q - k, 256)])",
    "rows and keys": "causal c = tensor(head, token) return attend(all, bias = c[h][q] - c[h][k])",
    "pairs": "p = tensor(query, token) return attend(sliding(512), bias = p[q][k]) if train",
    "tile map": "causal d = tensor(token, int) s = tensor(head) "
    "return attend(where(d[q] == d[k]), bias = s[h] * (k - q))",
    "units": f"causal s = tensor(head) t = tensor(8) {CHOSEN} return attend(c, bias = s[h] * t[min(q - k, 7)])",
    "pairs of units": f"causal p = tensor(query, token) {CHOSEN} return attend(c, bias = p[q][k]) if train",
}  # fmt: skip
USUAL = ("buckets", "rows and keys", "pairs", "pairs of units")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [x if x in USUAL else pytest.param(x, marks=pytest.mark.full) for x in BODIES])
def test_kernels(name: str) -> None:
    module = spdsl.load(f"pattern biases {{ {BODIES[name]} }}")
    wanted = lambda launch: "dbias" in launch.kernel.fn.__name__  # noqa: E731
    found = list(kernels(module, "sm_90", "bf16", (128, 128), ("train",), wanted))
    assert found
    for one in found:
        assert one.ok, f"{one.kernel}: {one.error}"
        assert one.fits, f"{one.kernel}: {one.occupancy}"
        assert one.spills == 0, f"{one.kernel}: {one.spills} spills"
        assert one.tensor_core_instructions > 0, one.kernel
        assert one.computed == 1, f"{one.kernel}: {one.products}"
