"""The timed cases: branches and whole of ours, dense attention, peers; forward, backward and a step of decode."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.baselines import nsa as peers
from benchmarks.gpu import clock
from benchmarks.gpu.patterns import DEVICE, Case
from benchmarks.gpu.timing import backend
from benchmarks.nsa import inputs as arguments
from benchmarks.nsa import loops

Call = Callable[..., Tensor]


def whole(case: Case) -> Case:
    """`attention`, with the module's own choice or with lists passed in."""
    module = arguments.load(case)
    given = arguments.inputs(module, case)
    chosen = arguments.drawn(module, case)
    more = {} if chosen is None else {"chosen": chosen}
    names = list(given)
    attend = lambda *xs: module.attention(**dict(zip(names, xs, strict=True)), **more)  # noqa: E731
    return both_ways(case, attend, [given[name] for name in names])


def branch(case: Case) -> Case:
    """One branch by its operator: entries, coarse, scored (coarse and selection), select, fine or near."""
    module = arguments.load(case)
    given = arguments.inputs(module, case)
    with torch.no_grad():
        made, layout, chosen = arguments.parts_of(module, given, arguments.drawn(module, case))
        _, lse = module.coarse_forward_op(made.q, made.k_entries, made.v_entries, *layout)
    once, name = case.get("once", False), case["branch"]

    def scored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, own = module.coarse_forward_op(q, k, v, *layout)
        arguments.select(module, made, layout, own)
        return out

    calls: dict[str, tuple[Call, list[Tensor]]] = {
        "coarse": (lambda *x: module.coarse_forward_op(*x, *layout)[0], [made.q, made.k_entries, made.v_entries]),
        "scored": (scored, [made.q, made.k_entries, made.v_entries]),
        "fine": (lambda *x: module.fine_forward_op(*x, chosen, *layout)[0], [made.q, made.k_picked, made.v_picked]),
        "near": (lambda *x: module.near_forward_op(*x, *layout)[0], [made.q, made.k_recent, made.v_recent]),
    }
    if name in calls:
        return both_ways(case, *calls[name])
    steps = {
        "select": lambda: arguments.select(module, made, layout, lse),
        "entries": lambda: module._entries(made, layout),
    }
    with torch.no_grad():
        return {"forward_ms": clock.milliseconds(steps[name], once)}


def dense(case: Case) -> Case:
    """Dense causal attention by one backend of SDPA."""
    q, k, v = streams(case)
    attend = lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    with backend(case["backend"]):
        return both_ways(case, attend, [q, k, v])


def loop(case: Case) -> Case:
    """Attention to given lists with queries or keys outermost."""
    module = loops.load(case)
    given, chosen = loops.arguments(module, case)
    return both_ways(case, lambda q, k, v: module.attention(q, k, v, chosen=chosen), given)


def streams(case: Case, rows: int | None = None) -> list[Tensor]:
    """q, k and v [1, heads, tokens, dim]; `rows` queries."""
    torch.manual_seed(0)
    dtype, tokens = getattr(torch, case["dtype"]), case["tokens"]
    sizes = ((case["heads"], rows or tokens, case["dim"]), (case["kv_heads"], tokens, case["dim"]),
             (case["kv_heads"], tokens, case["v_dim"]))  # fmt: skip
    return [torch.randn(1, *size, dtype=dtype, device=DEVICE) for size in sizes]


def peer(case: Case) -> Case:
    """A peer's branch or its whole on the same shape, with the same lists where it takes any."""
    run = peers.prepare(case["peer"], case["branch"], sizes_of(case))
    if run is None:
        return {"absent": f"{case['peer']} is not installed, or has no {case['branch']}"}
    q, k, v = streams(case)
    module = arguments.load(case)
    chosen = arguments.drawn(module, case)
    attend, leaves = run(q, k, v, chosen)
    return both_ways(case, attend, leaves)


def sizes_of(case: Case) -> peers.Sizes:
    params = arguments.load(case).PARAMS
    return peers.Sizes(case["heads"], case["kv_heads"], case["dim"], case["v_dim"], **params)


