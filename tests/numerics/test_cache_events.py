"""Whatever happened to a cache before, prefill and decode are attention over the tokens that it holds."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.numerics.cases import Shape, inputs_of, nan_cache
from tests.numerics.conftest import Engine
from tests.numerics.events import CHANGES, NAMES, events_of
from tests.numerics.patterns import pattern_of
from tests.numerics.selected import SELECTED
from tests.numerics.test_gathered import CHOSEN as LISTED
from tests.numerics.test_gathered import GIVEN

STATIC = ["causal", "streaming_llm", "document", "softcap_sink", "two_streams", "gate", "token_bias"]
CHOSEN = ["nsa", "softmax", "moba", "heads apart, any number"]
TABLES = {
    "token, number": "causal m = tensor(token, 16, bool) return attend(sliding(5) | where(m[k][q % 16]))",
    "head, token": "causal m = tensor(head, token, bool) return attend(sliding(3) | where(m[h][k]))",
    "token, head": "causal m = tensor(token, head) return attend(all, bias = m[k][h])",
    "kv_head, token": "causal m = tensor(kv_head, token, int) return attend(sliding(3) | where(m[h][k] == m[h][q]))",
    "five axes": (
        "causal m = tensor(3, token, 2, head) w = tensor(token) return attend(all, bias = m[1][k][0][h] + w[k])"
    ),
}
# Units that no block of keys lies in: lists of the caller for each query, and chosen ones.
SHORT = {"given tokens": GIVEN["tokens of heads"], "given units of 6": GIVEN["units of 6"]}
SHORT |= {name: LISTED[name] for name in ("units of 12", "tokens by an indexer")}
BODIES = {**{name: name for name in STATIC}, **{name: SELECTED[name] for name in CHOSEN}, **TABLES, **SHORT}
SIZES = {name: {"heads": 4, "kv_heads": 2} for name in TABLES}


@pytest.mark.parametrize("page", [None, 16, 64])
@pytest.mark.parametrize("name", BODIES)
def test_any_sequence_of_events(cpu: Engine, name: str, page: int | None) -> None:
    for seed in range(3):
        module, pattern = cpu(BODIES[name]), pattern_of(BODIES[name])
        events_of(module, pattern, Shape(batch=3, **SIZES.get(name, {})), page, 44, seed).run(24, NAMES)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", ["streaming_llm", "document", "nsa", "heads apart, any number", "five axes", *SHORT])
def test_any_sequence_of_events_with_kernels(kernels: Engine, name: str, page: int | None) -> None:
    module, pattern = kernels(BODIES[name]), pattern_of(BODIES[name])
    events = events_of(module, pattern, Shape(batch=2, **SIZES.get(name, {})), page, 40, 0)
    events.run(3, ["prefill", "append"])
    for change in CHANGES:
        events.run(1, [change])
        events.run(1, ["decode"])
        events.run(1, ["prefill"])


FORMS = ["dense", "padded", "packed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BODIES)
def test_every_form_of_a_call(cpu: Engine, name: str, form: str) -> None:
    check_form(cpu(BODIES[name]), name, form, 16)


@pytest.mark.parametrize(
    "name, form",
    [
        ("nsa", "packed"), ("nsa", "padded"), ("heads apart, any number", "packed"), ("head, token", "packed"),
        ("token, number", "padded"), ("kv_head, token", "dense"), ("given tokens", "packed"),
        ("given units of 6", "padded"), ("units of 12", "packed"),
    ],
)  # fmt: skip
def test_every_form_of_a_call_with_kernels(kernels: Engine, name: str, form: str) -> None:
    check_form(kernels(BODIES[name]), name, form, None if form == "padded" else 16)


def check_form(module: ModuleType, name: str, form: str, page: int | None) -> None:
    """Several sequences that have tokens, and entries, already; the last call runs one of them full."""
    shape = Shape(batch=3, **SIZES.get(name, {}))
    events = events_of(module, pattern_of(BODIES[name]), shape, page, 34, 0)
    events.call(None, None, [9, 14, 11], "packed")
    events.call(module.prefill, None, [5, 5, 5] if form == "dense" else [5, 1, 8], form)
    events.call(module.prefill, [2, 1], [4, 4] if form == "dense" else [0, 7], form)
    events.decode()
    events.call(module.prefill, None, [12, 12, 12] if form == "dense" else [3, 12, 5], form)


@pytest.mark.parametrize("batch, tokens", [(0, 3), (2, 0)])
@pytest.mark.parametrize("name", ["document", "token, number", "five axes"])
def test_no_sequences_and_no_tokens(engine: Engine, name: str, batch: int, tokens: int) -> None:
    module, pattern = engine(BODIES[name]), pattern_of(BODIES[name])
    shape = Shape(tokens, tokens, batch=batch, **SIZES.get(name, {}))
    inputs, cache = inputs_of(pattern, shape), nan_cache(module, shape, 40, 16)
    for out in (module.attention(**inputs), module.prefill(**inputs, cache=cache)):
        assert out.shape == (batch, shape.heads, tokens, shape.v)
    assert cache.lengths.tolist() == [0] * batch
