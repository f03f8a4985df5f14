"""Whatever happened to a cache before, prefill and decode are attention over the tokens that it holds."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.numerics.cases import Shape
from tests.numerics.conftest import Engine
from tests.numerics.events import CHANGES, NAMES, events_of
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import SELECTED

STATIC = ["causal", "streaming_llm", "document", "softcap_sink", "two_streams", "gate", "token_bias"]
CHOSEN = ["nsa", "softmax", "moba", "heads apart, any number"]
BODIES = {**{name: name for name in STATIC}, **{name: SELECTED[name] for name in CHOSEN}}


@pytest.mark.parametrize("page", [None, 16, 64])
@pytest.mark.parametrize("name", BODIES)
def test_any_sequence_of_events(cpu: Engine, name: str, page: int | None) -> None:
    for seed in range(3):
        module, pattern = cpu(BODIES[name]), pattern_of(BODIES[name])
        events_of(module, pattern, Shape(batch=3), page, 44, seed).run(24, NAMES)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", ["streaming_llm", "document", "nsa", "heads apart, any number"])
def test_any_sequence_of_events_with_kernels(kernels: Engine, name: str, page: int | None) -> None:
    module, pattern = kernels(BODIES[name]), pattern_of(BODIES[name])
    events = events_of(module, pattern, Shape(batch=2), page, 40, 0)
    events.run(3, ["prefill", "append"])
    for change in CHANGES:
        events.run(1, [change])
        events.run(1, ["decode"])
        events.run(1, ["prefill"])


FORMS = ["dense", "padded", "packed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BODIES)
def test_every_form_of_a_call(cpu: Engine, name: str, form: str) -> None:
    check_form(cpu(BODIES[name]), BODIES[name], form, 16)


@pytest.mark.parametrize("name, form", [("nsa", "packed"), ("nsa", "padded"), ("heads apart, any number", "packed")])
def test_every_form_of_a_call_with_kernels(kernels: Engine, name: str, form: str) -> None:
    check_form(kernels(BODIES[name]), BODIES[name], form, None if form == "padded" else 16)


def check_form(module: ModuleType, body: str, form: str, page: int | None) -> None:
    """Several sequences that have tokens, and entries, already; the last call runs one of them full."""
    events = events_of(module, pattern_of(body), Shape(batch=3), page, 34, 0)
    events.call(None, None, [9, 14, 11], "packed")
    events.call(module.prefill, None, [5, 5, 5] if form == "dense" else [5, 1, 8], form)
    events.call(module.prefill, [2, 1], [4, 4] if form == "dense" else [0, 7], form)
    events.decode()
    events.call(module.prefill, None, [12, 12, 12] if form == "dense" else [3, 12, 5], form)
