"""The FLOPs of the machine are those that interpreted kernels really do."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch

from spdsl.cost.kernels import Options
from spdsl.cost.machine import Machine
from spdsl.cost.phases import Stage, kernels
from spdsl.passes.count import Shape
from tests.cost.plans import module_of, plan_of_text
from tests.library import home, launches, users

pytestmark = pytest.mark.interpret

HEADS, KV_HEADS, DIM, TOKENS = 2, 1, 16, 41  # a head dim of 16 is one part: every product is one dot
TEXTS = {
    "causal": "pattern p { causal return attend(all) }",
    "sliding": "pattern p { causal return attend(sliding(17)) }",
    "sinks": "pattern p { causal return attend(first(3) | sliding(16)) }",
    "both_sides": "pattern p { return attend(sliding(9, ahead = 8)) }",
    "by_class": "pattern p { causal return attend(dilated(5, 3)) }",
    "by_head": "pattern p { causal return attend(sliding(8) & where(h % 2 == 0) | strided(8) & where(h % 2 == 1)) }",
    # a level of 0 keeps every tile, as the model counts them
    "skip": "pattern p { causal return attend(all, skip = below(0, unit = 16, restart = 16)) if decode "
    "return attend(all, skip = below(0, rows = 16, unit = 32)) }",
    "entries": "pattern p { causal means = compress(8, 4, by = mean) return gate(attend(means), attend(sliding(12))) }",
    # lists that hold every unit: their unions are known
    "chosen": """
        pattern p {
            causal
            means  = compress(8, 4, by = mean)
            chosen = top_k(8, score = softmax(dot(means)), unit = 16, share = group, force = last(1))
            return attend(chosen)
        }
    """,
    "cut": """
        pattern p {
            causal
            means  = compress(8, 4, by = mean)
            chosen = threshold(-9, score = dot(means), unit = max(16), share = max(group), force = last(1))
            return attend(chosen)
        }
    """,
    "tiles of rows": """
        pattern p {
            means  = compress(8, 4, by = mean)
            chosen = top_k(8, score = softmax(dot(means)), unit = 16, share = group, rows = max(20))
            return attend(chosen)
        }
    """,
    # products are made of the tiles that lists name: two of three units, whose blocks tiles of 16 rows do not share
    "tiles chosen": """
        pattern p {
            means  = compress(8, by = mean)
            chosen = top_k(2, score = dot(means), unit = max(16), share = max(group), rows = max(16))
            return attend(chosen)
        }
    """,
    "tiles chosen and near": """
        pattern p {
            means  = compress(8, by = mean)
            chosen = top_k(1, score = dot(means), unit = max(16), share = max(group), rows = max(16),
                           within = ~first(1))
            return attend(chosen & where(h == 0) | where(k // 16 == 0) & where(h == 0))
        }
    """,
    "queries of cells": """
        pattern p {
            q_mean = compress(8, of = q, by = mean, partial = keep)
            means  = compress(8, 4, by = mean)
            coarse = attend(means, query = q_mean)
            few    = top_k(8, score = mass(coarse), unit = 16, share = group)
            cut    = top_k(300, score = dot(means, query = q_mean), unit = max(16), share = max(group), rows = max(24))
            return gate(coarse, attend(few), attend(cut))
        }
    """,
    "cells of queries, causal": """
        pattern p {
            causal
            q_mean = compress(8, of = q, by = mean, partial = keep)
            means  = compress(8, by = mean)
            rank   = softmax(dot(means, query = q_mean))
            few    = top_k(8, score = rank, unit = sum(16), share = group, force = last(1))
            return attend(few) if decode
            return attend(all)
        }
    """,
    "the last rows for all": """
        pattern p {
            causal
            seen   = softmax(dot(kv, query = tail(q, 19)))
            chosen = top_k(8, score = seen, rows = sum(all), unit = sum(16), share = group, force = last(1))
            return attend(chosen) if decode
            return attend(all)
        }
    """,
    "rows of all": """
        pattern p {
            means  = compress(8, 4, by = mean)
            chosen = top_k(8, score = softmax(dot(means, query = tail(q, 19))), rows = sum(all), unit = 16)
            every  = top_k(8, score = dot(means), rows = max(all), unit = max(16), share = max(group))
            return gate(attend(chosen), attend(every))
        }
    """,
    "divergence": """
        pattern p {
            causal
            index  = stream(heads = 1, value = none)
            asks   = query(heads = 2)
            rank   = dot(index, query = asks)
            chosen = top_k(8, score = rank, unit = max(16), share = max(group), force = last(1))
            fine   = attend(chosen)
            return fine, kl(mass(fine), rank, share = mean(group))
        }
    """,
    # short units: blocks hold the keys of several, dK and dV go over whole units
    "short units": """
        pattern p {
            causal
            means  = compress(6, 2, by = mean)
            chosen = top_k(8, score = softmax(dot(means)), unit = 6, share = group, force = last(1))
            return attend(chosen)
        }
    """,
    "units of 24 of heads": """
        pattern p {
            causal
            means  = compress(8, 4, by = mean)
            chosen = top_k(8, score = dot(means), unit = max(24), share = head, force = last(1))
            return attend(chosen)
        }
    """,
    "short units, divergence": """
        pattern p {
            causal
            index  = stream(heads = 1, value = none)
            asks   = query(heads = 2)
            rank   = dot(index, query = asks)
            chosen = top_k(41, score = rank, share = sum(group), unit = 1)
            fine   = attend(chosen)
            return fine, kl(mass(fine), rank, share = mean(group))
        }
    """,
    "given tokens": "pattern p { causal t = given(most = 41) return attend(t) }",
    "given units": "pattern p { causal t = given(unit = 5, share = head) return attend(t) }",
    "given, no order": "pattern no_order { t = given(unit = 3) return attend(t) }",
    "apart": """
        pattern p {
            causal
            means  = compress(8, by = mean)
            chosen = top_k(4, score = dot(means), unit = max(32), share = head, force = last(1))
            return attend(chosen)
        }
    """,
    "apart, no order": """
        pattern p {
            means  = compress(8, by = mean)
            chosen = top_k(4, score = dot(means), unit = max(32), share = head)
            return attend(chosen)
        }
    """,
}


def done(module: ModuleType, decode: bool, patch: pytest.MonkeyPatch, tokens: int = TOKENS) -> Counter[str]:
    """FLOPs of the products of each kernel of a decode step, or of attention and its backward."""
    found: Counter[str] = Counter()
    now = [""]
    products = home(module, "dot_rows")
    dot, dot_rows = products.dot, products.dot_rows

    def started(kernel: Any, *args: Any, **named: Any) -> None:
        now[0] = kernel.fn.__name__
        module.rt.with_triton(kernel, *args, **named)

    def counted(function: Any, columns: int) -> Any:
        def product(a: Any, *rest: Any) -> Any:
            b = rest[columns]
            m, k = (int(size) for size in a.shape)
            n = int(b.shape[0]) * int(b.shape[1]) // k
            found[now[0]] += 2 * m * n * k
            return function(a, *rest)

        return product

    for name, function, columns in (("dot", dot, 0), ("dot_rows", dot_rows, 1)):
        for file in users(module, function):
            patch.setattr(file, name, counted(function, columns))
        for own in [own for own, value in vars(module).items() if value is function]:  # a score's product
            patch.setattr(module, own, counted(function, columns))
    patch.setattr(launches(module), "KERNELS_ON_CPU", True)
    patch.setattr(module.MODULE, "start", started)
    inputs = module.example_inputs(
        1, 1 if decode else tokens, heads=HEADS, kv_heads=KV_HEADS, qk_dim=DIM, v_dim=DIM,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    inputs |= _every_unit(module, inputs, tokens)
    if decode:
        cache = module.Cache(1, tokens + 1, kv_heads=KV_HEADS, qk_dim=DIM, v_dim=DIM, dtype=torch.float32, device="cpu")
        before = module.example_inputs(
            1, tokens - 1, heads=HEADS, kv_heads=KV_HEADS, qk_dim=DIM, v_dim=DIM, dtype=torch.float32, device="cpu"
        )
        before |= _every_unit(module, before, tokens - 1)
        patch.setattr(launches(module), "KERNELS_ON_CPU", False)  # the CPU path fills the cache faster
        module.prefill(**before, cache=cache)
        patch.setattr(launches(module), "KERNELS_ON_CPU", True)
        module.decode(**inputs, cache=cache)
        return found
    for x in inputs.values():
        if x.is_floating_point():
            x.requires_grad_()
    out = module.attention(**inputs)
    (out if isinstance(out, torch.Tensor) else sum(x.sum() for x in out)).sum().backward()
    return found


def _every_unit(module: ModuleType, inputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Lists of the caller that hold every unit that begins no later than its query, where there is an order."""
    found, rows = {}, inputs["q"].shape[2]
    position = torch.arange(length - rows, length).view(1, 1, -1, 1)
    for x in module.ARGUMENTS.lists:
        units = torch.arange(-(-length // x.unit)).expand(1, 1, rows, -1)
        behind = (units * x.unit > position) & (module.PATTERN != "no_order")
        found[x.name] = units.masked_fill(behind, -1)
    return found


@pytest.mark.parametrize("decode", [False, True], ids=["train", "decode"])
@pytest.mark.parametrize("name", TEXTS)
def test_machine_flops_are_those_of_the_kernels(name: str, decode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(TEXTS[name])
    if not launches(module).INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    real = done(module, decode, monkeypatch)
    shape, found = Shape(1, HEADS, KV_HEADS, DIM, DIM, 4), plan_of_text(TEXTS[name])
    stages = [Stage.DECODE] if decode else [Stage.FORWARD, Stage.BACKWARD]
    own = [one for stage in stages for one in kernels(found, stage, TOKENS, shape, Machine(), Options())]
    expected = {one.name: one.machine.value for one in own if one.part != "compress" and one.machine.value}
    assert {kernel: flops for kernel, flops in real.items() if flops} == expected


@pytest.mark.parametrize("tokens", [40, 41])
def test_a_network_multiplies_in_the_steps_that_close(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step in `stride` does all the work, of which the model says the average."""
    text = "pattern p { causal return attend(compress(8, 4, by = mlp)) }"
    real = done(module_of(text), True, monkeypatch, tokens)
    own = kernels(
        plan_of_text(text), Stage.DECODE, tokens, Shape(1, HEADS, KV_HEADS, DIM, DIM, 4), Machine(), Options()
    )
    for name in ("close_hidden", "close_outputs"):
        (model,) = [one for one in own if one.name == name]
        assert model.machine.exact
        assert real[name] == (4 * model.machine.value if tokens == 40 else 0)
