"""fp32, fp16 and bf16: at most twice the greatest and 1.1 times the mean error of dense attention in the same dtype.

Both are measured against float64 on the same rounded inputs. bf16 runs on the CPU path only: the interpreter's bf16
products are wrong.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Pattern
from spdsl.oracle import dense
from spdsl.oracle.evaluate import evaluate
from tests.numerics.cases import Inputs, Part, Shape, evaluated, generated, inputs_of, meant
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of

PATTERNS = ["causal", "streaming_llm", "alibi", "sink_attention", "document", "dilated", "two_streams", "softcap"]
LISTS = ["causal t = given(most = 60) return attend(t)", "causal t = given(unit = 6) return attend(t)"]
# Absolute. fp32: what torch.testing grants by default (a sum's order decides); else under half a rounding of 1.
FLOOR = {torch.float32: 1e-5, torch.float16: 2e-4, torch.bfloat16: 2e-3}
TYPES = [torch.float32, torch.float16]


def plain(pattern: Pattern, inputs: Inputs) -> list[Part]:
    """Dense attention with every intermediate in the dtype of q, for patterns of one softmax."""
    (softmax,) = pattern.softmaxes()
    sizes = dense.sizes_of(pattern, inputs)
    q, logits, values = inputs[softmax.query], [], []
    for term in softmax.terms:
        k, v = (
            inputs["k" if term.stream == "kv" else f"k_{term.stream}"],
            inputs["v" if term.stream == "kv" else f"v_{term.stream}"],
        )
        k, v = (x.repeat_interleave(sizes.heads // sizes.kv_heads, 1) for x in (k, v))
        s = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if softmax.scale is None else float(softmax.scale))
        if softmax.softcap:
            s = softmax.softcap * torch.tanh(s / softmax.softcap)
        if softmax.bias is not None:
            s = s + evaluate(softmax.bias, dense.environment(pattern, inputs, sizes)).to(s.dtype)
        logits.append(s.masked_fill(~dense.visible(pattern, term, inputs, sizes), -torch.inf))
        values.append(v)
    if softmax.sink is not None:
        logits.append(inputs[softmax.sink].view(1, -1, 1, 1).expand(*q.shape[:3], 1).to(q.dtype))
        values.append(torch.zeros_like(values[0][:, :, :1]))
    s = torch.cat(logits, -1)
    return [(torch.softmax(s, -1) @ torch.cat(values, 2), torch.logsumexp(s, -1))]


def assert_as_good(what: str, x: Tensor, rival: Tensor, exact: Tensor, floor: float) -> None:
    own, other = (y.double() - exact.double() for y in (x, rival))
    assert own.isfinite().all(), what
    assert own.abs().max() <= 2 * other.abs().max() + floor, what
    assert own.abs().mean() <= 1.1 * other.abs().mean() + floor / 10, what


@pytest.mark.parametrize("dtype", [*TYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*PATTERNS, *LISTS])
def test_errors(engine: Engine, name: str, dtype: torch.dtype) -> None:
    if engine.name == "interpreted" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bf16 product")
    shape = (
        Shape(37, 37, heads=2)
        if engine.name == "interpreted"
        else Shape(200, 200, batch=2, heads=4, kv_heads=2, qk=64, v=64)
    )
    pattern, module = pattern_of(name), engine(name)
    inputs = inputs_of(pattern, shape, dtype)
    if name in LISTS:
        inputs["t"][..., 0] = 0  # no query is without a key
    found = generated(module, pattern, inputs, lse_gradient=False)
    rival = evaluated(lambda x: plain(pattern, x), pattern, inputs, lse_gradient=False)
    exact = meant(pattern, inputs, lse_gradient=False)
    ((out, lse),), ((rival_out, _),), ((exact_out, exact_lse),) = found.parts, rival.parts, exact.parts
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_as_good("out", out, rival_out, exact_out, FLOOR[dtype])
    assert (lse - exact_lse).abs().max() < 2e-5 * exact_lse.abs().max()  # products of the inputs are exact in fp32
    for key, grad in found.grads.items():
        assert grad.dtype == dtype
        if grad.dim() == 1:  # two numbers are no sample of errors: pooled below
            continue
        assert_as_good(f"d{key}", grad, rival.grads[key], exact.grads[key], FLOOR[dtype])


@pytest.mark.parametrize("dtype", [*TYPES, torch.bfloat16], ids=str)
def test_errors_of_the_gradient_of_a_sink(cpu: Engine, dtype: torch.dtype) -> None:
    """160 of its numbers; both engines compute it by the same torch function."""
    pattern, module = pattern_of("sink_attention"), cpu("sink_attention")
    grads: list[list[Tensor]] = [[], [], []]
    for seed in range(20):
        inputs = inputs_of(pattern, Shape(37, 37, heads=8, seed=seed), dtype)
        runs = (
            generated(module, pattern, inputs, lse_gradient=False),
            evaluated(lambda x: plain(pattern, x), pattern, inputs, lse_gradient=False),
            meant(pattern, inputs, lse_gradient=False),
        )
        for column, found in zip(grads, runs, strict=True):
            column.append(found.grads["sinks"])
    found, rival, exact = (torch.stack(column) for column in grads)
    assert_as_good("dsinks", found, rival, exact, FLOOR[dtype])


@pytest.mark.parametrize("size", [1e4, 6e4])
def test_great_logits(engine: Engine, size: float) -> None:
    """One key far above the rest: the softmax is a choice, without overflow."""
    module = engine("causal")
    q = torch.full((1, 1, 20, 16), 4.0)
    k = torch.zeros(1, 1, 20, 16)
    k[0, 0, ::5] = size / 16
    v = torch.randn(1, 1, 20, 16)
    for sign in (1.0, -1.0):
        out, lse = module.attention(sign * q, k, v, return_lse=True)
        exact, exact_lse = module.reference(sign * q, k, v, return_lse=True)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)
