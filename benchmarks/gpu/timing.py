"""The timed cases: ours, FlexAttention and SDPA, forward, backward and decode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import clock
from benchmarks.gpu.patterns import DEVICE, Case, cache, inputs, load

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def ceilings(case: Case) -> Case:
    return {"copy_gb_s": clock.bandwidth() / 1e9, "matmul_tflop_s": clock.matrix_rate() / 1e12}


def ours(case: Case) -> Case:
    module = load(case)
    given = inputs(module, case)
    rest = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
    return both_ways(case, lambda q, k, v: module.attention(q, k, v, **rest), given["q"], given["k"], given["v"])


def flex(case: Case) -> Case:
    """Also the largest difference to our output: both must do the same work."""
    import torch._functorch.config as functorch

    from benchmarks.gpu.flex import prepare

    functorch.donated_buffer = False  # the backward is timed again and again on one graph
    module = load(case)
    given = inputs(module, case)
    attend = prepare(module, case, given)
    found = both_ways(case, attend, given["q"], given["k"], given["v"])
    with torch.no_grad():
        difference = (attend(given["q"], given["k"], given["v"]) - module.attention(**given)).abs().max().item()
    return found | {"difference": difference}


def sdpa(case: Case) -> Case:
    """Dense causal attention by one backend."""
    module = load(case | {"pattern": "causal", "params": {}})
    given = inputs(module, case | {"pattern": "causal"})
    group = case["heads"] // case["kv_heads"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)

    with backend(case["backend"]):
        return both_ways(case, attend, given["q"], given["k"], given["v"])


def backend(name: str) -> Any:
    return sdpa_kernel(BACKENDS[name]) if DEVICE == "cuda" else nullcontext()


def both_ways(case: Case, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Case:
    """Milliseconds of the forward without gradients, and of the backward alone."""
    once = case.get("once", False)
    with torch.no_grad():
        forward = clock.milliseconds(lambda: attend(q, k, v), once)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    dout = torch.randn_like(out)
    backward = clock.milliseconds(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), once)
    return {"forward_ms": forward, "backward_ms": backward}


def decode(case: Case) -> Case:
    """A step of generation from a full cache as a CUDA graph, of which appending is a part that is also timed alone.

    The last token finds no room, so that every replay reads the same keys.
    """
    module, tokens, once = load(case), case["tokens"], case.get("once", False)
    store = full_cache(module, case)
    given = inputs(module, case, 1)
    step = lambda: module.decode(**given, cache=store)  # noqa: E731
    store.lengths.fill_(tokens)
    step_ms = clock.milliseconds(step if once else clock.captured(step)[0], once)
    append = lambda: store.append_tokens({"kv": given["k"]}, {"kv": given["v"]}, {})  # noqa: E731
    store.at_least = 0
    append_ms = clock.milliseconds(append if once else clock.captured(append)[0], once)
    size = (
        visible_keys(case, tokens) * case["batch"] * case["kv_heads"] * case["dim"] * 2 * store.k["kv"].element_size()
    )
    return {"step_ms": step_ms, "append_ms": append_ms, "kv_bytes": size}


def full_cache(module: Any, case: Case) -> Any:
    store = cache(module, case, case["tokens"], page=case["page"])
    for kept in (store.k["kv"], store.v["kv"]):
        kept.normal_()
    return store


def visible_keys(case: Case, tokens: int) -> int:
    """Keys that the last query sees."""
    params = case.get("params", {})
    return min(tokens, params.get("window", tokens) + params.get("sinks", 0))


def sdpa_decode(case: Case) -> Case:
    """One query of every sequence over a contiguous cache, all keys visible."""
    module = load(case | {"pattern": "causal", "params": {}})
    given = inputs(module, case | {"pattern": "causal"})
    q = given["q"][:, :, -1:].contiguous()
    attend = lambda: scaled_dot_product_attention(q, given["k"], given["v"], enable_gqa=True)  # noqa: E731
    once = case.get("once", False)
    with backend(case["backend"]):
        size = 2 * given["k"].numel() * given["k"].element_size()
        return {"step_ms": clock.milliseconds(attend if once else clock.captured(attend)[0], once), "kv_bytes": size}


def graph(case: Case) -> Case:
    """A captured decode step, replayed at other lengths, equals the eager step bit by bit."""
    module, tokens = load(case), case["tokens"]
    store, given = full_cache(module, case), inputs(module, case, 1)
    store.lengths.fill_(tokens // 2)
    replay, out = clock.captured(lambda: module.decode(**given, cache=store))
    same = True
    for lengths in (0, 1, tokens // 3, tokens - 1):
        start = torch.arange(case["batch"], dtype=torch.int32, device=DEVICE) % 2
        store.at_least = 0
        store.lengths.copy_((lengths - start).clamp(min=0))
        want = module.decode(**given, cache=store).clone()
        store.lengths.copy_((lengths - start).clamp(min=0))
        out = replay() if DEVICE == "cpu" else (replay(), out)[1]
        same &= bool(torch.equal(out, want))
    return {"ok": same, "worst": float(not same)}
