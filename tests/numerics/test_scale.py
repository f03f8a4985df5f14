"""A scale of the call is what the pattern would write: results, gradients, lists and steps are the same."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spdsl
from spdsl.oracle import dense
from tests.library import broken
from tests.numerics.cases import Found, Shape, assert_same, cached, generated, inputs_of, meant, nan_cache, separate
from tests.numerics.conftest import Engine
from tests.numerics.patterns import pattern_of, printed
from tests.numerics.selected import SELECTED
from tests.numerics.test_divergence import PLAIN

SCALE = 0.625  # 1 / sqrt(16) is 0.25
# `@` is where a scale may be written; what follows `=` is one that always is.
BODIES = {
    "ranges": "causal return attend(sliding(9)@)",
    "cap, bias, sink": (
        "causal b = tensor(head) w = tensor(token) return "
        "attend(all, softcap = 2, bias = w[k] - 0.125 * (q - k), sink_logit = b@)"
    ),
    "tile map": "doc = tensor(token, int) return attend(where(doc[k] <= doc[q])@)",
    "residues": "causal return attend(dilated(5, 3)@)",
    "two streams": "causal far = stream() return attend(kv[sliding(9)] | far[all - sliding(9)]@)",
    "joint, one written": "causal return merge(attend(sliding(9)@), attend(all - sliding(9), scale = 0.5))",
    "gate": "causal return gate(attend(sliding(9)@), attend(sink(18) - sliding(9)@))",
    "entries and a choice": SELECTED["nsa"]
    .replace("attend(entries)", "attend(entries@)")
    .replace("attend(picked[chosen])", "attend(picked[chosen]@)")
    .replace("attend(recent[sliding(window)])", "attend(recent[sliding(window)]@)"),
    "each head chooses": SELECTED["moba"]
    .replace("dot(means)", "dot(means@)")
    .replace("attend(chosen)", "attend(chosen@)"),
    "a choice by sums": SELECTED["softmax"]
    .replace("attend(entries)", "attend(entries@)")
    .replace("attend(chosen)", "attend(chosen@)"),
    "a list that is cut": SELECTED["threshold of at least"]
    .replace("attend(entries)", "attend(entries@)")
    .replace("attend(chosen)", "attend(chosen@)"),
    "cosine": SELECTED["cosine"].replace("attend(chosen)", "attend(chosen@)"),
    "divergence": PLAIN.replace("query = asks)", "query = asks@)").replace("attend(chosen)", "attend(chosen@)"),
}
INTERPRETED = ["ranges", "cap, bias, sink", "residues", "entries and a choice", "each head chooses", "divergence"]
INTERPRETED += ["a list that is cut"]
CACHED = ["ranges", "cap, bias, sink", "two streams", "entries and a choice", "each head chooses", "a list that is cut"]


def plain(name: str) -> str:
    return BODIES[name].replace("@", "")


def written(name: str) -> str:
    """The same pattern with the scale in it."""
    assert "@" in BODIES[name]
    return BODIES[name].replace("@", f", scale = {SCALE}")


def shape_of(name: str, rows: int = 37, batch: int = 1) -> Shape:
    return Shape(rows, rows, batch, **({"heads": 4, "kv_heads": 2} if "heads query" in BODIES[name] else {}))


@pytest.mark.parametrize("name", BODIES)
def test_it_means_what_the_pattern_would_write(engine: Engine, name: str) -> None:
    if engine.name == "interpreted" and name not in INTERPRETED:
        pytest.skip("the same kernels in fewer patterns")
    check(name, engine(plain(name)))


def check(name: str, module: Any, rows: int = 37) -> None:
    inputs = inputs_of(pattern_of(plain(name)), shape_of(name, rows))
    found = generated(module, pattern_of(plain(name)), inputs, {"scale": SCALE})
    wanted = meant(pattern_of(written(name)), inputs)
    assert_same(found, wanted)
    other = meant(pattern_of(plain(name)), inputs, backward=False)
    with pytest.raises(AssertionError):
        assert_same(Found(found.parts), other)


@pytest.mark.parametrize("name", [name for name in BODIES if name != "divergence"])
def test_the_reference_and_choices_take_it(cpu: Engine, name: str) -> None:
    module, inputs = cpu(plain(name)), inputs_of(pattern_of(plain(name)), shape_of(name, 23))
    for phase in ("train", "prefill", "decode"):
        rows = slice(-1 if phase == "decode" else 0, None)  # at decode the oracle's last row is that of the last token
        found = [module.reference(**inputs, scale=SCALE, phase=phase, return_lse=True)]
        meaning = dense.results(pattern_of(written(name)), inputs, phase)
        assert_same(*(Found([(out[:, :, rows], lse[:, :, rows]) for out, lse in x]) for x in (found, meaning)))
    if hasattr(module, "choices"):
        lists = module.choices(**inputs, scale=SCALE)
        for key, x in cpu(written(name)).choices(**inputs).items():
            assert torch.equal(lists[key], x)


class _Scaled:
    """The steps of a module with a scale."""

    def __init__(self, module: Any) -> None:
        self.prefill, self.decode = (partial(step, scale=SCALE) for step in (module.prefill, module.decode))


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", CACHED)
def test_steps_take_it(engine: Engine, name: str, page: int | None) -> None:
    if engine.name == "interpreted" and (name not in INTERPRETED or page is None):
        pytest.skip("the same kernels in fewer patterns")
    module, pattern, shape = engine(plain(name)), pattern_of(plain(name)), shape_of(name, 30)
    inputs = inputs_of(pattern, shape)
    found = cached(_Scaled(module), pattern, inputs, [20, 8], 2, nan_cache(module, shape, 60, page))
    assert_same(Found(found), Found(dense.results(pattern_of(written(name)), inputs, "prefill")))


@pytest.mark.parametrize("name", ["ranges", "each head chooses"])
def test_pages_of_others_take_it(engine: Engine, name: str) -> None:
    module, inputs = engine(plain(name)), inputs_of(pattern_of(plain(name)), Shape(32, 32))
    pages = {f"{side}_pages": inputs[side][0].transpose(0, 1).unflatten(0, (2, 16)) for side in "kv"}
    numbers = {"block_table": [[0, 1]], "seq_lens": [32], "cu_seqlens_q": [0, 5]}
    told = {key: torch.tensor(x, dtype=torch.int32) for key, x in numbers.items()}
    if name != "ranges":
        states = module.paged_states(1, 32, kv_heads=1, qk_dim=16, v_dim=16, dtype=torch.float64)
        held = {"block_table": told["block_table"], "seq_lens": told["seq_lens"], "states": states}
        held["state_rows"] = torch.tensor([0])
        module.update_states(**pages, **held, new_tokens=32)
        told |= held
    out, lse = module.attend_paged(inputs["q"][0, :, 27:].transpose(0, 1), **pages, **told, scale=SCALE)
    ((wanted, wanted_lse),) = dense.results(pattern_of(written(name)), inputs, "prefill")
    part = (out.transpose(0, 1)[None], lse.transpose(0, 1)[None])
    assert_same(Found([part]), Found([(wanted[:, :, 27:], wanted_lse[:, :, 27:])]))


def test_it_is_that_of_plain_torch(engine: Engine) -> None:
    q, k, v = (torch.randn(2, heads, 33, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    wanted = sdpa(q, *(x.repeat_interleave(2, 1) for x in (k, v)), is_causal=True, scale=0.4)
    found = engine("causal").attention(q, k, v, scale=0.4)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(wanted)
    grads = [torch.autograd.grad(x, (q, k, v), weights) for x in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["ranges", "cap, bias, sink", "each head chooses"])
def test_a_number_of_a_float32_call_is_an_argument_of_its_kernels(kernels: Engine, name: str) -> None:
    """In float64 it is a constant of them, so all else here tests that."""
    inputs = inputs_of(pattern_of(plain(name)), Shape(37, 37))
    found = generated(kernels(plain(name)), pattern_of(plain(name)), {x: y.float() for x, y in inputs.items()},
                      {"scale": SCALE})  # fmt: skip
    assert_same(found, meant(pattern_of(written(name)), {x: y.float() for x, y in inputs.items()}), 2e-4)


def test_packed_sequences_and_parts_take_it(cpu: Engine) -> None:
    pattern, ends = pattern_of(plain("ranges")), [0, 11, 11, 30]
    inputs = inputs_of(pattern, Shape(30, 30))
    module = cpu(plain("ranges"))
    found = generated(module, pattern, inputs, {"cu_seqlens": torch.tensor(ends), "scale": SCALE})
    assert_same(found, separate(pattern_of(written("ranges")), inputs, list(pairwise(ends))))
    part = generated(module, pattern, inputs, {"q_offset": 3, "k_offset": 3, "scale": SCALE})
    assert_same(part, meant(pattern_of(written("ranges")), inputs, {"q_offset": 3, "k_offset": 3}))


WRONG: list[tuple[Any, str]] = [
    (0, "a number from"), (0.0, "a number from"), (-0.25, "a number from"), (float("nan"), "a number from"),
    (float("inf"), "a number from"), (1e-40, "a number from"), (1e31, "a number from"), (True, "a number, got bool"),
    ("1", "a number, got str"), (torch.tensor(0.5), "a number, got Tensor"), ([0.5], "a number, got list"),
    (0.5j, "a number, got complex"), (torch.tensor(0.5, device="meta"), "a number, got Tensor"),
]  # fmt: skip


@pytest.mark.parametrize("value, message", WRONG, ids=lambda x: repr(x)[:20])
def test_what_is_no_scale_is_refused(cpu: Engine, value: Any, message: str) -> None:
    module, shape = cpu(plain("ranges")), Shape(5, 5)
    inputs, cache = inputs_of(pattern_of(plain("ranges")), shape), nan_cache(module, shape, 40, 16)
    for call in (module.attention, module.reference, lambda **x: module.prefill(**x, cache=cache)):
        with pytest.raises((TypeError, ValueError), match=f"^scale: expected {message}"):
            call(**inputs, scale=value)
    assert cache.lengths.tolist() == [0]


def test_numbers_of_any_kind_are_taken(cpu: Engine) -> None:
    module, inputs = cpu(plain("ranges")), inputs_of(pattern_of(plain("ranges")), Shape(5, 5))
    wanted = module.attention(**inputs, scale=0.5)
    for value in (np.float64(0.5), np.float32(0.5), Fraction(1, 2)):
        assert torch.equal(module.attention(**inputs, scale=value), wanted)
    module.attention(**inputs, scale=2)


ALL_WRITTEN = ["causal return attend(sliding(9), scale = 0.5)", written("entries and a choice"), written("cosine")]


@pytest.mark.parametrize("body", ALL_WRITTEN)
def test_a_pattern_that_writes_them_all_refuses_one(cpu: Engine, body: str) -> None:
    module, inputs = cpu(body), inputs_of(pattern_of(body), Shape(5, 5))
    cache = nan_cache(module, Shape(5, 5), 40, 16)
    message = r"^scale: expected None, as the pattern writes that of each attend and dot, got 0\.5"
    calls: list[Any] = [module.attention, module.reference, lambda **x: module.prefill(**x, cache=cache)]
    for call in calls:
        call(**inputs, scale=None)
        with pytest.raises(ValueError, match=message):
            call(**inputs, scale=0.5)
    assert "scale: in place of" not in module.attention.__doc__
    assert "where the pattern writes none" in cpu(plain("joint, one written")).attention.__doc__


BUGS = [
    ("the gradient of queries keeps the default", "ranges", "rt.scale_of(q, layout), config),\n        num_warps",
     "tl.constexpr(q.shape[-1] ** -0.5), config),\n        num_warps"),
    ("the gradient of keys keeps the default", "ranges", "rt.scale_of(q, layout), config, group),\n        num_warps",
     "tl.constexpr(q.shape[-1] ** -0.5), config, group),\n        num_warps"),
    ("a choice keeps the default", "a choice by sums", "rt.packed_constants(q, 16, rt.scale_of(q, layout)",
     "rt.packed_constants(q, 16, tl.constexpr(q.shape[-1] ** -0.5)"),
]  # fmt: skip
CPU_BUGS = [
    ("the call is not asked", "ranges", "float(q.shape[-1] ** -0.5) if corner.scale is None else corner.scale",
     "float(q.shape[-1] ** -0.5)"),
    ("the pattern is not asked", "joint, one written", "if self.scale is not None:", "if False:"),
    ("a scale gets lost on the way to the gradient", "ranges", "inputs[count + 2 : -2]",
     "(*inputs[count + 2 : -3], None)"),
]  # fmt: skip


@pytest.mark.parametrize("title, name, old, new", BUGS, ids=[bug[0] for bug in BUGS])
def test_a_bug_in_the_kernels_is_seen(
    kernels: Engine, title: str, name: str, old: str, new: str, tmp_path: Path
) -> None:
    module = kernels(broken(printed(plain(name)), old, new, tmp_path))
    with pytest.raises(AssertionError):
        check(name, module, 90)


@pytest.mark.parametrize("title, name, old, new", CPU_BUGS, ids=[bug[0] for bug in CPU_BUGS])
def test_a_bug_on_the_cpu_path_is_seen(cpu: Engine, title: str, name: str, old: str, new: str, tmp_path: Path) -> None:
    module = cpu(broken(printed(plain(name)), old, new, tmp_path))
    with pytest.raises(AssertionError):
        check(name, module)


@pytest.mark.parametrize("word", ["scale", "side", "cu_seqlens_k", "max_seqlen_k"])
def test_no_input_has_the_name(word: str) -> None:
    found = spdsl.check(f"pattern p {{ {word} = tensor(head) return attend(all, bias = {word}[h] * k) }}")
    assert [x.code for x in found] == ["E104"]


def test_values_take_no_other_kernels() -> None:
    pytest.importorskip("triton")
    from spdsl.machine import record as recording

    if recording.os.environ.get("TRITON_INTERPRET", "0") != "0":
        pytest.skip("recorded where kernels would be compiled")
    module = spdsl.load("pattern p { causal return attend(sliding(64)) }")
    q, k, v = (torch.randn(1, heads, 64, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))

    def keys(scale: float | None) -> list[str]:
        def call() -> None:
            out: Tensor = module.attention(q, k, v, scale=scale)
            out.sum().backward()

        return [launch.key for launch in recording.record(module, call)]

    assert keys(0.1) == keys(0.2) == keys(3)
    assert all("fp32" in key for key in keys(0.1) if "row_delta" not in key)
    assert keys(None) != keys(0.1)


@pytest.mark.parametrize("scale", ["-1", "0", "0 - 1 / 3"])
@pytest.mark.parametrize("rest", ["", ", softcap = 2", ", bias = -0.125 * (q - k)"])
def test_a_written_scale_may_be_no_more_than_0(engine: Engine, scale: str, rest: str) -> None:
    """Its products are no greatest scores of rows, and it would make +inf or NaN of a hidden one."""
    body = f"causal return attend(sliding(20), scale = {scale}{rest})"
    pattern, inputs = pattern_of(body), inputs_of(pattern_of(body), Shape(37, 37))
    assert_same(generated(engine(body), pattern, inputs), meant(pattern, inputs))
