"""Any strides of any argument and of what flows back, on both paths: results and gradients against the oracle."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spdsl.ir.pattern import Pattern
from spdsl.oracle import dense
from spdsl.oracle.layouts import of_queries
from tests.numerics.cases import (
    Found,
    Inputs,
    Run,
    Shape,
    assert_same,
    cut,
    differentiable,
    inputs_of,
    joined,
    nan_cache,
    parts_of,
)
from tests.numerics.conftest import Engine
from tests.numerics.patterns import CATALOGUE, pattern_of, text_of
from tests.numerics.selected import SELECTED, lists_of
from tests.numerics.strides import FORMS, TIED, WHOLE, Form

TEXTS = [
    "softcap_sink", "token_bias", "token_both", "by_head", "kv_head", "two_streams_sink", "value_is_key", "gate",
    "merge", "own_query", "without_given",
]  # fmt: skip
CHOSEN = ["nsa", "moba", "infllm_v2", "msa_minimax", "seer_attention", "heads apart, all words", "softmax", "max",
          "weighted", "value is key", "tiles of rows"]  # fmt: skip
BODIES = {name: name for name in (*CATALOGUE, *TEXTS)} | {name: SELECTED[name] for name in CHOSEN if name in SELECTED}
CACHED = ["causal", "streaming_llm", "document", "softcap_sink", "token_bias", "two_streams_sink", "value_is_key",
          "kv_head", "nsa", "moba"]  # fmt: skip
NAMES = list(FORMS)


def mixed(first: int, many: int = 5) -> list[str]:
    """Forms for one argument after the other. 5 and the 13 forms have no common divisor: each meets each."""
    return [NAMES[(first + many * i) % len(NAMES)] for i in range(len(NAMES))]


def formed(inputs: Inputs, forms: list[str]) -> Inputs:
    return {key: FORMS[forms[i % len(forms)]](x) for i, (key, x) in enumerate(inputs.items())}


def differentiated(run: Run, pattern: Pattern, inputs: Inputs, form: Form) -> Found:
    """Results, and gradients of what `form` makes of random numbers."""
    names = differentiable(pattern, inputs)
    given = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}
    parts = [part if isinstance(part, tuple) else (part,) for part in run(given)]
    ends = [x for part in parts for x in part if x.requires_grad]
    grads = torch.autograd.grad(ends, [given[name] for name in names], flows(ends, form), allow_unused=True)
    return Found(
        [tuple(x.detach() for x in part) if len(part) > 1 else part[0].detach() for part in parts],
        {name: torch.zeros_like(given[name]) if x is None else x for name, x in zip(names, grads, strict=True)},
    )


def flows(ends: list[Tensor], form: Form) -> list[Tensor]:
    """A gradient for each result in that form; 0 where a log-sum-exp is that of an empty row."""
    make = torch.Generator().manual_seed(99)
    found = []
    for end in ends:
        back = form(torch.randn(end.shape, generator=make, dtype=torch.float64).to(end.dtype))
        found.append(back if end.isfinite().all() else torch.where(end.isfinite(), back, 0.0))
    return found


def checked(body: str, module: ModuleType, shape: Shape, forms: list[str]) -> None:
    """Lists are passed where units tie."""
    if "by = max" in body:  # the gradient of tied tokens is the first one's here, and shared elsewhere
        forms = [form for form in forms if form not in TIED]
    pattern = pattern_of(body)
    inputs = formed(inputs_of(pattern, shape), forms)
    back = FORMS[forms[len(inputs) % len(forms)]]
    tied = lists_of(pattern) and TIED & set(forms[: len(inputs)])
    fixed = dense.choices(pattern, inputs) if tied else {}
    sizes = dense.sizes_of(pattern, inputs)
    lists = formed(of_queries(pattern, fixed, range(sizes.rows)), [name for name in forms if name in WHOLE][::-1])

    def run(x: Inputs) -> list[Any]:
        return parts_of(module.attention(**x, **lists, return_lse=True))

    found = differentiated(run, pattern, inputs, back)
    plain = {key: x.clone(memory_format=torch.contiguous_format) for key, x in inputs.items()}
    wanted = differentiated(lambda x: dense.results(pattern, x | fixed), pattern, plain, back)
    assert_same(found, wanted)
    assert all(x.shape[-1] == 1 or x.stride(-1) == 1 for x in found.grads.values())


def shape_of(engine: Engine, body: str) -> Shape:
    """Two tiles of kernels; V is wider than K where the pattern does not say how wide."""
    batch, rows = (2, 37) if engine.name == "cpu" else (1, 21)
    v = 16 if "value = key" in text_of(body) or "heads query" in body else 24
    return Shape(rows, rows, batch, heads=4, kv_heads=2, v=v)


@pytest.mark.parametrize("name", BODIES)
def test_any_strides(engine: Engine, name: str) -> None:
    """Every argument lies in another form."""
    number = list(BODIES).index(name)
    if engine.name == "interpreted" and number % 2:
        pytest.skip("pairwise")
    checked(BODIES[name], engine(BODIES[name]), shape_of(engine, BODIES[name]), mixed(number))


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BODIES)
def test_every_form_of_all_arguments(engine: Engine, name: str, form: str) -> None:
    checked(BODIES[name], engine(BODIES[name]), shape_of(engine, BODIES[name]), [form])


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("argument", range(4))
@pytest.mark.parametrize("name", BODIES)
def test_every_form_of_one_argument(engine: Engine, name: str, argument: int, form: str) -> None:
    """The last one is what flows back."""
    many = len(inputs_of(pattern_of(BODIES[name]), Shape()))
    forms = [form if i == (argument if argument < 3 else many) else "dense" for i in range(many + 1)]
    checked(BODIES[name], engine(BODIES[name]), shape_of(engine, BODIES[name]), forms)


def check_cached(body: str, module: ModuleType, shape: Shape, page: int | None, forms: list[str]) -> None:
    """Prefill in two chunks, then two steps. Of what repeats, a chunk repeats the same."""
    pattern = pattern_of(body)
    forms = [form for form in forms if form not in (TIED if lists_of(pattern) else {"overlapping"})]
    whole = {key: x.contiguous() for key, x in formed(inputs_of(pattern, shape), forms).items()}
    cache, first, answers = nan_cache(module, shape, 48, page), 0, list[list[Any]]()
    for size in (shape.rows // 2, shape.rows - shape.rows // 2 - 2, 1, 1):
        step = module.decode if size == 1 else module.prefill
        new = formed(cut(pattern, whole, first, first + size), forms)
        answers.append(parts_of(step(**new, cache=cache, return_lse=True)))
        first += size
    assert_same(Found(joined(answers)), Found(dense.results(pattern, whole, "prefill")))


@pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", CACHED)
def test_any_strides_of_new_tokens(engine: Engine, name: str, page: int | None) -> None:
    number = 2 * CACHED.index(name) + bool(page)
    if engine.name == "interpreted" and number % 4 not in (0, 3):
        pytest.skip("pairwise")
    check_cached(BODIES[name], engine(BODIES[name]), shape_of(engine, BODIES[name]), page, mixed(number))
