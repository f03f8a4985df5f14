"""Biases that learn, as a user has them: models that train, operators of their own, memory, and what is refused."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import spdsl
from tests.module.test_operators import Recorded

BODIES = {
    # Relative positions in buckets, as in T5: exact up to 4 tokens, then wider and wider.
    "t5": "causal bucket = tensor(40, int) table = tensor(head, 8) "
    "return attend(all, scale = 1, bias = table[h][bucket[q - k]])",
    "alibi": "causal slope = tensor(head) return attend(sliding(24), bias = -slope[h] * (q - k))",
    "forgetting": "causal gate = tensor(head, token) return attend(all, bias = gate[h][q] - gate[h][k])",
    "pairs": "pair = tensor(head, token, token) return attend(all, bias = pair[h][q][k]) if train",
    "merged": "causal a = tensor() "
    "return merge(attend(sliding(9), bias = a * (q - k)), attend(sink(3) - sliding(9), bias = a))",
}  # fmt: skip
BUCKETS = torch.arange(40).clamp(min=1).log2().mul(1.4).floor().clamp(max=7).long()
TOKENS, HEADS = 40, 4


@cache
def module_of(name: str) -> ModuleType:
    return spdsl.load(f"pattern {name} {{ {BODIES[name]} }}")


def arguments(name: str, tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(tokens)
    sizes = {
        "t5": {"table": (HEADS, 8)}, "alibi": {"slope": (HEADS,)}, "forgetting": {"gate": (2, HEADS, tokens)},
        "pairs": {"pair": (1, HEADS, tokens, tokens)}, "merged": {"a": (1,)},
    }[name]  # fmt: skip
    vectors = {"q": (2, HEADS, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    found = {key: torch.randn(size, generator=make, dtype=dtype) for key, size in (vectors | sizes).items()}
    return found | ({"bucket": BUCKETS} if name == "t5" else {})


def learning(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in given.items()}


def gradients(module: ModuleType, given: dict[str, Tensor]) -> dict[str, Tensor]:
    own = learning(given)
    module.attention(**own).square().sum().backward()
    return {name: x.grad for name, x in own.items() if x.grad is not None}


@pytest.mark.parametrize("name", BODIES)
def test_gradients_equal_finite_differences(name: str) -> None:
    module = module_of(name)
    own = {key: x[:1, ..., :3] if x.dim() == 4 and key in "qkv" else x for key, x in arguments(name, 8).items()}
    own = learning({key: x[:1] if key == "gate" else x for key, x in own.items()})
    learned = [key for key, x in own.items() if x.requires_grad]

    def both(*values: Tensor) -> Tensor:
        found = module.attention(**{**own, **dict(zip(learned, values, strict=True))}, return_lse=True)
        return torch.cat([x.flatten() for x in found])

    assert torch.autograd.gradcheck(both, tuple(own[key] for key in learned))


@pytest.mark.parametrize("name", BODIES)
def test_two_runs_are_equal_to_the_bit(name: str) -> None:
    first, again = (gradients(module_of(name), arguments(name, dtype=torch.float32)) for _ in range(2))
    assert all(torch.equal(grad, again[key]) for key, grad in first.items())


@pytest.mark.parametrize("name", BODIES)
def test_operators(name: str) -> None:
    """Three for each result: one more for the tensors of the bias, and none where they want no gradient."""
    module, own = module_of(name), learning(arguments(name))
    with Recorded(module) as seen:
        module.attention(**own).square().sum().backward()
    assert {key.split("_", 1)[1].replace("joint_", "") for key in seen.calls} >= {
        "forward",
        "backward",
        "bias_backward",
    }
    for key, found in seen.calls.items():
        own_arguments = [x.detach() if isinstance(x, Tensor) else x for x in found]
        for x in own_arguments:
            if key.endswith("_forward") and isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_()
        verdicts = opcheck(seen.operator(key), own_arguments)
        assert set(verdicts.values()) == {"SUCCESS"}, verdicts
    fixed = {key: x.detach().requires_grad_(key in "qkv") for key, x in own.items()}
    with Recorded(module) as seen:
        module.attention(**fixed).square().sum().backward()
    assert not any("bias" in key for key in seen.calls)


@pytest.mark.parametrize("name", ["t5", "forgetting", "pairs"])
def test_16_bits(name: str) -> None:
    """A gradient in the dtype of the leaf, of sums in float32."""
    exact = arguments(name)
    rounded = {key: x.bfloat16() if x.is_floating_point() else x for key, x in exact.items()}
    wanted = gradients(module_of(name), {key: x.double() if x.is_floating_point() else x for key, x in rounded.items()})
    for key, grad in gradients(module_of(name), rounded).items():
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad.double(), wanted[key], rtol=3e-2, atol=3e-2 * wanted[key].abs().max().item())


def test_a_gradient_for_the_bias_alone() -> None:
    module, given = module_of("t5"), arguments("t5")
    own = {name: x.clone().requires_grad_(name == "table") for name, x in given.items()}
    module.attention(**own).square().sum().backward()
    assert torch.equal(own["table"].grad, gradients(module, given)["table"])
    assert own["q"].grad is None


@pytest.mark.parametrize("name", ["t5", "forgetting", "merged"])
def test_compiled(name: str) -> None:
    """Output and gradients are those of the module to the bit; export goes through, too."""
    module, given = module_of(name), arguments(name, dtype=torch.float32)
    compiled = torch.compile(module.attention, fullgraph=True, backend="aot_eager")
    own = learning(given)
    compiled(**own).square().sum().backward()
    for key, wanted in gradients(module, given).items():
        assert torch.equal(own[key].grad, wanted), key

    class Model(torch.nn.Module):
        def forward(self, **x: Tensor) -> Tensor:
            return module.attention(**x)  # type: ignore[no-any-return]

    exported = torch.export.export(Model(), (), kwargs=given)
    torch.testing.assert_close(exported.module()(**given), module.attention(**given), rtol=0, atol=0)


class Model(torch.nn.Module):
    """One layer of attention that copies tokens; its bias is learned with it."""

    def __init__(self, attention: Any, learned: dict[str, Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attention
        self.tokens, self.out = torch.nn.Embedding(11, 32), torch.nn.Linear(32, 11)
        self.vectors = torch.nn.Linear(32, 3 * 32, bias=False)
        self.learned = torch.nn.ParameterDict({name: torch.nn.Parameter(x.clone()) for name, x in learned.items()})

    def forward(self, text: Tensor) -> Tensor:
        x = self.vectors(self.tokens(text)).unflatten(-1, (3, HEADS, 8)).permute(2, 0, 3, 1, 4)
        out = self.attention(*x, **self.learned)
        return self.out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def dense(name: str) -> Any:
    """The same by plain torch."""
    at = torch.arange(TOKENS)
    distance = at[:, None] - at

    def attention(q: Tensor, k: Tensor, v: Tensor, **learned: Tensor) -> Tensor:
        if name == "t5":
            bias, seen = learned["table"][:, BUCKETS[distance.clamp(min=0)]], distance >= 0
        else:
            bias, seen = -learned["slope"][:, None, None] * distance, (distance >= 0) & (distance < 24)
        logits = q @ k.transpose(-1, -2) * (1 if name == "t5" else q.shape[-1] ** -0.5) + bias
        return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    return attention


@pytest.mark.parametrize("name", ["t5", "alibi"])
def test_a_model_trains_as_its_dense_form(name: str) -> None:
    """A hundred steps of Adam: every loss within rounding, and the bias has moved."""
    torch.set_default_dtype(torch.float64)
    try:
        learned = {"t5": {"table": torch.zeros(HEADS, 8)}, "alibi": {"slope": 0.5 ** torch.arange(1.0, HEADS + 1)}}[
            name
        ]
        fixed = {"bucket": BUCKETS} if name == "t5" else {}
        module = module_of(name)
        losses = {}
        for form in (lambda *x, **more: module.attention(*x, **more, **fixed), dense(name)):
            model = Model(form, learned)
            steps = torch.optim.Adam(model.parameters(), lr=1e-2)
            make, found = torch.Generator().manual_seed(5), []
            for _ in range(100):
                text = torch.randint(0, 11, (2, TOKENS), generator=make)
                target = text.roll(3, 1)  # the token three places before
                loss = torch.nn.functional.cross_entropy(model(text)[:, 3:].flatten(0, 1), target[:, 3:].flatten())
                steps.zero_grad()
                loss.backward()
                steps.step()
                found.append(loss.item())
            losses[form] = torch.tensor(found), {key: x.detach() for key, x in model.learned.items()}
        (ours, own), (theirs, wanted) = losses.values()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert ours[-10:].mean() < 0.9 * ours[:10].mean()
        for key, start in learned.items():
            torch.testing.assert_close(own[key], wanted[key], rtol=1e-7, atol=1e-7)
            assert (own[key] - start).abs().max() > 0.05
    finally:
        torch.set_default_dtype(torch.float32)


def _sizes(name: str, tokens: int) -> dict[str, int]:
    """Elements of the largest buffer that a kernel of the bias writes, and of what the caller gave, by kernel."""
    found: dict[str, int] = {}

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        if "dbias" in kernel.fn.__name__:
            sums = [x.data.numel() for x in args[5:7] if hasattr(x, "data") and isinstance(x.data, Tensor)]
            found[kernel.fn.__name__] = max(sums)

    module, given = module_of(name), arguments(name, tokens, torch.float32)
    with module.rt.launching(note):
        module.attention(**learning(given)).sum().backward()
    return found


@pytest.mark.parametrize("name", ["t5", "alibi", "forgetting", "merged"])
def test_memory_is_that_of_the_table_times_tiles(name: str) -> None:
    """No buffer has a number for each pair: twice the tokens are twice the numbers, at most."""
    per_tile = {"t5": 8, "alibi": 1, "forgetting": 128, "merged": 1}[name]
    for tokens in (1024, 2048):
        sizes = _sizes(name, tokens)
        assert sizes
        assert max(sizes.values()) <= 2 * HEADS * -(-tokens // 64) * per_tile


REFUSED = {
    "token by distance": "causal x = tensor(token) return attend(all, bias = x[q - k])",
    "keys of units": "causal x = tensor(token) c = top_k(2, score = dot(compress(16)), share = max(group), unit = 16) "
    "return attend(c, bias = x[k])",
    "a score as a result": "causal x = tensor(head) f = attend(all, bias = x[h] * k) return f, pool(mass(f)) if train",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused(name: str) -> None:
    module = spdsl.load(f"pattern refused {{ {REFUSED[name]} }}")
    own = module.example_inputs(1, 32, heads=4, kv_heads=2, qk_dim=16, v_dim=16)
    own["x"] = own["x"].requires_grad_()
    with pytest.raises(ValueError, match=r"x: gets no gradient where a bias reads it like that; pass x\.detach\(\)"):
        module.attention(**own)
    module.attention(**{**own, "x": own["x"].detach()})
