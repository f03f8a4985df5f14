"""Further results: the model's products are those that torch makes for them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spdsl.cost.kernels import Options
from spdsl.cost.machine import Machine
from spdsl.cost.phases import Stage, kernels
from spdsl.passes.count import Shape
from tests.cost.plans import module_of, plan, plan_of_text

TEXT = """
pattern further {
    heads query = 4, kv = 2
    causal
    index  = stream(value = none)
    full   = attend(all)
    chosen = top_k(2, score = dot(index), unit = max(16), share = max(group))
    fine   = attend(chosen)
    return fine%s
}
"""
TOKENS, DIM = 96, 16
SHAPE = Shape(2, 4, 2, DIM, DIM, 4)
LISTED = "kl(mass(fine), dot(index), share = max(group))"  # no kernel has a maximum over heads
RESULTS = (
    "mass(full)",
    "pool(dot(index), share = max(group), unit = mean(16))",
    "kl(mass(full), dot(index), share = sum(group))",
    "kl(mass(full), softmax(dot(index)), share = mean(group))",
    LISTED,
)


def products(result: str) -> tuple[int, int]:
    """FLOPs of torch in a forward and in its backward; those inside of our operators are not seen."""
    module = module_of(TEXT % result)
    inputs = module.example_inputs(2, TOKENS, qk_dim=DIM, v_dim=DIM, dtype=torch.float32)
    for x in inputs.values():
        x.requires_grad_()
    with FlopCounterMode(display=False) as ahead:
        outputs = module.attention(**inputs)
    last = outputs[-1] if isinstance(outputs, tuple) else outputs
    with FlopCounterMode(display=False) as back:
        last.masked_fill(last == -torch.inf, 0).sum().backward()
    return ahead.get_total_flops(), back.get_total_flops()


@pytest.mark.parametrize("result", RESULTS)
def test_products_of_further_results(result: str) -> None:
    none, counted = products(""), products(f", {result}")
    found = plan_of_text(TEXT % f", {result}")
    for place, stage in enumerate((Stage.FORWARD, Stage.BACKWARD)):
        own = [
            one for one in kernels(found, stage, TOKENS, SHAPE, Machine("sm_90", 132), Options()) if one.part == "extra"
        ]
        assert sum(one.machine.value for one in own) == counted[place] - none[place], stage
        assert all(0 < one.flops.value < one.machine.value and 0 < one.bytes.value < one.moved.value for one in own)


def test_a_divergence_is_no_cost_of_generation() -> None:
    found = plan("msa_minimax")
    parts = {
        stage: {one.part for one in kernels(found, stage, 4096, Shape(1, 64, 4), Machine("sm_90", 132), Options())}
        for stage in Stage
    }
    assert "extra" in parts[Stage.FORWARD] & parts[Stage.BACKWARD]
    assert "extra" not in parts[Stage.PREFILL] | parts[Stage.DECODE]
