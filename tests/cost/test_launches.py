"""The kernels and torch operators of the model are those that generated modules start."""

from __future__ import annotations

import pytest
import torch

from spdsl.cost.kernels import Options
from spdsl.cost.machine import Machine
from spdsl.cost.phases import Stage, kernels
from spdsl.machine import survey
from spdsl.passes.count import shape_of
from tests.cost.launched import Started, started
from tests.cost.plans import module_of, plan, plan_of_text, text_of

pytestmark = pytest.mark.crosscompile  # it records what would be compiled

MEANS = """
pattern means {
    causal
    coarse = compress(32, 16, by = mean)
    return gate(attend(coarse), attend(sliding(64)))
}
"""
POOLS = """
pattern pools {
    causal
    sums = compress(32, 16, by = weighted)
    high = compress(32, 16, by = max)
    low  = compress(32, 16, by = min)
    return gate(attend(sums), attend(high), attend(low), attend(sliding(64)))
}
"""
EARLY = """
pattern early {
    causal
    z = stream(value = none)
    a = compress(32, 16, before = 16, by = mean)
    b = compress(32, 16, before = 16, by = max)
    c = compress(32, 16, before = 16, by = weighted)
    d = compress(32, 16, before = 16, by = mlp)
    e = compress(32, 16, before = 16, by = softmax(z))
    return gate(attend(a), attend(b), attend(c), attend(d), attend(e))
}
"""
UNION = """
pattern union {
    causal
    means = compress(32, 16)
    chosen = top_k(2, score = softmax(dot(means)), share = sum(group), unit = sum(64))
    return attend(chosen | sliding(64))
}
"""
LONG = """
pattern long {
    causal
    coarse = attend(compress(32, 16))
    chosen = top_k(300, score = mass(coarse), share = group, unit = 64, force = last(1))
    every = threshold(0.1, score = dot(compress(16)), share = head, unit = max(16), least = 2)
    return gate(coarse, attend(chosen), attend(every))
}
"""
TILED = """
pattern tiled {
    chosen = top_k(2, score = softmax(dot(compress(32, 16))), share = sum(group), unit = 64, rows = max(48))
    return attend(chosen)
}
"""
SUNK = """
pattern sunk {
    causal
    s = tensor(head)
    z = tensor(head)
    both = merge(attend(sliding(16), sink_logit = s), attend(sink(4) - sliding(16), sink_logit = z))
    return gate(both, attend(all)), merge(attend(sliding(8)), attend(sink(2) - sliding(8)))
}
"""
CASES = {
    "causal": {}, "streaming_llm": {}, "dilated": {}, "nsa": {}, "moba": {"block": 16}, "infllm_v2": {}, "document": {},
    "sparse_transformer": {}, "msa_minimax": {"block": 16}, MEANS: {}, POOLS: {}, EARLY: {}, UNION: {}, SUNK: {},
    LONG: {}, TILED: {}, "sink_attention": {},
}  # fmt: skip
TOKENS = 256
PHASES = {"train": (Stage.FORWARD, Stage.BACKWARD), "prefill": (Stage.PREFILL,), "decode": (Stage.DECODE,)}
LISTED = ("document",)  # torch builds lists from what the test reads: more operators than the model's least


OPEN_DIM = 64  # the head dim where a pattern leaves it open: tables go by it, and jobs are as long as their tiles


def run(name: str, phase: str) -> Started:
    text = name if name.strip().startswith("pattern") else text_of(name)
    module = module_of(text, **CASES[name])
    heads, kv_heads = survey._heads(module)
    ((qk, v),) = survey._open_dims(module, [(OPEN_DIM, OPEN_DIM)])
    return started(module, phase, TOKENS, survey._Sizes(heads, kv_heads, qk, v, torch.bfloat16))


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.split("{")[0].strip()[-10:])
def test_every_launch_is_in_the_model(name: str) -> None:
    found = plan_of_text(name) if name.strip().startswith("pattern") else plan(name, **CASES[name])
    shape = shape_of(found.pattern)
    qk, v = found.pattern.qk_dim or OPEN_DIM, found.pattern.v_dim or OPEN_DIM
    shape = type(shape)(survey.BATCH, shape.heads, shape.kv_heads, qk, v, shape.size)
    for phase, stages in {
        "train": (Stage.FORWARD, Stage.BACKWARD),
        "prefill": (Stage.PREFILL,),
        "decode": (Stage.DECODE,),
    }.items():
        real = run(name, phase)
        for stage, names, steps in zip(
            stages, (real.kernels, real.back_kernels), (real.steps, real.back_steps), strict=False
        ):
            own = kernels(found, stage, TOKENS, shape, Machine("sm_90", 1), Options())
            assert sum(one.launches for one in own) == len(names), stage
            of_model = {one.name for one in own if one.launches and "entries" not in one.name}
            # the model has the kernels that make entries, and those of their gradients, under other names
            assert of_model == {one for one in names if "entries" not in one and one != "weight_sums"}, stage
            least, counted = sum(one.steps for one in own), sum(steps.values())
            if name in LISTED:
                assert least <= counted <= 3 * least, stage
            elif name not in (MEANS, POOLS, EARLY, LONG) or stage is not Stage.BACKWARD:
                assert least == counted, stage
