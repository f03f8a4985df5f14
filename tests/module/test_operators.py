"""The operators as PyTorch sees them: schema, fake tensors, autograd, numerical gradients."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import spdsl
from tests.module.patterns import arguments, gradients, module_of, with_gradients
from tests.numerics.strides import FORMS


class Recorded(TorchDispatchMode):
    """Keeps the arguments of the first call of each operator of a module."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self.namespace, self.calls = module.MODULE.namespace, dict[str, tuple[Any, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.calls.setdefault(func._opname, args)
        return func(*args, **(kwargs or {}))

    def operator(self, name: str) -> Any:
        return getattr(getattr(torch.ops, self.namespace), name).default


@pytest.mark.parametrize("form", ["dense", "tokens_innermost", "one_number"])
def test_opcheck_of_every_operator(module: ModuleType, form: str) -> None:
    given = {name: x if name == "q" else FORMS[form](x) for name, x in arguments(module).items()}
    wanted = {name for name, x in given.items() if x.dim() == 4 and x.is_floating_point()}
    own = {name: x.detach().requires_grad_(name in wanted) for name, x in given.items()}
    with Recorded(module) as seen:
        module.attention(**own).square().sum().backward()
    assert len([name for name in seen.calls if name.endswith("_forward")]) * 2 == len(seen.calls) > 0
    for name, found in seen.calls.items():
        learns = name.endswith("_forward")
        arguments_of = [x.detach() if isinstance(x, Tensor) else x for x in found]
        for x in arguments_of:
            if learns and isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point():
                x.requires_grad_()
        verdicts = opcheck(seen.operator(name), arguments_of)
        assert set(verdicts.values()) == {"SUCCESS"}, verdicts


@pytest.mark.parametrize("layout", ["dense", "packed", "padded", "part"])
def test_gradients_equal_finite_differences(layout: str) -> None:
    module = module_of("streaming_llm")
    extra = {
        "dense": {},
        "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 14])},
        "padded": {"lengths": torch.tensor([9])},
        "part": {"q_offset": 5, "k_offset": 5},
    }[layout]
    given = arguments(module, 14, batch=1, heads=2, kv_heads=1, qk_dim=3, v_dim=2, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in given.values())

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = module.attention(q, k, v, return_lse=True, **extra)
        return torch.cat((out.flatten(), lse.masked_fill(lse.isinf(), 0).flatten()))

    assert torch.autograd.gradcheck(both, (q, k, v))


def test_gradients_of_every_pattern_equal_finite_differences(module: ModuleType) -> None:
    given = arguments(module, 18, batch=1, heads=2, kv_heads=1, qk_dim=3, v_dim=2, dtype=torch.float64)
    own = with_gradients(given)
    if "sinks" in own:
        own["sinks"] = own["sinks"].double().requires_grad_()
    learned = [name for name, x in own.items() if x.requires_grad]

    def out(*values: Tensor) -> Tensor:
        return module.attention(**{**own, **dict(zip(learned, values, strict=True))})

    assert torch.autograd.gradcheck(out, tuple(own[name] for name in learned))


@pytest.mark.parametrize("learned", ["q", "k", "v"])
def test_a_gradient_for_some_arguments_only(document: ModuleType, learned: str) -> None:
    given = arguments(document)
    own = {name: x.clone().requires_grad_(name == learned) for name, x in given.items()}
    document.attention(**own).square().sum().backward()
    assert [name for name, x in own.items() if x.grad is not None] == [learned]
    torch.testing.assert_close(own[learned].grad, gradients(document, given)[learned], rtol=0, atol=0)


def test_only_the_lse_is_used(document: ModuleType) -> None:
    given = with_gradients(arguments(document))
    document.attention(**given, return_lse=True)[1].sum().backward()
    assert given["q"].grad is not None
    assert given["q"].grad.abs().max() > 0
    assert given["v"].grad is not None
    assert given["v"].grad.abs().max() == 0


def test_two_backward_passes_over_one_graph(document: ModuleType) -> None:
    given = with_gradients(arguments(document))
    loss = document.attention(**given).square().sum()
    first = torch.autograd.grad(loss, given["k"], retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(loss, given["k"]))


def test_no_graph_without_gradients(module: ModuleType) -> None:
    given = with_gradients(arguments(module))
    with torch.no_grad():
        assert module.attention(**given).grad_fn is None
    with torch.inference_mode():
        assert not module.attention(**given).requires_grad


