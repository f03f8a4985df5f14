"""torch.compile and torch.export of functions that call a generated module."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import spdsl
from tests.module.patterns import SMALL, arguments, gradients, module_of, with_gradients
from tests.numerics.strides import FORMS


def expect_same(module: ModuleType, compiled: Any, given: dict[str, Tensor]) -> None:
    """Output and gradients of the compiled function are bitwise those of the module."""
    own = with_gradients(given)
    out = compiled(**own)
    out.square().sum().backward()
    assert torch.equal(out, module.attention(**given))
    for name, wanted in gradients(module, given).items():
        assert torch.equal(own[name].grad, wanted), name


FORMS_TO_COMPILE = ["tokens_innermost", "heads_innermost", "gaps_in_rows", "one_column", "one_number", "overlapping"]


@pytest.mark.parametrize("form", FORMS_TO_COMPILE)
def test_any_strides_and_length(streaming: ModuleType, form: str) -> None:
    """Q lies in another form than K and V."""
    compiled = torch.compile(streaming.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (40, 56):
        given = list(arguments(streaming, tokens).values())
        given = [FORMS[form](x) if i else FORMS["gaps_between_rows"](x) for i, x in enumerate(given)]
        wanted = of_the_sum(streaming.attention, [x.contiguous() for x in given])
        for run in (streaming.attention, compiled):
            torch.testing.assert_close(of_the_sum(run, given), wanted, rtol=1e-5, atol=1e-5)


def of_the_sum(attend: Any, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the sum: what flows back is one number, expanded."""
    own = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(attend(*own).sum(), own)


@pytest.mark.parametrize("name", SMALL)
def test_one_graph_with_backward(name: str) -> None:
    module = module_of(name)
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager")
    expect_same(module, compiled, arguments(module))


@pytest.mark.parametrize("name", SMALL)
def test_one_graph_for_all_lengths(name: str) -> None:
    module = module_of(name)
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    # No two sizes are equal by chance: PyTorch would take them for one.
    expect_same(module, compiled, arguments(module, 112, batch=3))
    with torch.compiler.set_stance("fail_on_recompile"):
        expect_same(module, compiled, arguments(module, 144, batch=5))


CONDITIONS = {
    "length": "return attend(all) if length < 30 return attend(sliding(9))",
    "tensor": "broad = tensor(bool) return attend(all) if broad == 1 return attend(sliding(9))",
    "both": (
        "broad = tensor(bool) s = tensor() return attend(all) if broad == 1 & length < 30"
        " return attend(sliding(9)) if length < 25 | s > 0 return attend(sliding(3))"
    ),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", CONDITIONS)
def test_one_graph_where_results_have_conditions(name: str, dynamic: bool | None) -> None:
    """Numbers of the host are decided on, those in tensors are not looked at."""
    module = spdsl.load(f"pattern conditions {{ causal {CONDITIONS[name]} }}")
    compiled = torch.compile(module.attention, fullgraph=True, backend="eager", dynamic=dynamic)
    for tokens, batch in ((50, 2), (27, 3), (18, 1), (40, 1)):
        given = arguments(module, tokens, batch=batch)
        for broad in {**given}.keys() & {"broad"}:
            given[broad] = torch.arange(batch) % 2 == 0
        assert torch.equal(compiled(**given), module.attention(**given))


def test_inductor(document: ModuleType) -> None:
    expect_same(document, torch.compile(document.attention, fullgraph=True), arguments(document))


def test_packed_sequences(streaming: ModuleType) -> None:
    given = arguments(streaming, 40, batch=1)
    cu_seqlens = torch.tensor([0, 13, 40], dtype=torch.int32)
    compiled = torch.compile(streaming.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(**given, cu_seqlens=cu_seqlens, max_seqlen=27),
        streaming.attention(**given, cu_seqlens=cu_seqlens, max_seqlen=27),
    )


def test_under_autocast(streaming: ModuleType) -> None:
    given = arguments(streaming)
    compiled = torch.compile(streaming.attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(**given), streaming.attention(**given))


class Block(nn.Module):
    """Attention between two linear layers: x [batch, tokens, 32]."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self.module = module
        self.qkv = nn.Linear(32, 3 * 32)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(self.module.attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def test_export_with_any_length(streaming: ModuleType) -> None:
    block = Block(streaming).eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(2, 40, 32),), dynamic_shapes={"x": {1: tokens}})
        operators = [str(node.target) for node in program.graph.nodes if "spdsl_" in str(node.target)]
        assert operators == [f"{streaming.MODULE.namespace}.attend_forward.default"]
        for length in (40, 75):
            x = torch.randn(2, length, 32)
            assert torch.equal(program.module()(x), block(x))


def test_export_with_a_scale_and_packed_keys(streaming: ModuleType) -> None:
    class Whole(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, k_ends: Tensor) -> Tensor:
            out: Tensor = streaming.attention(q, k, v, cu_seqlens=ends, cu_seqlens_k=k_ends, scale=0.3)
            return out

    tokens, keys = (torch.export.Dim(name, min=2, max=4096) for name in ("tokens", "keys"))
    shapes = {"q": {2: tokens}, "k": {2: keys}, "v": {2: keys}, "ends": None, "k_ends": None}
    program = None
    for rows, columns in ((30, 41), (17, 53)):
        given = arguments(streaming, columns, batch=1)
        called = (
            given["q"][:, :, :rows].contiguous(),
            given["k"],
            given["v"],
            torch.tensor([0, 5, rows]),
            torch.tensor([0, 8, columns]),
        )
        program = program or torch.export.export(Whole(), called, dynamic_shapes=shapes)
        assert torch.equal(program.module()(*called), Whole()(*called))


@pytest.mark.parametrize("dynamic, most", [(None, 2), (True, 1)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_scales_make_no_further_graphs(streaming: ModuleType, backend: str, dynamic: bool | None, most: int) -> None:
    """A float is a constant of the first graph, and known to differ in the second one."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(streaming.attention, fullgraph=True, backend=backend, dynamic=dynamic)
    given = arguments(streaming)
    for scale in (0.1, 0.2, 0.3, 0.125, 0.5, 2.0):
        both = []
        for run in (compiled, streaming.attention):
            own = with_gradients(given)
            out = run(**own, scale=scale)
            out.square().sum().backward()
            both.append([out, *(x.grad for x in own.values())])
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert counters["stats"]["unique_graphs"] == most
    with pytest.raises(Exception, match=r"scale: expected a number from"):
        compiled(**given, scale=-1.0)


def test_export_of_every_pattern(module: ModuleType) -> None:
    class Whole(nn.Module):
        def forward(self, **given: Tensor) -> Tensor:
            out: Tensor = module.attention(**given)
            return out

    given = arguments(module)
    program = torch.export.export(Whole(), (), given)
    assert torch.equal(program.module()(**given), module.attention(**given))
