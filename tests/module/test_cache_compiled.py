"""torch.compile of generation: compiled once, whatever the number of steps, with the numbers of the plain call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.numerics.cases import Shape, cut, inputs_of, nan_cache
from tests.numerics.patterns import module_of, pattern_of
from tests.numerics.selected import SELECTED

BODIES = {
    "streaming_llm": "streaming_llm",
    "document": "document",
    "nsa": SELECTED["nsa"],
    "token, head": "causal m = tensor(token, head) return attend(all, bias = m[k][h])",
}
TOKENS, PROMPT = 44, 20


class Layer:
    """What stands around attention in a model, its cache, and how it is called."""

    def __init__(self, name: str, page: int | None) -> None:
        self.module, self.pattern = module_of(BODIES[name]), pattern_of(BODIES[name])
        shape = Shape(TOKENS, TOKENS, batch=2)
        self.inputs = inputs_of(self.pattern, shape)
        self.cache = nan_cache(self.module, shape, TOKENS, page)

    def tokens(self, first: int, end: int) -> dict[str, Tensor]:
        return cut(self.pattern, self.inputs, first, end)

    def prefill(self, given: dict[str, Tensor]) -> Tensor:
        return 2 * self.module.prefill(**{**given, "q": given["q"].sin()}, cache=self.cache).cos()

    def decode(self, given: dict[str, Tensor]) -> Tensor:
        out, lse = self.module.decode(**{**given, "q": given["q"].sin()}, cache=self.cache, return_lse=True)
        return out * lse.sum().sin()


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", BODIES)
def test_generation_is_compiled_once(name: str, page: int | None) -> None:
    plain, layer, counter = Layer(name, page), Layer(name, page), CompileCounter()
    prefill, decode = (torch.compile(f, backend=counter) for f in (layer.prefill, layer.decode))
    assert torch.equal(prefill(layer.tokens(0, PROMPT)), plain.prefill(plain.tokens(0, PROMPT)))
    assert torch.equal(decode(layer.tokens(PROMPT, PROMPT + 1)), plain.decode(plain.tokens(PROMPT, PROMPT + 1)))
    graphs = counter.frame_count
    assert 0 < graphs <= 6
    with torch.compiler.set_stance("fail_on_recompile"):
        for token in range(PROMPT + 1, TOKENS):
            assert torch.equal(decode(layer.tokens(token, token + 1)), plain.decode(plain.tokens(token, token + 1)))
    assert counter.frame_count == graphs
    assert layer.cache.lengths.tolist() == [TOKENS, TOKENS]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_functions_of_the_module_are_compiled_once(backend: str) -> None:
    plain, layer = Layer("document", 16), Layer("document", 16)
    decode = torch.compile(layer.module.decode, backend=backend)
    for token in range(TOKENS):
        wanted = plain.module.decode(**plain.tokens(token, token + 1), cache=plain.cache)
        with torch.compiler.set_stance("fail_on_recompile" if token else "default"):
            assert torch.equal(decode(**layer.tokens(token, token + 1), cache=layer.cache), wanted)


def test_what_happens_to_a_cache_is_compiled_once() -> None:
    """Drafts that are taken back, beams, and rows, within what is compiled."""
    plain, layer = Layer("document", 16), Layer("document", 16)

    def step(own: Layer, given: dict[str, Tensor], rows: Tensor, lengths: Tensor) -> Any:
        own.cache.select(rows)
        found = own.module.prefill(**given, cache=own.cache).sin()
        own.cache.truncate(lengths)
        own.cache.append(given["k"], given["v"], given["doc"])
        own.cache.truncate(own.cache.lengths - 2)
        return found

    compiled = torch.compile(step, backend="eager")
    for i in range(12):
        given, rows, lengths = (
            layer.tokens(3 * i, 3 * i + 3),
            torch.tensor([i % 2, 0]),
            torch.tensor([2 * i + 1, 2 * i]),
        )
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            assert torch.equal(compiled(layer, given, rows, lengths), step(plain, given, rows, lengths))
    assert torch.equal(layer.cache.lengths, plain.cache.lengths)
