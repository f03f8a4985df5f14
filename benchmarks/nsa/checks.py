"""Right or wrong at real sizes: output and gradients against `blocked`, chosen units against scores in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.numerics import share, verdict
from benchmarks.gpu.patterns import Case, Inputs
from benchmarks.nsa import blocked
from benchmarks.nsa.inputs import drawn, inputs, load, parts_of

SAMPLED = 256  # rows whose scores are computed again
TIE = 1e-3  # of the score at the edge: nearer scores may swap (fp32 sums of up to 2^15 probabilities)


def attended(case: Case) -> Case:
    """Output and the gradients of every stream, of q and of the gates, beside the same in the dtype of the inputs."""
    module = load(case)
    given = inputs(module, case)
    wide = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return verdict(shares(module, given, drawn(module, case)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = wide


def shares(module: ModuleType, given: Inputs, chosen: Tensor | None) -> dict[str, float]:
    """Errors over allowed errors. What the entries hand on to their source and weights is compared apart."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    made, _, lists = parts_of(module, {name: x.detach() for name, x in given.items()}, chosen)
    out = module.attention(**leaves, **({} if chosen is None else {"chosen": chosen}))
    dout = torch.randn_like(out)
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))
    streams = {name: getattr(made, name) for name in blocked.STREAMS}
    want_out, want = blocked.attention(module, given, streams, lists, dout, exact(given))
    usual_out, usual = blocked.attention(module, given, streams, lists, dout, given["q"].dtype)
    errors = {"out": share(out.detach(), usual_out, want_out)}
    errors |= {name: share(found[name], usual[name], want[name]) for name in want if name in found}
    return errors | handed_on(module, given, found, want, usual)


def exact(given: Inputs) -> torch.dtype:
    """The dtype of the reference: wider than that of the inputs."""
    return torch.float64 if given["q"].dtype is torch.float32 else torch.float32


def handed_on(module: ModuleType, given: Inputs, found: Inputs, want: Inputs, usual: Inputs) -> dict[str, float]:
    """Gradients of the source of the entries and of their weights."""
    errors = {}
    for side in "kv":
        names = [name for name in given if name == f"{side}_rough" or name.startswith(f"entries_{side}_")]
        pulled = [_pulled(module, given, names, side, grads[f"{side}_entries"], dtype)
                  for grads, dtype in ((want, exact(given)), (usual, given["q"].dtype))]  # fmt: skip
        for name, want_grad, plain in zip(names, *pulled, strict=True):
            errors[name] = share(found[name], plain, want_grad)
    return errors


def _pulled(
    module: ModuleType, given: Inputs, names: list[str], side: str, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in names}
    out = blocked.entries(leaves, side, module.PARAMS["width"], module.PARAMS["stride"])
    if not out.numel():
        return tuple(torch.zeros_like(leaf) for leaf in leaves.values())
    return torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))


def selected(case: Case) -> Case:
    """Chosen units of sampled rows against the `count` best by scores in float64, up to near-ties."""
    module = load(case)
    made, _, chosen = parts_of(module, inputs(module, case))
    rows = sampled(case["tokens"], chosen.device)
    wrong, worst = 0, 0.0
    for row in rows.tolist():
        for head in range(chosen.shape[1]):
            gap = distance(module.PARAMS, made, chosen[0, head, row], row, head)
            wrong, worst = wrong + (not gap <= TIE), max(worst, gap)
    return {"ok": wrong == 0, "worst": worst / TIE, "of": f"{len(rows)} rows, {wrong} lists wrong"}


def sampled(tokens: int, device: Any) -> Tensor:
    """Some rows, among them the first, the last and those around the first closed entry."""
    torch.manual_seed(1)
    some = torch.randint(0, tokens, (min(SAMPLED, tokens),), device=device)
    edges = torch.tensor([0, 30, 31, 32, 63, 64, 65, tokens - 1], device=device)
    return torch.cat([edges[edges < tokens], some]).unique()


def distance(params: dict[str, int], made: Any, chosen: Tensor, row: int, head: int) -> float:
    """How far the worst wrongly taken or left unit lies from the edge, relative to its score; infinite if forced."""
    score = scores(params, made, row, head)
    own, count = row // params["block"], params["count"]
    forced = sorted({0, own, max(0, own - 1)})
    possible = score > -torch.inf
    possible[forced] = True
    taken = torch.zeros_like(possible)
    given = chosen[chosen >= 0].long()
    if len(given) != min(count, int(possible.sum())) or bool((given > own).any()):
        return float("inf")
    taken[given] = True
    if int(taken.sum()) != len(given) or bool((taken & ~possible).any()) or not bool(taken[forced].all()):
        return float("inf")
    free = torch.ones_like(possible)
    free[forced] = False
    left, kept = score[possible & ~taken], score[taken & free]
    if not len(left) or not len(kept):
        return 0.0
    edge = left.max()
    return float(((edge - kept.min()) / edge.abs().clamp(min=1e-300)).clamp(min=0.0))


def scores(params: dict[str, int], made: Any, row: int, head: int) -> Tensor:
    """Scores of the units that have begun, float64; -inf without a closed entry."""
    width, stride, unit = params["width"], params["stride"], params["block"]
    closed, units = max(0, (row + 1 - width) // stride + 1), row // unit + 1
    group = made.q.shape[1] // made.k_entries.shape[1]
    q = made.q[0, head * group : (head + 1) * group, row].double()
    logits = q @ made.k_entries[0, head, :closed].double().T * q.shape[1] ** -0.5
    start = stride * torch.arange(closed, device=q.device).unsqueeze(1)
    begin = unit * torch.arange(units, device=q.device)
    shared = (torch.minimum(start + width, begin + unit) - torch.maximum(start, begin)).clamp(min=0)
    found = torch.softmax(logits, -1).sum(0) @ (shared.double() / stride)
    return found.masked_fill(~(shared > 0).any(0), -torch.inf)