def both_ways(case: Case, attend: Call, inputs: list[Tensor]) -> Case:
    """Milliseconds of the forward without gradients and of the backward alone, and the memory that they take.

    A backward that fails leaves the forward's time standing.
    """
    once = case.get("once", False)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        found: Case = {"forward_ms": clock.milliseconds(lambda: attend(*inputs), once)}
    try:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        out = attend(*leaves)
        dout = torch.randn_like(out)
        wanted = [x for x in leaves if x.requires_grad]
        backward = lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True, allow_unused=True)  # noqa: E731
        found["backward_ms"] = clock.milliseconds(backward, once)
    except (RuntimeError, NotImplementedError) as problem:  # out of memory is a RuntimeError, too
        found["backward_failure"] = str(problem).strip().splitlines()[0][:200]
    if DEVICE == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def decode(case: Case) -> Case:
    """A step of generation from a full cache as a CUDA graph; the last token finds no room, so replays are alike."""
    module, tokens, once = arguments.load(case), case["tokens"], case.get("once", False)
    batch, dtype = case.get("batch", 1), getattr(torch, case["dtype"])
    store = module.Cache(batch, tokens, page=case["page"], device=DEVICE, dtype=dtype)
    for kept in (*store.k.values(), *store.v.values()):
        kept.normal_()
    given = arguments.inputs(module, case, 1, batch)
    step = lambda: module.decode(**given, cache=store)  # noqa: E731
    store.lengths.fill_(tokens)
    return {"step_ms": clock.milliseconds(step if once else clock.captured(step)[0], once)}


def dense_decode(case: Case) -> Case:
    """One query over a contiguous cache with one stream, by SDPA."""
    q, k, v = (x.expand(case.get("batch", 1), -1, -1, -1).contiguous() for x in streams(case, rows=1))
    attend = lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    once = case.get("once", False)
    with backend(case["backend"]):
        return {"step_ms": clock.milliseconds(attend if once else clock.captured(attend)[0], once)}


def counted(case: Case) -> Case:
    """Exact FLOPs of the kernels, and the keys and bytes of a decode step: no device, no tensors."""
    from spdsl.compiler import as_params, plan_of
    from spdsl.cost.machine import Machine
    from spdsl.cost.phases import Stage, kernels
    from spdsl.cost.reads import step_reads
    from spdsl.diagnostics import Source
    from spdsl.passes.count import shape_of

    plan = plan_of(Source(arguments.text(case)), None, as_params(case.get("params", {})))
    shape, flops = shape_of(plan.pattern), dict[str, Any]()
    for stage in (Stage.FORWARD, Stage.BACKWARD):
        for one in kernels(plan, stage, case["tokens"], shape, Machine("sm_90", 132)):
            name = "entries_compress" if one.part == "compress" else re.sub("_(dq|dkdv)$", "_backward", one.name)
            if one.flops.value and (stage is Stage.FORWARD or one.part != "compress"):
                flops[name] = flops.get(name, 0) + one.flops.value
    step, params = step_reads(plan, case["tokens"], shape), {name: int(str(x)) for name, x in plan.pattern.params}
    # (s - l) / d + n l' + w (arXiv 2502.11089, section 3) has one entry less than there are.
    formula = Fraction(case["tokens"] - params["width"], params["stride"])
    formula += params["count"] * params["block"] + params["window"]
    pairs, dims = case["tokens"] * (case["tokens"] + 1) // 2, (case["dim"], case["v_dim"])
    flops["dense_forward"] = 2 * case["heads"] * pairs * sum(dims)
    flops["dense_backward"] = 2 * case["heads"] * pairs * (3 * dims[0] + 2 * dims[1])
    return {"flops": flops, "kv_tokens": step.keys.value, "kv_bytes": step.bytes.value,
            "dense_bytes": step.dense_bytes, "published": str(formula)}  # fmt: skip


KINDS = {"whole": whole, "branch": branch, "dense": dense, "peer": peer, "decode": decode,
         "dense_decode": dense_decode, "counted": counted, "loop": loop}  # fmt: skip