def test_a_change_after_forward_is_noticed(document: ModuleType) -> None:
    given = with_gradients(arguments(document))
    k = given["k"] * 1
    out = document.attention(**{**given, "k": k})
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_are_refused(document: ModuleType) -> None:
    given = with_gradients(arguments(document))
    (gradient,) = torch.autograd.grad(document.attention(**given).square().sum(), given["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match="document: attention has first derivatives only"):
        gradient.sum().backward()


def test_forward_mode_derivatives_are_refused(document: ModuleType) -> None:
    given = arguments(document)
    q = given.pop("q")
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="q: no forward-mode derivative"),
    ):
        document.attention(forward_ad.make_dual(q, torch.ones_like(q)), **given)
    with pytest.raises(NotImplementedError, match="q: no forward-mode derivative"):
        torch.func.jvp(lambda x: document.attention(x, **given), (q,), (q,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop(document: ModuleType) -> None:
    many = [arguments(document, 30 + 0 * i) for i in range(3)]
    many = [{name: x + i if x.is_floating_point() else x for name, x in one.items()} for i, one in enumerate(many)]
    q, k, v = (torch.stack([one[name] for one in many]).requires_grad_() for name in "qkv")
    doc = many[0]["doc"]
    mapped = torch.vmap(lambda q, k, v: document.attention(q, k, v, doc))(q, k, v)
    looped = torch.stack([document.attention(a, b, c, doc) for a, b, c in zip(q, k, v, strict=True)])
    assert torch.equal(mapped, looped)
    assert torch.equal(*(torch.autograd.grad(x.square().sum(), k)[0] for x in (mapped, looped)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(document: ModuleType, reentrant: bool) -> None:
    given = arguments(document)
    own = with_gradients(given)
    checkpoint(document.attention, *own.values(), use_reentrant=reentrant).square().sum().backward()
    for name, wanted in gradients(document, given).items():
        assert torch.equal(own[name].grad, wanted), name


def test_meta_tensors_have_the_same_shapes(module: ModuleType) -> None:
    given = arguments(module)
    out, lse = module.attention(**{name: x.to("meta") for name, x in given.items()}, return_lse=True)
    real, real_lse = module.attention(**given, return_lse=True)
    assert (out.device.type, out.shape, out.dtype) == ("meta", real.shape, real.dtype)
    assert (lse.shape, lse.dtype, out.stride()) == (real_lse.shape, real_lse.dtype, real.stride())


@pytest.mark.parametrize("chosen", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_sdpa(document: ModuleType, chosen: torch.dtype) -> None:
    given = arguments(document)
    wanted = document.attention(**{name: x.to(chosen) if name in "qkv" else x for name, x in given.items()})
    mixed = {**given, "v": given["v"].to(chosen)}  # as behind a linear layer, with q and k rotated in float32
    with torch.autocast("cpu", dtype=chosen):
        assert torch.equal(document.attention(**given), wanted)
        assert torch.equal(document.attention(**mixed), wanted)
        sdpa = torch.nn.functional.scaled_dot_product_attention(mixed["q"], mixed["q"], mixed["q"])
    assert wanted.dtype == sdpa.dtype == chosen
    with pytest.raises(ValueError, match=r"v: expected dtype torch.float32 like q"):
        document.attention(**mixed)


@pytest.mark.parametrize("tokens", [60, 1])
def test_sums_under_autocast_are_float32(tokens: int) -> None:
    """Products of the CPU path would be cast, too: a cap takes them for whole sequences, a step always."""
    module = spdsl.load("pattern capped { causal return attend(all, softcap = 5) }")
    given = {name: x.bfloat16() for name, x in arguments(module, 60).items()}
    caches = [module.Cache(2, 64, kv_heads=2, qk_dim=16, v_dim=24, dtype=torch.bfloat16) for _ in range(2)]

    def found(cache: Any) -> Tensor:
        if tokens > 1:
            whole: Tensor = module.attention(**{name: x.float() for name, x in given.items()})
            return whole
        module.prefill(**{name: x[:, :, :59] for name, x in given.items()}, cache=cache)
        step: Tensor = module.decode(**{name: x[:, :, 59:].float() for name, x in given.items()}, cache=cache)
        return step

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = found(caches[0])
    exact = module.reference(**given)[:, :, -tokens:]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)  # one rounding, that of the result


def test_autocast_gives_gradients_in_the_dtype_of_the_leaf(document: ModuleType) -> None:
    given = with_gradients(arguments(document))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        document.attention(**given).float().square().sum().backward()
    exact = gradients(document, {name: x.detach() for name, x in given.items()})
    for name, wanted in exact.items():
        assert given[name].grad.dtype == torch.float32
        torch.testing.assert_close(given[name].grad, wanted, rtol=5e-2, atol=5e-2)


def test_autocast_leaves_float64_alone(document: ModuleType) -> None:
    given = arguments(document, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert document.attention(**given).dtype == torch.float64
