"""Random sets through generated modules: forward and backward on the CPU path against the float64 oracle."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from spdsl.api import Module
from spdsl.codegen import render
from spdsl.compiler import stages
from spdsl.diagnostics import Report, Source
from spdsl.ir.pattern import Pattern
from spdsl.oracle.dense import results
from spdsl.syntax.parse import parse
from tests.passes.analyses import planned
from tests.passes.random_sets import HEADER, Maker, Setting, setting

PER_MODULE = 12
CHUNKS = [pytest.param(chunk, marks=() if chunk < 12 else pytest.mark.full) for chunk in range(168)]


def sized(seed: int, most: int | None) -> Setting:
    """The setting of a module; the interpreter needs short sequences."""
    s = setting(seed)
    if most is None:
        return s
    keys = min(s.keys, most)
    return Setting(min(s.rows, keys), keys, s.causal, seed)


def texts(chunk: int, count: int, causal: bool) -> list[str]:
    """Sets that are neither empty nor too complex, few of them deep."""
    found: list[str] = []
    seed = 100_000 * (chunk + 1)
    while len(found) < count:
        text = Maker(seed).set((0, 1, 1, 1)[seed % 4]).text
        seed += 1
        if planned(text, causal) is not None:
            found.append(text)
    return found


def module_of(sets: list[str], causal: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Pattern]:
    """One module that returns an attention per set, left unformatted, which takes a second less."""
    branches = ", ".join(f"attend({text})" for text in sets)
    text = f"pattern p {{ {HEADER} {'causal' if causal else ''} return {branches} }}"
    monkeypatch.setattr(render, "formatted", lambda made: made)
    source = Source(text)
    made = dict(stages(source, parse(source, report := Report(source)).patterns[0], {}, report))
    pattern = made["pattern"]
    assert isinstance(pattern, Pattern)
    found = made["module"]
    assert isinstance(found, render.GeneratedModule)
    return Module(found.name, found.text, found.digest, ()).load(), pattern


def agree(chunk: int, count: int, s: Setting, dtype: torch.dtype, tolerance: float, monkeypatch) -> None:
    sets = texts(chunk, count, s.causal)
    module, pattern = module_of(sets, s.causal, monkeypatch)
    make = torch.Generator().manual_seed(chunk)
    shapes = {"q": (s.heads, s.rows), "k": (s.kv_heads, s.keys), "v": (s.kv_heads, s.keys)}
    vectors = {name: torch.randn(1, *shape, 16, generator=make, dtype=dtype) for name, shape in shapes.items()}
    values = {name: x.to(dtype) if x.is_floating_point() else x for name, x in s.values.items()}
    ours = {name: x.clone().requires_grad_() for name, x in vectors.items()}
    truth = {name: x.double().requires_grad_() for name, x in vectors.items()}
    outs = module.attention(**ours, **values, return_lse=True)
    wanted = results(pattern, {**truth, **values}, "train")
    for text, (out, lse), (true_out, true_lse) in zip(sets, outs if count > 1 else [outs], wanted, strict=True):
        where = f"chunk {chunk}, {s}: {text}"
        assert torch.allclose(out.double(), true_out, atol=tolerance, rtol=tolerance), where
        assert torch.allclose(lse.double(), true_lse, atol=tolerance, rtol=tolerance), where
        weight = torch.randn(out.shape, generator=make, dtype=dtype)
        seen = torch.isfinite(true_lse)
        loss = (out * weight).sum() + lse[seen].sum().to(dtype)
        true_loss = (true_out * weight.double()).sum() + true_lse[seen].sum()
        got = torch.autograd.grad(loss, list(ours.values()), retain_graph=True)
        want = torch.autograd.grad(true_loss, list(truth.values()), retain_graph=True)
        for name, a, b in zip(ours, got, want, strict=True):
            assert torch.allclose(a.double(), b, atol=tolerance, rtol=tolerance), f"gradient of {name}, {where}"


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_cpu_path_is_the_oracle(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(chunk, PER_MODULE, sized(chunk, None), torch.float64, 1e-9, monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("chunk", [*range(5), *(pytest.param(chunk, marks=pytest.mark.full) for chunk in (5, 6, 7))])
def test_interpreted_kernels_are_the_oracle(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(1000 + chunk, 5, sized(1000 + chunk, 40), torch.float32, 1e-4, monkeypatch)
